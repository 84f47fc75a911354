"""FixedPoint, the options of a parallel solve of a sequential computation, and the iteration itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_numbers, check_sizes
from .errors import ConvergenceError, worst_of

_EPS = 8  # the default tolerance in multiples of the machine epsilon


@dataclass(frozen=True)
class FixedPoint:
    """Options of ``solver="fixed_point"``, which computes the sequential direction by passes over many sites at once.

    The sequential direction solves y_t = f(phi_t(y_{<t}), u_t) for t = 1, ..., T, at fixed noise u. A pass evaluates
    all right-hand sides in parallel, at the values of the pass before (Jacobi iteration). Each pass makes at least one
    more site exact, so that T passes are always enough, except for rounding. Fewer are needed if sites depend weakly on
    those before. With ``block``, blocks of sites are solved one after the other
    (Gauss-Seidel), and finished blocks are not re-encoded; ``block=1`` is the loop over sites. Under ``torch.func`` and
    on meta tensors, values cannot be compared, and the loop over sites is used.

    The iteration ends when a pass changes nothing: values of discrete families must be equal, and real values may differ
    by ``tol (1 + |y|)``. The error of the result is this change, amplified by the sensitivity of later sites to earlier
    ones. The loop over sites amplifies its rounding errors in the same way.

    The loop over sites computes the result if as many passes as sites do not settle, for example with dropout or if
    searched inverses are rounded differently in each pass. The same holds if a search fails at the history of an early
    pass, or if a real value is NaN or its square overflows. With ``max_passes``, the first two cases raise a
    :class:`ConvergenceError` instead, with the row and site of the largest change. Parameters of NaN raise it for
    discrete families and heads with a family per site, because a discrete value cannot be NaN.

    Cost: each pass is one parallel pass of the conditioner and one wait for the device to compare the values. Families
    without a closed-form quantile wait more often. With blocks, a pass also copies the state of the conditioner, and the
    conditioner reads each finished block once more. One more wait at the end tests for NaN and overflow.

    Args:
        block: the number of sites of a block; None for all sites.
        tol: the tolerance of real values, by default 8 eps of the model's dtype (1e-6 in float32, 1.8e-15 in float64).
        max_passes: the largest number of passes per block, and of the gradient; more raise a ConvergenceError. By
            default it is the number of sites.

    Raises:
        TypeError: if ``tol`` is not a number.
        ValueError: if ``block`` or ``max_passes`` is not a positive integer, or ``tol`` is negative.

    References: Song, Meng, Liao, Ermon, "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving",
    ICML 2021; Wiggers, Hoogeboom, "Predictive Sampling with Forecasting Autoregressive Models", ICML 2020.

    Example:
        >>> import torch
        >>> import pyro_genexact as gx
        >>> flow = gx.flows.maf(6)
        >>> d = flow(solver=gx.numerics.FixedPoint(block=3))
        >>> d.sample((5,)).shape, max(d.passes) <= 6
        (torch.Size([5, 6]), True)
    """

    block: int | None = None
    tol: float | None = None
    max_passes: int | None = None

    def __post_init__(self) -> None:
        sizes = {"block": self.block, "max_passes": self.max_passes}
        check_sizes(1, **{name: size for name, size in sizes.items() if size is not None})  # type: ignore[arg-type]
        if self.tol is not None:
            check_numbers(tol=self.tol)
        if self.tol is not None and not self.tol >= 0:
            raise ValueError(f"Expected tol >= 0; got {self.tol}.")

    @classmethod
    def of(cls, solver: Any) -> FixedPoint | None:
        """Returns the options that the argument ``solver`` stands for, or None for the loop over sites.

        Raises:
            ValueError: if ``solver`` is not None, "sequential", "fixed_point" or a FixedPoint.
        """
        if isinstance(solver, cls) or solver is None:
            return solver
        if isinstance(solver, str) and solver in ("sequential", "fixed_point"):
            return cls() if solver == "fixed_point" else None
        raise ValueError(f'Expected solver to be None, "sequential", "fixed_point" or a FixedPoint; got {solver!r}.')

    def tolerance(self, *tensors: Tensor) -> float:
        """Returns ``tol`` or its default: 8 eps of float64 if all floating-point tensors are float64, else of float32."""
        if self.tol is not None:
            return self.tol
        double = all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())
        return _EPS * torch.finfo(torch.float64 if double else torch.float32).eps


Solver = FixedPoint | str | None
"""The argument ``solver``: None or "sequential" for the loop over sites, "fixed_point", or a :class:`FixedPoint`."""


def iterate(
    step: Callable[[Tensor], Tensor],
    y: Tensor,
    passes: int,
    tol: float,
    size: Callable[[Tensor], Any] = lambda y: 1 + y.abs(),
) -> tuple[Tensor, int]:
    """Repeats y = step(y) until it changes y by at most ``tol size(y)``; integers until they are equal.

    Cost: one wait for the device per pass.

    Args:
        step: the map.
        y: (B, S, ...) the start.
        passes: the largest number of passes.
        tol: the tolerance of real values; at 0 they must be equal.
        size: the scale of the tolerance; it broadcasts with y.

    Returns:
        The result of the last pass, and the number of passes.

    Raises:
        ConvergenceError: if all passes changed y by more. NaN in both of two passes counts as no change.

    Example:
        >>> y, passes = iterate(torch.cos, torch.zeros(3, 1), 100, tol=1e-6)
        >>> y[0], passes < 50
        (tensor([0.7391]), True)
    """
    for count in range(1, passes + 1):
        before, y = y, step(y)
        settled = before == y
        if tol and y.is_floating_point():
            settled = settled | ((y - before).abs() <= tol * size(y)) | (y.isnan() & before.isnan())
        if settled.all():
            return y, count
    raise _diverged(y, before, ~settled, passes)


def passes_of(parts: Iterable[Any]) -> list[int] | None:
    """Returns the number of passes of the last parallel solve of each transform that has one, or None if none has."""
    found = [getattr(part, "passes", None) for part in parts]
    return [
        n for passes in found if passes is not None for n in (passes if isinstance(passes, list) else [passes])
    ] or None


def _diverged(y: Tensor, before: Tensor, bad: Tensor, passes: int) -> ConvergenceError:
    index, residual = worst_of(bad, (y - before).abs().double())
    pair = before[index].item(), y[index].item()
    return ConvergenceError(
        f"Expected a fixed point; got values {pair[0]:.8g} and {pair[1]:.8g} at (row, site) {index} in the last two of "
        f"{passes} passes.",
        residual,
        index,
        pair,
    )
