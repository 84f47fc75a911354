"""Maps unconstrained numbers to the parameters of a family, and checks fixed parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from ..core.values import in_every_dtype


class Part(NamedTuple):
    """A predicted parameter.

    Attributes:
        name: its name.
        shape: its shape per site.
        raw: the shape of its unconstrained numbers.
        link: maps unconstrained numbers to the parameter; None for the identity.
    """

    name: str
    shape: tuple[int, ...]
    raw: tuple[int, ...]
    link: Callable[[Tensor], Tensor] | None


def bounded(raw: Tensor, bound: float | Tensor) -> Tensor:
    """Returns bound tanh(raw / bound)."""
    return torch.tanh(raw / bound) * bound


class Link:
    """Maps unconstrained numbers, smoothly bounded to offset ± bound, into a constraint.

    Args:
        constraint: the constraint of the parameter.
        bound: the bound of the unconstrained numbers.
        offset: is added to the bounded numbers.
    """

    def __init__(self, constraint: Any, bound: float, offset: float = 0.0) -> None:
        self.bounds = in_every_dtype(bound)
        self.offset = offset
        above_0 = isinstance(constraint, (constraints.greater_than, constraints.greater_than_eq))
        # transform_to would compute exp(z) * 1 + 0
        self.transform = torch.exp if above_0 and constraint.lower_bound == 0 else transform_to(constraint)

    def __call__(self, raw: Tensor) -> Tensor:
        within = bounded(raw, self.bounds[raw.dtype])
        return self.transform(within + self.offset if self.offset else within)


class Cholesky:
    """Maps k(k+1)/2 unconstrained numbers, those of the diagonal first, to a lower Cholesky factor.

    Args:
        size: k.
        bound: the bound of the logarithms of the diagonal.
    """

    def __init__(self, size: int, bound: float) -> None:
        self.size, self.diagonal = size, Link(constraints.positive, bound)

    def __call__(self, raw: Tensor) -> Tensor:
        factor = self.diagonal(raw[..., : self.size]).diag_embed()
        rows, columns = torch.tril_indices(self.size, self.size, -1, device=raw.device)
        factor[..., rows, columns] = raw[..., self.size :]
        return factor


def short_repr(value: Any) -> str:
    """Returns the str of an argument, or the shape of a tensor."""
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else str(value)


def fixed_value(name: str, value: Any, shape: tuple[int, ...], constraint: Any) -> Tensor:
    """Returns the value of a fixed parameter as a tensor, after checking its shape and constraint.

    Raises:
        TypeError: if it is neither a number nor a tensor.
        ValueError: if its shape does not broadcast to ``shape``, that of the parameter of one site, or it violates the
            constraint.
    """
    given = value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be a number, a tensor or a head; got {value!r}.")
    size = len(shape) - value.dim()
    if size < 0 or any(n not in (1, k) for n, k in zip(value.shape, shape[size:], strict=True)):
        raise ValueError(f"Expected {name}.shape to broadcast to {shape} (per site); got {tuple(value.shape)}.")
    wide = value.detach().expand(shape)
    if not constraints.is_dependent(constraint) and not (valid := constraint.check(wide)).all():
        got = wide[~valid][0].item() if valid.shape == wide.shape and given is value else short_repr(given)
        raise ValueError(f"Expected {name} to satisfy {constraint}; got {got}.")
    return value
