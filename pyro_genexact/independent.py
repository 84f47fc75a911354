"""Independent parts of an event, also of batches that have no rows, which torch's own classes cannot flatten."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import IndependentTransform


class Independent(dist.Independent):  # type: ignore[name-defined]
    """Batch dims of a distribution as event dims; none, where it is one of vectors already.

    Example:
        >>> to_event(dist.Normal(torch.zeros(0, 3), 1.0), 1).log_prob(torch.zeros(0, 3)).shape
        torch.Size([0])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if not self.reinterpreted_batch_ndims and not (value.numel() and self.batch_shape.numel()):
            # which families of vectors cannot reshape
            rows = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
            return sum_rightmost(value.expand(rows), len(self.event_shape))
        return sum_rightmost(self.base_dist.log_prob(value), self.reinterpreted_batch_ndims)

    def entropy(self) -> Tensor:
        return sum_rightmost(self.base_dist.entropy(), self.reinterpreted_batch_ndims)

    @constraints.dependent_property
    def support(self) -> Any:
        return independent(self.base_dist.support, self.reinterpreted_batch_ndims)


class _IndependentConstraint(constraints.independent):  # type: ignore[misc,valid-type]
    """Values all of whose parts satisfy a constraint."""

    def check(self, value: Tensor) -> Tensor:
        """Whether all parts do."""
        inside, dims = self.base_constraint.check(value), self.reinterpreted_batch_ndims
        if inside.dim() < dims:
            raise ValueError(f"Expected value.dim() >= {self.event_dim}; got {value.dim()}.")
        return inside.flatten(-dims).all(-1)  # type: ignore[no-any-return]


REAL_VECTOR = _IndependentConstraint(constraints.real, 1)
"""As ``constraints.real_vector``."""

for _registry in (biject_to, transform_to):
    _registry.register(
        _IndependentConstraint,
        lambda c, to=_registry: IndependentTransform(to(c.base_constraint), c.reinterpreted_batch_ndims),
    )


def to_event(d: Any, dims: int = 0) -> Any:
    """The distribution with its last batch dims as event dims."""
    return of_events(d, dims) if dims or isinstance(d, torch.distributions.Independent) else d


def of_events(d: Any, dims: int = 0) -> Independent:
    """The same as :class:`Independent`, without one of torch's within."""
    while isinstance(d, torch.distributions.Independent):
        d, dims = d.base_dist, dims + d.reinterpreted_batch_ndims
    return Independent(d, dims)


def independent(constraint: Any, dims: int = 0) -> Any:
    """The constraint of parts along the last dims, and with :class:`_IndependentConstraint` for torch's own."""
    while isinstance(constraint, constraints.independent) and "check" not in vars(constraint):  # not one that differs
        constraint, dims = constraint.base_constraint, dims + constraint.reinterpreted_batch_ndims
    return _IndependentConstraint(constraint, dims) if dims else constraint


def sum_rightmost(x: Tensor, dims: int) -> Tensor:
    """The sum over the last dims, also of nothing."""
    return x.sum(tuple(range(-dims, 0))) if dims else x
