"""Bounds unconstrained numbers, maps them to a family's parameters, and checks parameters that are fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from ..core.values import in_every_dtype


class Part(NamedTuple):
    """A predicted parameter: its shape, the shape of its unconstrained numbers, and what maps these (None: identity)."""

    name: str
    shape: tuple[int, ...]
    raw: tuple[int, ...]
    link: Callable[[Tensor], Tensor] | None


def bounded(raw: Tensor, bound: float | Tensor) -> Tensor:
    """raw, smoothly kept within ±bound."""
    return torch.tanh(raw / bound) * bound


class Link:
    """Maps numbers, first bounded to offset ± bound smoothly, into a constraint."""

    def __init__(self, constraint: Any, bound: float, offset: float = 0.0) -> None:
        self.bounds = in_every_dtype(bound)
        self.offset = offset
        above_0 = isinstance(constraint, (constraints.greater_than, constraints.greater_than_eq))
        # transform_to's own is exp(z) * 1 + 0 then
        self.transform = torch.exp if above_0 and constraint.lower_bound == 0 else transform_to(constraint)

    def __call__(self, raw: Tensor) -> Tensor:
        within = bounded(raw, self.bounds[raw.dtype])
        return self.transform(within + self.offset if self.offset else within)


class Cholesky:
    """Maps k(k+1)/2 numbers, first those of the diagonal, to a lower Cholesky factor."""

    def __init__(self, size: int, bound: float) -> None:
        self.size, self.diagonal = size, Link(constraints.positive, bound)

    def __call__(self, raw: Tensor) -> Tensor:
        factor = self.diagonal(raw[..., : self.size]).diag_embed()
        rows, columns = torch.tril_indices(self.size, self.size, -1, device=raw.device)
        factor[..., rows, columns] = raw[..., self.size :]
        return factor


def short_repr(value: Any) -> str:
    """Of an argument, tensors by their shape."""
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else str(value)


def fixed_value(name: str, value: Any, shape: tuple[int, ...], constraint: Any) -> Tensor:
    """The value of a fixed parameter of a site as a tensor, checked.

    Raises:
        TypeError: for what is no number.
        ValueError: for a shape that doesn't broadcast to that of a site's parameter, and values outside the constraint.
    """
    given = value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be a number, a tensor or a head; got {value!r}.")
    size = len(shape) - value.dim()
    if size < 0 or any(n not in (1, k) for n, k in zip(value.shape, shape[size:], strict=True)):
        raise ValueError(f"Expected {name}.shape to broadcast to {shape}, that of a site; got {tuple(value.shape)}.")
    wide = value.detach().expand(shape)
    if not constraints.is_dependent(constraint) and not (valid := constraint.check(wide)).all():
        got = wide[~valid][0].item() if valid.shape == wide.shape and given is value else short_repr(given)
        raise ValueError(f"Expected {name} to satisfy {constraint}; got {got}.")
    return value
