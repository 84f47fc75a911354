"""How a head predicts parameters, and what it takes for fixed ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import new_class
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution, constraints, transform_to

from .bijections import _DTYPES


class Part(NamedTuple):
    """A predicted parameter: its shape, the shape of its unconstrained numbers, and what maps these (None: identity)."""

    name: str
    shape: tuple[int, ...]
    raw: tuple[int, ...]
    link: Callable[[Tensor], Tensor] | None


class Link:
    """Maps numbers, first bounded to offset ± bound smoothly, into a constraint."""

    def __init__(self, constraint: Any, bound: float, offset: float = 0.0) -> None:
        # as tensors, which cost a quarter of what numbers do; those of the CPU go with every device
        self.bounds = {dtype: torch.tensor(bound, dtype=dtype, device="cpu") for dtype in _DTYPES}
        self.offset = offset
        above_0 = isinstance(constraint, (constraints.greater_than, constraints.greater_than_eq))
        # transform_to's own is exp(z) * 1 + 0 then
        self.transform = torch.exp if above_0 and constraint.lower_bound == 0 else transform_to(constraint)

    def __call__(self, raw: Tensor) -> Tensor:
        bound = self.bounds[raw.dtype]
        bounded = torch.tanh(raw / bound) * bound
        return self.transform(bounded + self.offset if self.offset else bounded)


class Cholesky:
    """Maps k(k+1)/2 numbers, first those of the diagonal, to a lower Cholesky factor."""

    def __init__(self, size: int, bound: float) -> None:
        self.size, self.diagonal = size, Link(constraints.positive, bound)

    def __call__(self, raw: Tensor) -> Tensor:
        factor = self.diagonal(raw[..., : self.size]).diag_embed()
        rows, columns = torch.tril_indices(self.size, self.size, -1, device=raw.device)
        factor[..., rows, columns] = raw[..., self.size :]
        return factor


def brief(value: Any) -> str:
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
        got = wide[~valid][0].item() if valid.shape == wide.shape and given is value else brief(given)
        raise ValueError(f"Expected {name} to satisfy {constraint}; got {got}.")
    return value


@cache
def citizen(family: Any) -> Any:
    """The family as Pyro's are: callable, with to_event, mask and a default expand."""
    if issubclass(family, TorchDistributionMixin):
        return family
    methods: dict[str, Any] = {"__module__": family.__module__, "__doc__": family.__doc__}
    methods["__reduce__"] = lambda self: (_restore, (family, self.__dict__))
    if family.expand is Distribution.expand:
        methods["expand"] = TorchDistribution.expand
    return new_class(family.__name__, (family, TorchDistributionMixin), {}, lambda body: body.update(methods))


def _restore(family: Any, fields: dict[str, Any]) -> Any:
    made = object.__new__(citizen(family))
    made.__dict__.update(fields)
    return made
