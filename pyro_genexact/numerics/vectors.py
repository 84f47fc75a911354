"""Roots of functions of vectors, from a guess that is close."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.functional import transformed
from .errors import ConvergenceError, worst_of

_STEPS, _HALVINGS = 50, 8


def refine(f: Callable[[Tensor], Tensor], y: Tensor, guess: Tensor) -> Tensor:
    r"""Solves f(x) = y for rows x by Newton's method from a close guess.

    A guess that f maps to y up to rounding is returned unchanged. Steps are halved until the residuals decrease. The
    result has no gradient: call this function under ``no_grad``, and use :func:`implicit` with ``event_dim=1`` to make
    the result differentiable. Under the transforms of ``torch.func`` no step is taken, and rows that need one are NaN.

    Cost: one evaluation of f, and per step two evaluations, D derivatives of f and the solution of a D x D linear
    system. A close guess needs one or two steps.

    Args:
        f: maps rows x (*batch, D) to rows (*batch, D), each row independently; differentiable.
        y: (*batch, D) the targets; for rows with NaN the guess is returned.
        guess: (*batch, D) the starting points.

    Returns:
        The rows x (*batch, D).

    Raises:
        ConvergenceError: if fifty steps reach neither \|f(x) - y\| <= 1000 eps (1 + \|y\|) nor a step within rounding.

    Example:
        >>> import torch
        >>> refine(lambda x: x**3, torch.tensor([[8.0, 27.0]]), torch.tensor([[1.9, 3.1]]))
        tensor([[2.0000, 3.0000]])
    """
    eps, x, residual = 1000 * torch.finfo(y.dtype).eps, guess, f(guess) - y
    for _ in range(_STEPS):
        far = ~(residual.abs() <= eps * (1 + y.abs())).all(-1, keepdim=True) & ~y.isnan().any(-1, keepdim=True)
        if transformed():
            return torch.where(far, torch.nan, x)
        if y.is_meta or not far.any():
            return x
        step = _newton_step(f, x, residual)
        rough = (residual.abs() <= eps**0.5 * (1 + y.abs())) & (step.abs() <= eps * (1 + x.abs()))
        if not (far & ~rough).any():
            return torch.where(far, x - step, x)
        at, x, residual = x, *_shortened(f, y, x, residual, step.where(far & step.isfinite().all(-1, keepdim=True), 0))
        if (at == x).all():
            break
    index, worst = worst_of(far.expand(y.shape), residual.abs())
    place = x[index].item()
    raise ConvergenceError(
        f"Expected Newton's method to lead from the guess to f(x) = y; got |f(x) - y| = {worst:.6g} at index {index}, for "
        f"y = {y[index].item():.8g} and x = {place:.8g}.",
        worst,
        index,
        (place, place),
    )


def _newton_step(f: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor) -> Tensor:
    """Returns J^{-1} residual, the Newton step to subtract from x; not finite if J is singular."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        columns = [column.sum() for column in f(at).unbind(-1)]
    rows = [torch.autograd.grad(column, at, retain_graph=True, materialize_grads=True)[0] for column in columns]
    return torch.linalg.solve_ex(torch.stack(rows, -2), residual.unsqueeze(-1))[0].squeeze(-1)


def _shortened(
    f: Callable[[Tensor], Tensor], y: Tensor, x: Tensor, residual: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """Subtracts the step from x, shortened so that residuals decrease; returns the new x and its residual.

    Each element of the step is halved, up to eight times, until its own residual decreases; to half its size if its
    sign changes, since a step across the root may end where f is flat. Elements are treated separately because most
    systems are triangular in an unknown order: the residual of an element that depends on others may grow while those
    converge.
    """
    bound, noise = residual.abs(), 1000 * torch.finfo(y.dtype).eps * (1 + y.abs())
    for _ in range(_HALVINGS):
        moved = x - step
        there = f(moved) - y
        falls = there.abs() < torch.where(there * residual < 0, bound / 2, bound)
        long = ~falls & ~(there.abs() <= noise) & (step != 0) & ~residual.isnan()
        if not long.any():
            break
        step = torch.where(long, step / 2, step)
    return moved, there
