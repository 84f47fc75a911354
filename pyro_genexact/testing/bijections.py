"""Laws of heads of bijections.

``bijection_head`` checks the protocol. The other laws check the values of the bijection in float64 and float32, for phi and
the head's own parameters as given and multiplied by 10 and 100. A bijection of the interval from -pi to pi is treated as a
bijection of the circle, where increasing means once around.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from math import inf, pi, prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ..base import Head
from ..families.supports import innermost
from ..numerics.errors import ConvergenceError
from .helpers import (
    as_function,
    broken,
    close,
    each,
    each_matters,
    finite,
    gradients_of,
    like_of,
    no_error,
    noise_like,
    same,
    within,
)


def bijection_head(
    head: Head, sites: int = 4, seed: int = 0, tol: float = 1e-7, dtype: torch.dtype = torch.float64
) -> None:
    """Checks the protocol of a head of bijections.

    Shapes are right, phi = 0 is near the identity, the bijection is increasing and onto, log-derivatives are those of autograd,
    sites can be evaluated one by one, and each element of phi matters.

    Args:
        head: the head; its parameters or buffers, if there are any, should be in float64 and have the dtype of the inputs.
        sites: the number of sites S.
        seed: the seed of the inputs.
        tol: the tolerance, relative to 1 + |value|.
        dtype: the dtype of the inputs if the head has no parameters and buffers.

    Raises:
        AssertionError: if the law is broken.

    Example:
        >>> from pyro_genexact import heads
        >>> bijection_head(heads.RationalQuadraticSpline(bins=4))
    """
    like = like_of(head, dtype)
    phi = (0.7 * noise_like(like.new_empty(8, sites, head.num_params), seed)).requires_grad_()
    dims = len(head.site_shape)
    transform = head(phi)
    ends = _ends(transform.domain)
    x = _inside(ends, 2 * noise_like(like.new_empty(8, sites, *head.site_shape), seed + 1))
    y = transform(x)
    ladj = transform.log_abs_det_jacobian(x, y)
    same("head", "shape of y", tuple(y.shape), tuple(x.shape))
    same("head", "event dims", (transform.domain.event_dim, transform.codomain.event_dim), (dims, dims))
    same("head", "range", _ends(transform.codomain), ends)
    same("head", "shape of log|dy/dx|", tuple(ladj.shape), tuple(phi.shape[:2]))
    close("head", "inverse", x + _gap(transform.inv(y.clone()), x, ends), x, tol)
    identity = head(torch.zeros_like(phi))(x)
    if not _gap(identity, x, ends).abs().max() <= 0.5:
        broken("head", "near the identity at phi = 0", f"{identity.flatten()[0]:.3g} from {x.flatten()[0]:.3g}")
    for t in range(sites):
        part = head(phi[:, t : t + 1], t)
        xs, ys = x[:, t : t + 1], y[:, t : t + 1]
        close("head", f"site {t} alone", part(xs), ys, tol)
        close("head", f"site {t} alone, log|dy/dx|", part.log_abs_det_jacobian(xs, ys), ladj[:, t : t + 1], tol)
    size = prod(head.site_shape)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v).sum((0, 1)), x).reshape(size, 8, sites, -1)
    close("head", "log-derivative", ladj, torch.linalg.slogdet(jacobian.permute(1, 2, 0, 3))[1], tol)
    low, high = ends if ends[0] > -inf else (-10, 10)
    steps = torch.linspace(low, high, 202, device="cpu")[1:-1].to(like)
    found = transform(steps.reshape(-1, *[1] * x.dim()).expand(-1, *x.shape))
    rising = _gap(found[1:], found[:-1], ends)
    if not rising.min() > 0:
        broken("head", "increasing", f"a step of {rising.min():.3g}, which must be positive")
    for far in (1e4, -1e4) if ends == (-inf, inf) else ():
        target = torch.full_like(x, far)
        close("head", f"onto {far:g}", transform(transform.inv(target).clone()), target, tol)
    wide = torch.linspace(-4.9, 4.9, x.numel(), device="cpu").to(x)  # an element of phi may matter only for a part of x
    x = _inside(ends, wide.reshape(x.shape))
    y = transform(x)
    (grad,) = torch.autograd.grad(y.sum() + transform.log_abs_det_jacobian(x, y).sum(), phi)
    each_matters(grad, "values and log-derivatives")


def monotonicity(head: Head, seed: int = 0, tol: float = 8.0) -> None:
    """Checks that the bijection never decreases and that log|dy/dx| is finite, on a grid to ±1e8.

    Phi and parameters are multiplied by 1, 10 and 100.

    Args:
        head: as in :func:`bijection_head`.
        seed: the seed of phi.
        tol: the size of a decrease that is allowed, in units of rounding errors of 1 + |y| + |y at 0|.
    """
    for case, variant, phi in _variants(head, (1, 10, 100), seed):
        transform = variant(phi)
        ends = _ends(transform.domain)
        x = _everywhere(ends, phi, head)
        with torch.no_grad():
            y = transform(x)
            ladj = transform.log_abs_det_jacobian(x, y)
        finite("monotonicity", f"{case}, y", y, at=x)
        finite("monotonicity", f"{case}, log|dy/dx|", ladj, at=x.reshape(*ladj.shape, -1))
        down = _gap(y[:-1], y[1:], ends) > tol * torch.finfo(y.dtype).eps * (1 + y[1:].abs() + y[len(y) // 2].abs())
        each("monotonicity", f"{case}, y", y[1:], ~down, "less than just before", at=x[1:])


def round_trips(head: Head, seed: int = 0, tol: float = 1e-9, single: float = 1e-4) -> None:
    """Checks the round trips y -> x -> y and x -> y -> x at scales from 1e-8 to 1e6, which also excludes clamping.

    Phi and parameters are multiplied by 0, 1 and 10. The tolerances are ``tol`` (1 + |y|) plus the effect of rounding x for
    the first, and ``tol`` (1 + |x| + |y|) max(1, 1 / slope) for the second.

    Args:
        head: as in :func:`bijection_head`.
        seed: the seed of phi.
        tol: the tolerance in float64.
        single: the tolerance in float32.
    """
    for case, variant, phi in _variants(head, (0, 1, 10), seed):
        tol_here = tol if phi.dtype == torch.float64 else single
        shape = (-1, *[1] * (2 + len(head.site_shape)))
        event = (-1, *phi.shape[:2], *head.site_shape)
        ends = _ends(variant(phi).domain)
        y = _scales(ends, phi).reshape(shape).expand(event)
        with no_error("round trips", case, ConvergenceError):
            x = _apart(variant(phi).inv, y)
            again, slope = _with_slope(variant(phi), x)
            bound = tol_here * (1 + y.abs()) + 4 * torch.finfo(y.dtype).eps * (1 + x.abs()) * slope
            within("round trips", f"{case}, y -> x -> y", y + _gap(again, y, ends), y, bound)
            x = _scales(ends, phi).reshape(shape).expand(event)
            y, slope = _with_slope(variant(phi), x)
            bound = tol_here * (1 + x.abs() + y.abs()) * (1 / slope).clamp(min=1)
            back = x + _gap(_apart(variant(phi).inv, y), x, ends)
            within("round trips", f"{case}, x -> y -> x", back, x, bound)


def slopes(head: Head, seed: int = 0, tol: float = 1e-6) -> None:
    """Checks that log|dy/dx| is right and that the slope is positive, by autograd and by finite differences, in float64.

    Phi and parameters are multiplied by 1 and 10. Autograd runs on a grid to ±1e8, central differences near 0 and at some x
    to ±1e6, since custom gradients may be wrong too. For vectors, the slope is the determinant.

    Args:
        head: as in :func:`bijection_head`.
        seed: the seed of phi and x.
        tol: the tolerance of log|dy/dx| by autograd, and of the slope by differences, in addition to rounding errors.
    """
    size = prod(head.site_shape)
    for case, variant, phi in _variants(head, (1, 10), seed, (torch.float64,)):
        transform = variant(phi)
        ends = _ends(transform.domain)
        x = _everywhere(ends, phi, head)
        claimed, sign, found = _slope(transform, x, size)
        each("slopes", f"{case}, sign by autograd", sign, sign > 0, "not 1", at=x.reshape(*sign.shape, size))
        within("slopes", f"{case}, log by autograd", found, claimed, tol)
        x = _inside(ends, 2 * noise_like(phi.new_empty(12, *phi.shape[:2], *head.site_shape), seed + 1))
        if ends == (-inf, inf):
            x[-4:] = x[-4:].sign() * torch.tensor([1e2, 1e3, 1e4, 1e6]).to(x).reshape(-1, *[1] * (x.dim() - 1))
        with torch.no_grad():
            claimed = transform.log_abs_det_jacobian(x, transform(x)).exp()
            found, rounding = _difference(transform, x, claimed.shape, size)
        within("slopes", case, found, claimed, tol * claimed + (rounding if size == 1 else tol))


def precision(head: Head, seed: int = 0, tol: float = 1e-5) -> None:
    """Checks that y and log|dy/dx| in float32 agree with a float64 copy of the head, on a grid to ±1e8.

    Phi and parameters are multiplied by 1 and 10.

    Args:
        head: as in :func:`bijection_head`.
        seed: the seed of phi.
        tol: the tolerance of log|dy/dx|, and of y relative to 1 + |y| + slope |x|; 100 times larger for the factor 10.
    """
    for factor in (1, 10):
        for case, variant, phi in _variants(head, (factor,), seed, (torch.float32,)):
            transform, exact = variant(phi), copy.deepcopy(variant).double()(phi.double())
            ends, bound = _ends(transform.domain), tol * factor**2
            x = _everywhere(ends, phi, head)
            with torch.no_grad():
                y, truth = transform(x), exact(x.double())
                ladj = transform.log_abs_det_jacobian(x, y).double()
                expected = exact.log_abs_det_jacobian(x.double(), truth)
            within("precision", f"{case}, log|dy/dx|", ladj, expected, bound)
            slope = expected.exp().reshape(*expected.shape, *[1] * len(head.site_shape))
            near = truth + _gap(y.double(), truth, ends)
            within("precision", f"{case}, y", near, truth, bound * (1 + truth.abs() + slope * x.abs()))


def differentiability(head: Head, seed: int = 0) -> None:
    """Checks first and second derivatives of both directions in the argument, phi and the head's own parameters.

    ``gradcheck`` and ``gradgradcheck`` of torch run on value and log-derivative in float64, for x within ±5, and for x to
    ±100 with phi multiplied by 1 and 10.
    """
    for where, values in (("", _near(head, seed, 3)), (", wide", _wide(head, seed))):
        names, inputs = _leaves(head, *values)
        for name in ("t", "t.inv"):
            for check in (gradcheck, gradgradcheck):
                case = f"{check.__name__} of {name}{where}"
                with no_error("differentiability", case, RuntimeError, AssertionError):  # includes ConvergenceError
                    check(as_function(head, names, name == "t"), inputs, fast_mode=True)


def learning(head: Head, seed: int = 0, tol: float = 1e-9) -> None:
    """Checks that phi and all parameters of the head have gradients in both directions, which are the same in train and eval.

    Args:
        head: as in :func:`bijection_head`.
        seed: the seed of the inputs.
        tol: the tolerance between train and eval mode, relative to 1 + |value|.
    """
    pairs = zip(_near(head, seed, 32), _wide(head, seed), strict=True)
    names, inputs = _leaves(head, *(torch.cat(pair) for pair in pairs))
    for name in ("t", "t.inv"):
        found: list[list[Tensor]] = []
        for training in (True, False):
            variant = copy.deepcopy(head).train(training)
            y, ladj = as_function(variant, names, name == "t")(*inputs)
            total = y.sin().sum() + ladj.square().sum()
            mode = f"{name}, {'train' if training else 'eval'}"
            grads = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
            for label, grad in zip(("the argument", "phi", *names), grads, strict=True):
                if grad is None or not grad.abs().max() > 0 or not grad.isfinite().all():
                    got = "none" if grad is None else f"{grad.abs().max():.3g}"
                    broken("learning", f"gradient of {label}, {mode}", f"{got}, which must be finite and not 0")
            with no_error("learning", f"second derivative, {mode}", RuntimeError):
                second = gradients_of(sum(g.sin().sum() for g in grads), inputs)  # type: ignore[arg-type,misc]
            each_matters(grads[1], f"{mode}, values and log-derivatives")
            found.append([*grads, *second])
        for i, (one, other) in enumerate(zip(*found, strict=True)):
            order, which = divmod(i, len(inputs))
            where = f"derivative {order + 1} by {('the argument', 'phi', *names)[which]}, {name}, eval as train"
            close("learning", where, other, one, tol)


def _variants(
    head: Head, factors: Sequence[float], seed: int, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32)
) -> Iterator[tuple[str, Head, Tensor]]:
    """Yields cases: copies of the head in each dtype with multiplied parameters, and multiplied phi (2, 1, P)."""
    for factor in factors:
        for dtype in dtypes:
            variant = copy.deepcopy(head).to(dtype)
            like = like_of(variant, dtype)
            phi = factor * 0.7 * noise_like(torch.empty(2, 1, head.num_params, dtype=torch.float64), seed).to(like)
            with torch.no_grad():
                for p in variant.parameters():
                    p.mul_(factor if factor else 1)
            yield f"phi times {factor}, {dtype}", variant, phi


def _ends(constraint: Any) -> tuple[float, float]:
    constraint = innermost(constraint)
    return float(getattr(constraint, "lower_bound", -inf)), float(getattr(constraint, "upper_bound", inf))


def _gap(a: Tensor, b: Tensor, ends: tuple[float, float]) -> Tensor:
    """Returns a - b; on the circle (an interval from -pi to pi), the shorter of the two differences."""
    gap = a - b
    return gap - 2 * pi * (gap / (2 * pi)).round() if ends == (-pi, pi) else gap


def _inside(ends: tuple[float, float], x: Tensor) -> Tensor:
    """Maps real numbers into the interval between the ends."""
    low, high = ends
    return x if low == -inf else low + (high - low) * (0.01 + 0.98 * torch.sigmoid(x))


def _grid(ends: tuple[float, float], like: Tensor) -> Tensor:
    """Returns an ascending grid: a fine one between finite ends, otherwise fine around 0 and geometric to ±1e8."""
    low, high = ends
    if low > -inf:
        margin = 4 * torch.finfo(like.dtype).eps * max(abs(low), abs(high))
        return torch.linspace(low + margin, high - margin, 4000, dtype=torch.float64, device="cpu").to(like)
    fine = torch.linspace(-12, 12, 500, dtype=torch.float64, device="cpu")
    wide = torch.linspace(-8, 8, 121, dtype=torch.float64, device="cpu")
    wide = wide.sign() * 10 ** wide.abs()
    return torch.cat([fine, wide, torch.zeros(1, dtype=torch.float64, device="cpu")]).to(like).unique()


def _scales(ends: tuple[float, float], like: Tensor) -> Tensor:
    """Returns values of each order of magnitude and both signs; between finite ends, of distances from both ends."""
    low, high = ends
    sizes = 10 ** torch.arange(-8, 7, dtype=torch.float64, device="cpu")
    values = torch.cat([-sizes, sizes, torch.tensor([0.0, 0.3, -2.7, pi], dtype=torch.float64, device="cpu")])
    if low > -inf:
        inner = 0.45 * (high - low) * sizes[sizes <= 1]
        if like.dtype == torch.float32:
            inner = inner[2:]
        values = torch.cat([low + inner, high - inner])
    return values.to(like)


def _everywhere(ends: tuple[float, float], phi: Tensor, head: Head) -> Tensor:
    """Returns the grid (N, *batch, *site_shape) for phi (*batch, P)."""
    grid = _grid(ends, phi).reshape(-1, *[1] * (phi.dim() - 1 + len(head.site_shape)))
    return grid.expand(-1, *phi.shape[:-1], *head.site_shape)


def _slope(transform: Any, x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log|dy/dx| of the transform, and the sign and log of the determinant by autograd."""
    x = x.detach().clone().requires_grad_()
    y = transform(x)
    claimed = transform.log_abs_det_jacobian(x, y).detach()
    parts = y.reshape(*claimed.shape, size).unbind(-1)
    rows = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0].reshape(*claimed.shape, size) for part in parts]
    return claimed, *torch.linalg.slogdet(torch.stack(rows, -2))


def _difference(transform: Any, x: Tensor, batch: torch.Size, size: int) -> tuple[Tensor, Tensor]:
    """Returns |dy/dx| by central differences of fourth order, and a bound of its rounding error."""
    ends, step = _ends(transform.domain), 1e-5 * (1 + x.abs())
    columns: list[Tensor] = []
    rounding = x.new_zeros(batch)
    for direction in torch.eye(size, device="cpu").to(x).reshape(size, *x.shape[len(batch) :]):
        near = [transform(x + k * step * direction).reshape(*batch, size) for k in (1, -1, 2, -2)]
        width = step.reshape(*batch, size)[..., len(columns), None]
        columns.append((8 * _gap(near[0], near[1], ends) - _gap(near[2], near[3], ends)) / (12 * width))
        rounding += (1 + near[0].abs().amax(-1)) / width[..., 0]
    return torch.linalg.det(torch.stack(columns, -1)).abs(), rounding * 16 * torch.finfo(x.dtype).eps


def _apart(transform: Any, value: Tensor) -> Tensor:
    with torch.no_grad():
        return transform(value.clone()).detach()


def _with_slope(transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y and |dy/dx| by autograd, independently of the transform's log-derivative."""
    x = x.detach().clone().requires_grad_()
    y = transform(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope.abs()


def _near(head: Head, seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Returns arguments (rows, 2, ...) within ±5, and phi (rows, 2, P)."""
    like = like_of(head, torch.float64)
    phi = 0.7 * noise_like(like.new_empty(rows, 2, head.num_params), seed)
    x = torch.linspace(-4.9, 4.8, 2 * rows * prod(head.site_shape)).to(like).reshape(rows, 2, *head.site_shape)
    return _inside(_ends(head(phi).domain), x), phi


def _wide(head: Head, seed: int) -> tuple[Tensor, Tensor]:
    """Returns arguments to ±100 and phi, as :func:`_near`: three rows, and the same rows with 10 times their phi."""
    phi = _near(head, seed, 3)[1]
    x = torch.tensor([-100.0, 100, -8, 8, -1, 1]).to(phi).reshape(3, 2, *[1] * len(head.site_shape))
    x = _inside(_ends(head(phi).domain), x.expand(3, 2, *head.site_shape))
    return torch.cat([x, x]), torch.cat([phi, 10 * phi])


def _leaves(head: Head, x: Tensor, phi: Tensor) -> tuple[list[str], list[Tensor]]:
    """Returns the names of the head's parameters, and the argument, phi and parameters as leaves."""
    names = [name for name, p in head.named_parameters() if p.requires_grad]
    own = [p for p in head.parameters() if p.requires_grad]
    return names, [v.detach().clone().requires_grad_() for v in (x, phi, *own)]
