"""Constraints stricter than torch's: counts, unit vectors, open intervals; table.py assigns them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


def innermost(constraint: Any) -> Any:
    """The constraint of the parts of an independent one, or of any other itself."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


class Counts(constraints.Constraint):
    """Vectors of counts that sum to the total (torch's own admits smaller sums)."""

    is_discrete = True
    event_dim = 1

    def __init__(self, total: int | Tensor) -> None:
        self.upper_bound = total

    def check(self, value: Tensor) -> Tensor:
        """Whether they are."""
        return ((value >= 0) & (value % 1 == 0)).all(-1) & (value.sum(-1) == self.upper_bound)


class Sphere(constraints.Constraint):
    """Unit vectors."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether they are."""
        return dist.constraints.sphere.check(value)

    def feasible_point(self, like: Tensor) -> Tensor:
        """One of them."""
        return torch.eye(1, like.shape[-1], dtype=like.dtype, device=like.device)[0]


@dataclass(frozen=True)
class Between:
    """The check of an interval without its ends, where densities may be infinite."""

    low: Any
    high: Any

    def __call__(self, value: Tensor) -> Tensor:
        return (self.low < value) & (value < self.high)


@dataclass(frozen=True)
class AllPositive:
    """The check of a simplex without its faces, where densities may be infinite."""

    def __call__(self, value: Tensor) -> Tensor:
        return (value > 0).all(-1) & constraints.simplex.check(value)


def open_interval(low: Any, high: Any) -> Any:
    """An interval, for ``biject_to`` as others, that checks strictly."""
    interval: Any = constraints.interval(low, high)
    interval.check = Between(low, high)
    return interval


def open_simplex() -> Any:
    """A simplex, for ``biject_to`` as others, that checks strictly."""
    simplex: Any = copy.copy(constraints.simplex)
    simplex.check = AllPositive()
    return simplex


ANGLE = constraints.interval(-math.pi, math.pi)
UNIT = open_interval(0.0, 1.0)
