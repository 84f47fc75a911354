"""Roots of functions of vectors, from a guess that is close."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.functional import transformed
from .errors import ConvergenceError, worst_of

_STEPS, _HALVINGS = 50, 8


def refine(f: Callable[[Tensor], Tensor], y: Tensor, guess: Tensor) -> Tensor:
    r"""Rows x with f(x) = y, by Newton's method from a guess: the guess itself where f maps it onto y up to rounding.

    Steps are halved until residuals fall. As a constant, to be called under ``no_grad``; :func:`implicit` with
    ``event_dim=1`` makes it differentiable. Cost: one evaluation, and for each step two with D derivatives of f and the
    solution of a system of D equations; one or two steps from a guess that is close. Under a transform of torch.func no
    step is taken: rows that need one are NaN.

    Args:
        f: maps rows x (\*batch, D) to rows (\*batch, D), each from its own alone; differentiable.
        y: (\*batch, D) the targets; rows with NaN are left as they are.
        guess: (\*batch, D).

    Raises:
        ConvergenceError: where fifty steps do not lead to |f(x) - y| <= 1000 eps (1 + |y|), nor to a step within rounding.

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
    """By which x has to fall for the residual to vanish, if f were linear; not finite where it is flat."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        columns = [column.sum() for column in f(at).unbind(-1)]
    rows = [torch.autograd.grad(column, at, retain_graph=True, materialize_grads=True)[0] for column in columns]
    return torch.linalg.solve_ex(torch.stack(rows, -2), residual.unsqueeze(-1))[0].squeeze(-1)


def _shortened(
    f: Callable[[Tensor], Tensor], y: Tensor, x: Tensor, residual: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """x less the step, of which each element is halved until its residual falls, eight times at most; the residual there.

    To half, if its sign changes: a leap over the root may end where f is flat.

    By elements, since most systems are triangular, in an order not known: the residual of one that depends on others may
    well grow while those find their roots.
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
