"""Roots of functions of vectors, from a guess that is close."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ConvergenceError, worst_of

_STEPS = 12


def refine(f: Callable[[Tensor], Tensor], y: Tensor, guess: Tensor) -> Tensor:
    r"""Rows x with f(x) = y, by Newton's method from a guess: the guess itself where f maps it onto y up to rounding.

    As a constant, to be called under ``no_grad``; :func:`implicit` with ``event_dim=1`` makes it differentiable. Cost: one
    evaluation, and for each step another with D derivatives of f and the solution of a system of D equations.

    Args:
        f: maps rows x (\*batch, D) to rows (\*batch, D), each from its own alone; differentiable.
        y: (\*batch, D) the targets; rows with NaN are left as they are.
        guess: (\*batch, D).

    Raises:
        ConvergenceError: where twelve steps do not lead to |f(x) - y| <= 1000 eps (1 + |y|), nor to a step within rounding.

    Example:
        >>> refine(lambda x: x**3, torch.tensor([[8.0, 27.0]]), torch.tensor([[1.9, 3.1]]))
        tensor([[2.0000, 3.0000]])
    """
    eps, x = 1000 * torch.finfo(y.dtype).eps, guess
    for _ in range(_STEPS):
        residual = f(x) - y
        far = ~(residual.abs() <= eps * (1 + y.abs())).all(-1, keepdim=True) & ~y.isnan().any(-1, keepdim=True)
        if y.is_meta or not far.any():
            return x
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            columns = [column.sum() for column in f(at).unbind(-1)]
        rows = [torch.autograd.grad(column, at, retain_graph=True, materialize_grads=True)[0] for column in columns]
        step = torch.linalg.solve_ex(torch.stack(rows, -2), residual.unsqueeze(-1))[0].squeeze(-1)
        x = torch.where(far & step.isfinite().all(-1, keepdim=True), x - step, x)
        close = (residual.abs() <= eps**0.5 * (1 + y.abs())) & (step.abs() <= eps * (1 + x.abs()))
        if not (far & ~close).any():
            return x
    index, worst = worst_of(far.expand(y.shape), residual.abs())
    place = x[index].item()
    raise ConvergenceError(
        f"Expected Newton's method to lead from the guess to f(x) = y; got |f(x) - y| = {worst:.6g} at index {index}, for "
        f"y = {y[index].item():.8g} and x = {place:.8g}.",
        worst,
        index,
        (place, place),
    )
