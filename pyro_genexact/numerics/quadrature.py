"""Numerical integration, elementwise over any batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.checks import check_sizes
from ..core.compiling import cached
from ..core.functional import visible
from .errors import ConvergenceError, worst_of


def integrate(
    f: Callable[..., Tensor],
    low: Tensor,
    high: Tensor,
    *,
    tol: float | None = None,
    panels: int = 1,
    doublings: int = 6,
) -> tuple[Tensor, Tensor]:
    r"""Integrates f from low to high, elementwise, and estimates the error.

    Uses Gauss-Kronrod quadrature with 7 and 15 nodes on each of ``panels`` panels of equal width. The number of panels
    is doubled, for all elements, until the estimated error is small enough. For smooth functions the estimate is
    usually far above the true error; it cannot detect features of f that lie entirely between the nodes. The integral
    is differentiable with respect to the bounds and to all tensors that f uses.

    Cost: 15 evaluations of f per panel and element, for every number of panels tried.

    Args:
        f: maps points (*batch, n) to values (*batch, n).
        low: (*batch) the lower bounds, finite.
        high: (*batch) the upper bounds, finite; may be smaller than ``low``.
        tol: the allowed error relative to the integral of \|f\|; by default 1e-12 in float64, 2e-6 in float32.
        panels: the initial number of panels.
        doublings: the largest number of doublings.

    Returns:
        The integral (*batch), and an estimate (*batch) of its error, including rounding, without gradient. Both are
        NaN if a bound is NaN. Under the transforms of ``torch.func``, and in compiled or exported code, only the initial
        number of panels is tried, and an integral is NaN if its error is too large.

    Raises:
        ConvergenceError: if the error is too large after the last doubling, or f is not finite.
        ValueError: if a bound is infinite, ``panels`` or ``tol`` is not positive, ``doublings`` is negative, or the
            values of f have another shape than the points.
        TypeError: if a bound is not a floating-point tensor.

    Reference: Piessens et al., "QUADPACK", Springer 1983 (rules and error estimate).

    Example:
        >>> import torch
        >>> value, error = integrate(torch.exp, torch.tensor(0.0), torch.tensor(1.0))
        >>> value
        tensor(1.7183)
    """
    check_sizes(1, panels=panels)
    check_sizes(0, doublings=doublings)
    for name, bound in (("low", low), ("high", high)):
        if not isinstance(bound, Tensor) or not bound.is_floating_point():
            got = getattr(bound, "dtype", type(bound).__name__)
            raise TypeError(f"Expected {name} to be a tensor of floating point numbers; got {got}.")
    if tol is not None and not tol > 0:
        raise ValueError(f"Expected tol > 0; got {tol}.")
    low, high = torch.broadcast_tensors(low, high)
    eps = torch.finfo(low.dtype).eps
    tol = max(1e-12, 16 * eps) if tol is None else tol
    nodes, kronrod, gauss = kronrod_rule(low.dtype, low.device)
    for k in range(doublings + 1):
        count = panels * 2**k
        half = (high - low).unsqueeze(-1) / (2 * count)
        middles = low.unsqueeze(-1) + half * (2 * torch.arange(count, dtype=low.dtype, device=low.device) + 1)
        points = middles.unsqueeze(-1) + half.unsqueeze(-1) * nodes
        points = points.flatten(-2)
        values = f(points)
        if values.shape != points.shape:
            raise ValueError(f"Expected f(x).shape == {tuple(points.shape)} (that of x); got {tuple(values.shape)}.")
        values = values.unflatten(-1, (count, len(nodes)))
        parts = (values * kronrod).sum(-1)
        with torch.no_grad():
            size = ((values.abs() * kronrod).sum(-1) * half.abs()).sum(-1)
            error = (_kronrod_error(values, parts, kronrod, gauss) * half.abs()).sum(-1) + 4 * eps * size
            bad = ~(error <= tol * size) & ~(low.isnan() | high.isnan())
        value = (parts * half).sum(-1)
        if not visible(bad):
            return value.where(~bad, torch.nan), error
        if not bad.any():
            return value, error
    if (low.isinf() | high.isinf()).any():
        raise ValueError("Expected finite bounds of the integral; got infinite ones.")
    index, worst = worst_of(bad, error / size)
    bounds = low[index].item(), high[index].item()
    raise ConvergenceError(
        f"Expected an integral with an error up to {tol:.3g} of its size; got {worst:.3g} at index {index}, from "
        f"{bounds[0]:.8g} to {bounds[1]:.8g}, with {count} panels.",
        worst,
        index,
        bounds,
    )


@cached
def kronrod_rule(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the Gauss-Kronrod rule on [-1, 1]: 15 nodes, Kronrod's weights, and Gauss's weights (zero at 8 nodes).

    Example:
        >>> import torch
        >>> nodes, kronrod, gauss = kronrod_rule(torch.float32, torch.device("cpu"))
        >>> nodes.shape, (gauss > 0).sum()
        (torch.Size([15]), tensor(7))
    """
    nodes = [0.991455371120812639206854697526329, 0.949107912342758524526189684047851,
             0.864864423359769072789712788640926, 0.741531185599394439863864773280788,
             0.586087235467691130294144691693013, 0.405845151377397166906606412076961,
             0.207784955007898467600689403773245, 0.0]  # fmt: skip
    kronrod = [0.022935322010529224963732008058970, 0.063092092629978553290700663189204,
               0.104790010322250183839876322541518, 0.140653259715525918745189590510238,
               0.169004726639267902826583426598550, 0.190350578064785409913256402421014,
               0.204432940075298892414161999234649, 0.209482141084727828012999174891714]  # fmt: skip
    gauss = [0.0, 0.129484966168869693270611432679082, 0.0, 0.279705391489276667901467771423780,
             0.0, 0.381830050505118944950369775488975, 0.0, 0.417959183673469387755102040816327]  # fmt: skip
    rows = [-v for v in nodes] + nodes[-2::-1], kronrod + kronrod[-2::-1], gauss + gauss[-2::-1]
    with torch.inference_mode(False):  # the cached tensors are also used under grad
        a, b, c = (torch.tensor(row, dtype=dtype, device=device) for row in rows)
    return a, b, c


def _kronrod_error(values: Tensor, parts: Tensor, kronrod: Tensor, gauss: Tensor) -> Tensor:
    """QUADPACK's estimate: the difference of the two rules, raised to the power 1.5 if it is small."""
    gap = (parts - (values * gauss).sum(-1)).abs()
    spread = ((values - parts.unsqueeze(-1) / 2).abs() * kronrod).sum(-1)
    scaled = (200 * gap / spread).clamp(max=1) ** 1.5 * spread
    return torch.where(spread > 0, scaled, gap)
