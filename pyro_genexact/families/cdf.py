"""Cumulative distribution functions and their inverses, also of the families that torch leaves out."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from math import log
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, TransformedDistribution

from ..core.leaves import map_leaves
from ..core.shapes import broadcast_shapes
from ..numerics.derivatives import implicit
from ..numerics.roots import bisect, find
from .in_support import contains, feasible_point, log_prob_everywhere, support_ends
from .special import CDFS, QUANTILES, Form

_CHUNK = 1024  # values of a sum over the support made at once
_ROUGH = 1e-3  # the error of the cdf from which Newton's method needs two steps
_STRIDES = 32  # each eight times as long, to the other side of a quantile


@singledispatch
def cdf(d: Distribution, value: Tensor, support: Any = None) -> Tensor:
    """P(Y <= value) elementwise (*sample, *batch), for a univariate family or an ``Independent`` of such.

    Closed forms where there is one, else the family's own, else (discrete families) the sum of the mass up to the value,
    O(value); ``cdf.register`` takes a function of these arguments for a class. 0 below
    the support and 1 above it, whatever the validation of d. A left tail is accurate relative to its own size (not where
    a falling transform turns it round). Differentiable by the parameters and, for continuous families, by the value.

    Args:
        d: the distribution.
        value: (*sample, *batch).
        support: that of d, where the caller knows a static one.

    Raises:
        NotImplementedError: for a vector family, and for a family without a cdf, e.g. VonMises, whose values lie on a circle.
        ConvergenceError: where the continued fraction of Student's or the beta family has not converged.

    Example:
        >>> cdf(dist.StudentT(3.0), torch.tensor([0.0, 3.1824]))
        tensor([0.5000, 0.9750])
        >>> cdf(dist.Poisson(2.0), torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.0000, 0.1353, 0.4060])
    """
    d = _univariate(d)
    support = _support(d) if support is None else support
    if support.is_discrete:  # torch lacks derivatives by the value there, which are 0
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


@cdf.register(MixtureSameFamily)  # whose supports may leave a gap
def _(d: Any, value: Tensor, support: Any = None) -> Tensor:
    return _average(d, cdf, value)


def probability_integral(d: Distribution, value: Tensor, v: Tensor | None = None) -> Tensor:
    """The probability integral transform (*sample, *batch), uniform on (0, 1) where value was drawn from d.

    F(value) of a continuous family; of a discrete one the randomised F(value - 1) + v p(value), v uniform.

    Args:
        d: as for :func:`cdf`.
        value: (*sample, *batch).
        v: uniform numbers of the shape of the result, drawn when not given; used by discrete families only.

    Reference: Smith (1985), "Diagnostic checks of non-standard time series models".

    Example:
        >>> probability_integral(dist.Bernoulli(0.25), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor([0.3750, 0.8750])
    """
    d = _univariate(d)
    if not _support(d).is_discrete:
        return cdf(d, value)
    below, mass = cdf(d, value - 1), _density(d, value)
    v = torch.rand(mass.shape, dtype=mass.dtype, device=mass.device) if v is None else v
    return below + v * mass


def icdf(d: Distribution, u: Tensor) -> Tensor:
    """The smallest value (*sample, *batch) whose cdf is at least u, for the families of :func:`cdf`.

    A closed form where there is one, else a search, in float64 inside. Its result has a cdf of at least u, and a number
    whose cdf is below u is its neighbour, or as near as rounding of the cdf, u eps / density, lets one tell. Some 20
    evaluations of the cdf and 15 of the density; up to 75 of each for needles far from 0 and for extreme u; about two
    of the cdf for every bit of the value for counts.
    Gradients of any order by u and the tensors that d holds, implicit where the value was searched for.

    Raises:
        NotImplementedError: as :func:`cdf`.
        ValueError: for u outside of [0, 1].
        ConvergenceError: where the cdf does not reach u, as for NaN parameters.

    Example:
        >>> icdf(dist.StudentT(3.0), torch.tensor(0.975))
        tensor(3.1824)
        >>> icdf(dist.Poisson(2.0), torch.tensor([0.1, 0.5, 0.9]))
        tensor([0., 2., 4.])
    """
    d = _univariate(d)
    if not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(f"Expected u to lie in [0, 1]; got values from {u.min().item()} to {u.max().item()}.")
    return _quantile(d, u)


def _searched(d: Distribution, u: Tensor) -> Tensor:
    if _support(d).is_discrete:
        with torch.no_grad():
            return _search_counts(d, u)
    with torch.no_grad():
        y = _search_numbers(d, u)
    tensors = _tensors(d)
    kept = _with_tensors(d, tensors)  # whatever becomes of d

    def below(y: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        moved = _with_tensors(kept, list(tensors))
        result, density = cdf(moved, y), _density(moved, y)
        return torch.where(density > 0, result, result.detach()), density.log()  # the ends of the support stay

    return implicit(below, y, u, *tensors)


def _univariate(d: Distribution) -> Distribution:
    """The elementwise family within ``Independent``."""
    while isinstance(d, Independent):
        d = d.base_dist
    if d.event_shape:
        raise _no_cdf(d)
    return d


def _no_cdf(d: Distribution) -> NotImplementedError:
    return NotImplementedError(f"Expected a family with a cdf; got {type(d).__name__}.")


def _support(d: Distribution) -> Any:
    """That of the components for a mixture, which torch wraps so that it no longer tells whether it is discrete."""
    return _support(_univariate(d.component_distribution)) if isinstance(d, MixtureSameFamily) else d.support


def _inherits(d: Distribution, name: str) -> bool:
    """Whether the family has no method of its own, only one that torch raises from or that goes by the base."""
    method = getattr(type(d), name)
    return method is getattr(Distribution, name) or method is getattr(TransformedDistribution, name)


@singledispatch
def _cdf_inside(d: Distribution, value: Tensor) -> Tensor:
    """The cdf at values of the support."""
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


@singledispatch
def _quantile(d: Distribution, u: Tensor) -> Tensor:
    """The smallest value whose cdf is at least u."""
    return _searched(d, u) if _inherits(d, "icdf") else d.icdf(u)


@_quantile.register(TransformedDistribution)
def _(d: TransformedDistribution, u: Tensor) -> Tensor:
    if not _inherits(d, "icdf"):
        return d.icdf(u)
    if _support(d).is_discrete:
        return _searched(d, u)
    y = icdf(d.base_dist, torch.where(_sign(d, u) > 0, u, 1 - u))
    for transform in d.transforms:
        y = transform(y)
    return y


def _in_double(form: Form) -> Form:
    return lambda d, y: form(d, y.double()).to(y.dtype) if y.is_floating_point() else form(d, y)


for _family, _form in CDFS.items():
    _cdf_inside.register(_family, _in_double(_form))
    _quantile.register(_family, QUANTILES.get(_family, _searched))


def _sign(d: TransformedDistribution, like: Tensor) -> Tensor:
    """1 where the transforms rise, -1 where they fall."""
    sign = like.new_ones(())
    for transform in d.transforms:
        try:
            sign = sign * transform.sign
        except NotImplementedError:
            raise _no_cdf(d) from None
    return sign


def _average(d: MixtureSameFamily, quantity: Callable[..., Tensor], value: Tensor) -> Tensor:
    """sum_k w_k quantity_k(value)."""
    return (d.mixture_distribution.probs * quantity(d.component_distribution, value.unsqueeze(-1))).sum(-1)


def _density(d: Distribution, value: Tensor) -> Tensor:
    """The density or mass, 0 outside the support."""
    if isinstance(d, MixtureSameFamily):
        return _average(d, _density, value)
    return log_prob_everywhere(d, value).exp()


def _enumerated(d: Distribution, dims: int) -> tuple[Tensor, Tensor] | None:
    """The V values of a finite support and their mass (V, *batch), with dims to broadcast; None for another support."""
    if not d.has_enumerate_support:
        return None
    try:
        values = d.enumerate_support(expand=False)
    except NotImplementedError:  # of several sizes in one batch
        return None
    values = values.reshape(-1, *[1] * max(dims, len(d.batch_shape)))
    return values, d.log_prob(values).exp()


def _ends(d: Distribution, like: Tensor) -> tuple[Tensor, Tensor]:
    """The least lower and the greatest upper bound of the support."""
    low, high = support_ends(_support(d), like)
    while isinstance(d, MixtureSameFamily):
        low, high = low.amin(-1) if low.dim() else low, high.amax(-1) if high.dim() else high
        d = d.component_distribution
    if _support(d).is_discrete and not bool(low.isfinite().all()):
        raise _no_cdf(d)
    return low, high


def _sum_of_mass(d: Distribution, value: Tensor) -> Tensor:
    """The mass from the lower end of the support up to the value, a chunk of it at a time."""
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
    """The smallest count whose cdf is at least u: from a table, or by doubling and bisection."""
    finite = _enumerated(d, u.dim())
    if finite is not None:
        index = (finite[1].cumsum(0) < u).sum(0)
        return finite[0].flatten()[index.clamp(max=len(finite[0]) - 1)]  # a sum may end just below 1
    shape = torch.broadcast_shapes(u.shape, d.batch_shape)
    low, top = _ends(d, u)
    low = low.expand(shape) - 1  # cdf < u, or the lower end
    step = u.new_ones(shape)
    short = torch.ones(shape, dtype=torch.bool, device=u.device)
    while bool(short.any()):
        short = (cdf(d, low + step) < u) & (low + step < top)
        step = torch.where(short, 2 * step, step)
    halvings = int(step.max()).bit_length() if step.numel() else 0
    found = bisect(lambda value: cdf(d, value) >= u, low, low + step, halvings)  # the cdf is that of the count below
    return torch.minimum(found.floor(), top)


def _search_numbers(d: Distribution, u: Tensor) -> Tensor:
    """The smallest number whose cdf is at least u, rounded from float64.

    First roughly, by the log-odds of the cdf, of a number on a scale on which most tails are nearly straight.
    """
    dtype, u = u.dtype, u.double().expand(broadcast_shapes(u.shape, d.batch_shape))
    low, high = (end.expand(u.shape) for end in _ends(d, u))
    inner = torch.where((u > 0) & (u < 1), u, 0.5)
    log_above = torch.log1p(-inner)

    def log_odds(z: Tensor) -> tuple[Tensor, Tensor]:
        """Less those of u, of the very sign of cdf - u; by 1 - u, so that near 0 it is the cdf's error relative to u."""
        value, log_slope = _unfolded(z, low, high)
        below, density = cdf(d, value), _density(d, value)
        above = 1 - below
        gap = torch.log(below / inner) - torch.log(above / (1 - inner))
        return gap * (1 - inner), torch.log(density / (below * above)) + log_slope + log_above

    # with an end, since shoulders of the cdf mislead Newton's method without a bracket
    z = find(log_odds, torch.zeros_like(u), low=torch.full_like(u, -1e3), tol=_ROUGH)
    found = _smallest(d, inner, _unfolded(z, low, high)[0], low, high)
    return torch.where(u <= 0, low, torch.where(u >= 1, high, found)).to(dtype)


def _smallest(d: Distribution, u: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The smallest number whose cdf is at least u, from one nearby.

    By two steps of Newton's; then ever further, to a number on the other side; then by halves, until both are neighbours
    or rounding of the cdf no longer tells them apart. Where rounding keeps the cdf below u on all the way: where that began.
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
    """From x to the next larger number, in size."""
    size = x.abs()
    return torch.nextafter(size, torch.full_like(size, torch.inf)) - size


def _unfolded(z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A number between low and high for every real one, exponential near either, and the log of its derivative."""
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
    """Those that :func:`_with_tensors` replaces, in its order."""
    found: list[Tensor] = []

    def find(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_leaves(find, d)
    return found


def _with_tensors(d: Distribution, tensors: list[Tensor]) -> Distribution:
    values = iter(tensors)
    copy: Distribution = map_leaves(lambda t: next(values), d)
    return copy
