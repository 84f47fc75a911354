"""Cumulative distribution functions and quantiles, also of families for which torch does not implement them."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, TransformedDistribution

from ..core.compiling import dispatched
from ..core.independent import innermost
from ..core.leaves import map_leaves
from ..core.shapes import broadcast_shapes
from ..numerics.derivatives import implicit
from ..numerics.roots import bisect, find
from .in_support import contains, feasible_point, log_prob_everywhere, support_ends
from .special import CDFS, QUANTILES, Form

_CHUNK = 1024  # the number of values per chunk of a sum over the support
_ROUGH = 1e-3  # the tolerance of the first search, from which two Newton steps suffice
_STRIDES = 32  # the largest number of steps across a quantile, each eight times as long as the one before


@dispatched
def cdf(d: Distribution, value: Tensor, support: Any = None) -> Tensor:
    """Computes P(Y <= value) elementwise, of shape (*sample, *batch), for a univariate family or its ``Independent``.

    Uses a closed form if there is one, else the family's own method, else, for discrete families, the sum of the mass
    up to the value, which costs O(value). ``cdf.register`` registers a function with these arguments for a class. The
    result is 0 below the support and 1 above it, regardless of the validation setting of d. Left tails have a small
    relative error, except under decreasing transforms. The result is differentiable with respect to the parameters and,
    for continuous families, the value.

    Args:
        d: the distribution.
        value: (*sample, *batch).
        support: a replacement for the support of d.

    Raises:
        NotImplementedError: for vector families, and for families without a cdf such as VonMises, which is circular.
        ConvergenceError: if the continued fraction of a Student or beta distribution does not converge.

    Example:
        >>> cdf(dist.StudentT(3.0), torch.tensor([0.0, 3.1824]))
        tensor([0.5000, 0.9750])
        >>> cdf(dist.Poisson(2.0), torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.0000, 0.1353, 0.4060])
    """
    d = univariate(d)
    support = _support(d) if support is None else support
    if support.is_discrete:  # the derivative by the value is 0, but torch does not implement it
        value = value.detach().floor() if value.is_floating_point() else value
    try:
        inside, inner = contains(support, value), feasible_point(support, value)
    except NotImplementedError:  # a support without a known element
        raise _no_cdf(d) from None
    result = _cdf_inside(d, torch.where(inside, value, inner))
    above = (value > inner) | (value == torch.inf)
    outside = torch.where(value.isnan(), torch.nan, above.to(result.dtype))
    return torch.where(inside, result, outside)


@cdf.register(Independent)
def _(d: Any, value: Tensor, support: Any = None) -> Tensor:
    return cdf(d.base_dist, value, support)


@cdf.register(MixtureSameFamily)  # the union of the supports may have a gap
def _(d: Any, value: Tensor, support: Any = None) -> Tensor:
    return _average(d, cdf, value)


def probability_integral(d: Distribution, value: Tensor, v: Tensor | None = None) -> Tensor:
    """Computes the probability integral transform, of shape (*sample, *batch), uniform on (0, 1) if d is the true law.

    It is F(value) for a continuous family. For a discrete family it is the randomised transform
    F(value - 1) + v p(value) with v uniform on (0, 1).

    Args:
        d: a distribution that :func:`cdf` accepts.
        value: (*sample, *batch).
        v: uniform numbers of the shape of the result, for discrete families; drawn if not given.

    Reference: Smith (1985), "Diagnostic checks of non-standard time series models".

    Example:
        >>> y, v = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
        >>> probability_integral(dist.Bernoulli(0.25), y, v)
        tensor([0.3750, 0.8750])
    """
    d = univariate(d)
    if not _support(d).is_discrete:
        return cdf(d, value)
    below, mass = cdf(d, value - 1), _density(d, value)
    v = torch.rand(mass.shape, dtype=mass.dtype, device=mass.device) if v is None else v
    return below + v * mass


def icdf(d: Distribution, u: Tensor) -> Tensor:
    """Computes the smallest value (*sample, *batch) whose cdf is at least u in [0, 1], for the families of :func:`cdf`.

    Uses a closed form if there is one, else a search in float64. The search is exact up to rounding of the cdf: its
    result has a cdf of at least u, and a number with a cdf below u lies next to it or within u eps / density. It takes
    about 20 evaluations of the cdf and 15 of the density, up to 75 of each for narrow peaks far from 0 and for extreme
    u, and for counts about two evaluations of the cdf per bit of the value. The result has gradients of any order with
    respect to u and the tensors of d, by implicit differentiation after a search.

    Raises:
        NotImplementedError: as for :func:`cdf`.
        ValueError: if u is outside [0, 1].
        ConvergenceError: if the cdf does not reach u, for instance if parameters are NaN.

    Example:
        >>> icdf(dist.StudentT(3.0), torch.tensor(0.975))
        tensor(3.1824)
        >>> icdf(dist.Poisson(2.0), torch.tensor([0.1, 0.5, 0.9]))
        tensor([0., 2., 4.])
    """
    d = univariate(d)
    if not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(f"Expected u to lie in [0, 1]; got values from {u.min().item()} to {u.max().item()}.")
    return quantile(d, u)


def searched(d: Distribution, u: Tensor) -> Tensor:
    """Computes :func:`icdf` by a search, also if the family has its own method."""
    if _support(d).is_discrete:
        with torch.no_grad():
            return _search_counts(d, u)
    with torch.no_grad():
        y = _search_numbers(d, u)
    tensors = _tensors(d)
    kept = _with_tensors(d, tensors)  # a copy, since the caller may change d

    def below(y: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        moved = _with_tensors(kept, list(tensors))
        result, density = cdf(moved, y), _density(moved, y)
        return torch.where(density > 0, result, result.detach()), density.log()  # no gradient at the ends

    return implicit(below, y, u, *tensors)


def univariate(d: Distribution) -> Distribution:
    """Returns the univariate distribution within nested ``Independent`` distributions."""
    d = innermost(d)
    if d.event_shape:
        raise _no_cdf(d)
    return d


def _no_cdf(d: Distribution) -> NotImplementedError:
    return NotImplementedError(f"Expected a family with a cdf; got {type(d).__name__}.")


def _support(d: Distribution) -> Any:
    """Returns the support; for a mixture that of its components, since torch's own lacks ``is_discrete``."""
    return _support(univariate(d.component_distribution)) if isinstance(d, MixtureSameFamily) else d.support


def _inherits(d: Distribution, name: str) -> bool:
    """Whether the family lacks its own method of this name and inherits torch's general one."""
    method = getattr(type(d), name)
    return method is getattr(Distribution, name) or method is getattr(TransformedDistribution, name)


@dispatched
def _cdf_inside(d: Distribution, value: Tensor) -> Tensor:
    """Returns the cdf at values inside the support."""
    if not _inherits(d, "cdf"):
        try:
            return d.cdf(value)
        except NotImplementedError:
            raise _no_cdf(d) from None
    if not _support(d).is_discrete:
        raise _no_cdf(d)
    return _sum_of_mass(d, value)


@_cdf_inside.register(dist.ZeroInflatedDistribution)
def _(d: Any, value: Tensor) -> Tensor:
    return d.gate + (1 - d.gate) * cdf(d.base_dist, value)


@_cdf_inside.register(TransformedDistribution)
def _(d: TransformedDistribution, value: Tensor) -> Tensor:
    if not _inherits(d, "cdf"):
        return d.cdf(value)
    for transform in reversed(d.transforms):
        value = transform.inv(value)
    below = cdf(d.base_dist, value)
    return torch.where(_sign(d, value) > 0, below, 1 - below)


@dispatched
def quantile(d: Distribution, u: Tensor) -> Tensor:
    """Returns the smallest value whose cdf is at least u."""
    return searched(d, u) if _inherits(d, "icdf") else d.icdf(u)


@quantile.register(TransformedDistribution)
def _(d: TransformedDistribution, u: Tensor) -> Tensor:
    if not _inherits(d, "icdf"):
        return d.icdf(u)
    if _support(d).is_discrete:
        return searched(d, u)
    y = icdf(d.base_dist, torch.where(_sign(d, u) > 0, u, 1 - u))
    for transform in d.transforms:
        y = transform(y)
    return y


def _in_double(form: Form) -> Form:
    return lambda d, y: form(d, y.double()).to(y.dtype) if y.is_floating_point() else form(d, y)


for _family, _form in CDFS.items():
    _cdf_inside.register(_family, _in_double(_form))
    quantile.register(_family, QUANTILES.get(_family, searched))


def _sign(d: TransformedDistribution, like: Tensor) -> Tensor:
    """Returns 1 if the composed transforms increase and -1 if they decrease."""
    sign = like.new_ones(())
    for transform in d.transforms:
        try:
            sign = sign * transform.sign
        except NotImplementedError:
            raise _no_cdf(d) from None
    return sign


def _average(d: MixtureSameFamily, quantity: Callable[..., Tensor], value: Tensor) -> Tensor:
    """Returns the average sum_k w_k quantity_k(value) over the components of a mixture."""
    return (d.mixture_distribution.probs * quantity(d.component_distribution, value.unsqueeze(-1))).sum(-1)


def _density(d: Distribution, value: Tensor) -> Tensor:
    """Returns the density or mass, 0 outside the support."""
    if isinstance(d, MixtureSameFamily):
        return _average(d, _density, value)
    return log_prob_everywhere(d, value).exp()


def _enumerated(d: Distribution, dims: int) -> tuple[Tensor, Tensor] | None:
    """Returns the values (V, 1, ...) of a finite support, with at least ``dims`` dims of 1, and their mass; or None."""
    if not d.has_enumerate_support:
        return None
    try:
        values = d.enumerate_support(expand=False)
    except NotImplementedError:  # supports of different sizes in one batch
        return None
    values = values.reshape(-1, *[1] * max(dims, len(d.batch_shape)))
    return values, d.log_prob(values).exp()


def _ends(d: Distribution, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the smallest lower and the largest upper bound of the support."""
    low, high = support_ends(_support(d), like)
    while isinstance(d, MixtureSameFamily):
        low, high = low.amin(-1) if low.dim() else low, high.amax(-1) if high.dim() else high
        d = d.component_distribution
    if _support(d).is_discrete and not bool(low.isfinite().all()):
        raise _no_cdf(d)
    return low, high


def _sum_of_mass(d: Distribution, value: Tensor) -> Tensor:
    """Returns the mass of all support values up to the given one, summed in chunks."""
    finite = _enumerated(d, value.dim())
    if finite is not None:
        return torch.where(finite[0] <= value, finite[1], 0).sum(0)
    shape = torch.broadcast_shapes(value.shape, d.batch_shape)
    total: Any = 0
    last = int(value.max()) if value.numel() else -1
    for first in range(int(_ends(d, value)[0].min()), last + 1, _CHUNK):
        counts = torch.arange(first, min(first + _CHUNK, last + 1), dtype=value.dtype, device=value.device)
        counts = counts.reshape(-1, *[1] * len(shape))
        total = total + torch.where(counts <= value, log_prob_everywhere(d, counts).exp(), 0).sum(0)
    return total if isinstance(total, Tensor) else value.new_zeros(shape)


def _search_counts(d: Distribution, u: Tensor) -> Tensor:
    """Returns the smallest count whose cdf is at least u, from a table or by doubling and bisection."""
    finite = _enumerated(d, u.dim())
    if finite is not None:
        index = (finite[1].cumsum(0) < u).sum(0)
        return finite[0].flatten()[index.clamp(max=len(finite[0]) - 1)]  # the sum may round to just below 1
    shape = torch.broadcast_shapes(u.shape, d.batch_shape)
    low, top = _ends(d, u)
    low = low.expand(shape) - 1  # below the support
    step = u.new_ones(shape)
    short = torch.ones(shape, dtype=torch.bool, device=u.device)
    while bool(short.any()):
        short = (cdf(d, low + step) < u) & (low + step < top)
        step = torch.where(short, 2 * step, step)
    halvings = int(step.max()).bit_length() if step.numel() else 0
    found = bisect(lambda value: cdf(d, value) >= u, low, low + step, halvings)  # the cdf rounds values down
    return torch.minimum(found.floor(), top)


def _search_numbers(d: Distribution, u: Tensor) -> Tensor:
    """Returns the smallest number whose cdf is at least u, rounded from float64.

    A first search matches the log-odds of the cdf, in a transformed variable in which they are nearly linear for most
    families; :func:`_smallest` refines its result.
    """
    dtype, u = u.dtype, u.double().expand(broadcast_shapes(u.shape, d.batch_shape))
    low, high = (end.expand(u.shape) for end in _ends(d, u))
    inner = torch.where((u > 0) & (u < 1), u, 0.5)
    log_above = torch.log1p(-inner)

    def log_odds(z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (1 - u) times the difference of the log-odds of cdf and u, and its log-derivative.

        It has the sign of cdf - u. The factor makes it the error of the cdf relative to u near the root.
        """
        value, log_slope = _from_real_line(z, low, high)
        below, density = cdf(d, value), _density(d, value)
        above = 1 - below
        gap = torch.log(below / inner) - torch.log(above / (1 - inner))
        return gap * (1 - inner), torch.log(density / (below * above)) + log_slope + log_above

    # a lower bound selects the bracketed search, since plateaus of the cdf mislead plain Newton steps
    z = find(log_odds, torch.zeros_like(u), low=torch.full_like(u, -1e3), tol=_ROUGH)
    found = _smallest(d, inner, _from_real_line(z, low, high)[0], low, high)
    return torch.where(u <= 0, low, torch.where(u >= 1, high, found)).to(dtype)


def _smallest(d: Distribution, u: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns the smallest number whose cdf is at least u, starting from a number x nearby.

    It takes two Newton steps, then growing steps to a number on the other side of u, and then bisects until both
    numbers are neighbours or the cdf cannot separate them. If no number on the other side is found because the cdf
    rounds to below u, the result is x.
    """
    info = torch.finfo(x.dtype)
    for _ in range(2):
        density = _density(d, x)
        moved = x + (u - cdf(d, x)) / density
        x = torch.where((moved > low) & (moved < high), moved, x)
    blur = torch.where(density > 0, info.eps * u / density, 0)
    short = cdf(d, x) < u
    near, step = x, 2 * blur + _spacing(x)
    for _ in range(_STRIDES):
        far = torch.where(short, x + step, x - step).clamp(-info.max, info.max)
        far = torch.minimum(torch.maximum(far, low), high)
        passed = (cdf(d, far) < u) != short
        if bool(passed.all()):
            break
        near, step = torch.where(passed, near, far), torch.where(passed, step, 8 * step)
    a, b = torch.where(short, near, far), torch.where(short, far, near)
    while bool((passed & (b - a > torch.maximum(blur / 2, _spacing(torch.maximum(a.abs(), b.abs()))))).any()):
        middle = a + (b - a) / 2
        less = cdf(d, middle) < u
        a, b = torch.where(less, middle, a), torch.where(less, b, middle)
    return torch.where(passed, b, x)


def _spacing(x: Tensor) -> Tensor:
    """Returns the distance from the absolute value of x to the next larger floating-point number."""
    size = x.abs()
    return torch.nextafter(size, torch.full_like(size, torch.inf)) - size


def _from_real_line(z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Maps real numbers to (low, high), exponentially near a finite end; returns the values and log-derivatives."""
    left, right = low.isfinite(), high.isfinite()
    share = torch.sigmoid(z)
    width = torch.where(left & right, high - low, 1)
    between = low + width * share, torch.log(width * share * torch.sigmoid(-z))
    above, below = (low + z.exp(), z), (high - (-z).exp(), -z)
    free = torch.sinh(z), z.abs() + torch.log1p(torch.exp(-2 * z.abs())) - log(2)
    value, log_slope = (
        torch.where(left, torch.where(right, b, a), torch.where(right, c, f))
        for a, b, c, f in zip(above, between, below, free, strict=True)
    )
    return value, log_slope


def _tensors(d: Distribution) -> list[Tensor]:
    """Returns the tensors of a distribution, in the order in which :func:`_with_tensors` replaces them."""
    found: list[Tensor] = []

    def find(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_leaves(find, d)
    return found


def _with_tensors(d: Distribution, tensors: list[Tensor]) -> Distribution:
    """Returns a copy of the distribution with other tensors."""
    values = iter(tensors)
    copy: Distribution = map_leaves(lambda t: next(values), d)
    return copy
