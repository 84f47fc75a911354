"""Derivatives of roots by implicit differentiation, and of functions with respect to their argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..core.functional import at_hand, transformed

Increasing = Callable[..., Any]


def implicit(f: Increasing, x: Tensor, y: Tensor, *tensors: Tensor, event_dim: int = 0) -> Tensor:
    """Makes a known root x of f(x, *tensors) = y a differentiable function of y and the tensors.

        dx = J^{-1} (dy - sum_i df/dtheta_i dtheta_i),      J = df/dx

    For elementwise functions J is diagonal. With ``event_dim=1``, x and y are rows (*batch, D), and the J of each row
    is a matrix, which costs D derivatives of f. Derivatives are exact to any order, and to the third order under the
    transforms of ``torch.func``.

    Args:
        f: the function, as in :func:`root`; with ``event_dim=1`` it returns values only.
        x: (*batch) the root, a constant.
        y: the value of f at x; broadcasts with x.
        *tensors: the further arguments of f.
        event_dim: 0 for elementwise functions, 1 for functions of rows.

    Returns:
        A tensor with the value of x.

    Raises:
        ValueError: if the values of an elementwise f do not have the shape of x.

    Example:
        >>> import torch
        >>> y = torch.tensor(8.0, requires_grad=True)
        >>> x = implicit(lambda x: x**3, torch.tensor(2.0), y)
        >>> torch.autograd.grad(x, y)[0]
        tensor(0.0833)
    """
    if not torch.is_grad_enabled():
        return x
    if not transformed():
        return _Implicit.apply(f, event_dim, x, y, *tensors) if any(t.requires_grad for t in (y, *tensors)) else x
    constants = [t.detach() for t in tensors]  # each step with a constant slope adds one order of exact derivatives
    for _ in range(3):
        gap = y - value_of(f(x, *tensors))
        x = x + (_solved(f, x.detach(), constants, gap) if event_dim else gap / Sloped(f)(x.detach(), constants)[1])
    return x


class Sloped:
    """Evaluates f and its derivative with respect to x; by autograd if f returns values only."""

    def __init__(self, f: Increasing) -> None:
        self.f, self.alone = f, False

    def __call__(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if not self.alone:
            output = self.f(x, *tensors)
            if value_of(output).shape != x.shape:
                raise ValueError(
                    f"Expected f(x).shape == {tuple(x.shape)} (that of x); got {tuple(value_of(output).shape)}."
                )
            if isinstance(output, tuple):
                return output[0], output[1].exp()
            self.alone = True
        if transformed():
            value, pull = torch.func.vjp(lambda x: self.f(x, *tensors), x)[:2]
            return value, pull(torch.ones_like(value))[0]
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            value = self.f(x, *(t.clone() if t.is_inference() else t.detach() for t in tensors))
            (slope,) = torch.autograd.grad(value.sum(), x, materialize_grads=True)
        return value.detach(), slope


def value_of(output: Any) -> Tensor:
    """Returns the values of f from its output, which may be a pair of values and log-derivatives."""
    return output[0] if isinstance(output, tuple) else output


class _Implicit(Function):
    """Implements :func:`implicit`.

    The backward pass saves the function's own output as x, so it can be differentiated again, to any order.
    """

    @staticmethod
    def forward(ctx: Any, f: Increasing, event_dim: int, x: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.f, ctx.event_dim, ctx.shape = f, event_dim, y.shape
        x = x.clone()
        ctx.save_for_backward(x, *tensors)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if again else x.detach().requires_grad_()
            parts = [t.view_as(t) for t in tensors]  # new graph nodes, in case one tensor was computed from another
            output = ctx.f(x, *parts)
            rows = output.unbind(-1) if ctx.event_dim else [value_of(output)]
            sums = [row.sum() for row in rows]
        if isinstance(output, tuple):
            pull = grad / output[1].exp()
        else:
            by_x = [
                torch.autograd.grad(total, x, create_graph=again, retain_graph=True, materialize_grads=True)[0]
                for total in sums
            ]
            pull = _divided(torch.stack(by_x, -2).mT, grad) if ctx.event_dim else grad / by_x[0]
        needed = ctx.needs_input_grad[4:]
        wanted = [t for t, need in zip(parts, needed, strict=True) if need]
        found: Any = iter(())
        if wanted:
            value = value_of(output)
            found = iter(torch.autograd.grad(value, wanted, -pull, create_graph=again, allow_unused=True))
        return None, None, None, pull.sum_to_size(ctx.shape), *(next(found) if need else None for need in needed)


def _solved(f: Increasing, x: Tensor, tensors: Sequence[Tensor], gap: Tensor) -> Tensor:
    """Returns J^{-1} gap for each row, under a transform of ``torch.func``."""
    basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(*x.shape, -1)
    pull = torch.func.vjp(lambda x: f(x, *tensors), x)[1]
    return _divided(torch.stack([pull(row)[0] for row in basis.unbind(-2)], -2), gap)


def _divided(jacobian: Tensor, g: Tensor) -> Tensor:
    return torch.linalg.solve_ex(jacobian, g.unsqueeze(-1), check_errors=at_hand(jacobian))[0].squeeze(-1)
