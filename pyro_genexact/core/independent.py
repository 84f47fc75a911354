"""Versions of torch's Independent, ``to_event`` and independent constraint that also work for empty batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .compiling import cached
from .settable import Settable
from .shapes import sum_rightmost


class Independent(dist.Independent):  # type: ignore[name-defined]
    """Reinterprets batch dims of a distribution as event dims, also for empty batches.

    With zero dims it wraps a distribution of vectors whose own log_prob may not handle empty batches.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_genexact.core.independent import to_event
        >>> to_event(dist.Normal(torch.zeros(0, 3), 1.0), 1).log_prob(torch.zeros(0, 3)).shape
        torch.Size([0])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if not self.reinterpreted_batch_ndims and not (value.numel() and self.batch_shape.numel()):
            # families of vectors fail to reshape empty batches
            rows = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
            return sum_rightmost(value.expand(rows), len(self.event_shape))
        return sum_rightmost(self.base_dist.log_prob(value), self.reinterpreted_batch_ndims)

    def entropy(self) -> Tensor:
        return sum_rightmost(self.base_dist.entropy(), self.reinterpreted_batch_ndims)

    @Settable
    def has_rsample(self) -> bool:
        return self.base_dist.has_rsample  # type: ignore[no-any-return]

    @constraints.dependent_property
    def support(self) -> Any:
        return independent(self.base_dist.support, self.reinterpreted_batch_ndims)


@dataclass(frozen=True)
class All:
    """The check of an independent constraint: whether all entries along the last dims satisfy a constraint.

    Attributes:
        constraint: the constraint of the entries.
        dims: the number of dims.
    """

    constraint: Any
    dims: int

    def __call__(self, value: Tensor) -> Tensor:
        inside = self.constraint.check(value)
        if inside.dim() < self.dims:
            raise ValueError(f"Expected value.dim() >= {self.constraint.event_dim + self.dims}; got {value.dim()}.")
        return inside.flatten(-self.dims).all(-1)  # type: ignore[no-any-return]


def to_event(d: Any, dims: int = 0) -> Any:
    """Returns the distribution with its last batch dims reinterpreted as event dims."""
    return of_events(d, dims) if dims or isinstance(d, torch.distributions.Independent) else d


def of_events(d: Any, dims: int = 0) -> Independent:
    """Returns the distribution as an :class:`Independent`, which replaces torch's own class."""
    if isinstance(d, Independent) and not dims:
        return d
    while isinstance(d, torch.distributions.Independent):
        d, dims = d.base_dist, dims + d.reinterpreted_batch_ndims
    return Independent(d, dims)


def independent(constraint: Any, dims: int = 0) -> Any:
    """Returns torch's independent constraint over the last dims, with a check that also works for empty batches.

    ``biject_to`` accepts it as it accepts torch's own.
    """
    return _reals(dims) if constraint is constraints.real else _independent(constraint, dims)


@cached
def _reals(dims: int) -> Any:
    """Caches the constraint of real numbers, which every call of a flow uses."""
    return _independent(constraints.real, dims)


def _independent(constraint: Any, dims: int) -> Any:
    while isinstance(constraint, constraints.independent) and isinstance(
        vars(constraint).get("check"), (NoneType, All)
    ):
        constraint, dims = constraint.base_constraint, dims + constraint.reinterpreted_batch_ndims
    if not dims:
        return constraint
    joint: Any = constraints.independent(constraint, dims)
    joint.check = All(constraint, dims)
    return joint


def with_check(constraint: Any, check: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of the constraint with another check. Its class stays the same, so ``biject_to`` accepts it."""
    new = copy.copy(constraint)
    new.check = check
    return new


REAL_VECTOR = independent(constraints.real_vector)
"""The constraint ``constraints.real_vector``, with a check that also works for empty batches."""


def innermost(d: Any) -> Any:
    """Returns the distribution within nested ``Independent`` distributions."""
    while isinstance(d, torch.distributions.Independent):
        d = d.base_dist
    return d
