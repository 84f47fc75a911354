"""Constraints that are stricter than torch's: counts, unit vectors, open intervals and simplices."""

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
    """Returns the base of nested independent constraints; other constraints are returned unchanged."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


class Counts(constraints.Constraint):
    """The constraint of vectors of counts that sum to ``total``; torch's own admits smaller sums."""

    is_discrete = True
    event_dim = 1

    def __init__(self, total: int | Tensor) -> None:
        self.upper_bound = total

    def check(self, value: Tensor) -> Tensor:
        return ((value >= 0) & (value % 1 == 0)).all(-1) & (value.sum(-1) == self.upper_bound)

    def __repr__(self) -> str:
        return f"Counts({self.upper_bound})"


class Sphere(constraints.Constraint):
    """The constraint of unit vectors."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return dist.constraints.sphere.check(value)

    def feasible_point(self, like: Tensor) -> Tensor:
        """Returns the first unit vector of the standard basis."""
        return torch.eye(1, like.shape[-1], dtype=like.dtype, device=like.device)[0]

    def __repr__(self) -> str:
        return "Sphere()"


@dataclass(frozen=True)
class Between:
    """The check of an interval without its ends, where densities may be infinite.

    Attributes:
        low: the lower bound.
        high: the upper bound.
    """

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
    """Returns an interval that excludes its ends; ``biject_to`` supports it as torch's own."""
    interval: Any = constraints.interval(low, high)
    interval.check = Between(low, high)
    return interval


def open_simplex() -> Any:
    """Returns a simplex that excludes its faces; ``biject_to`` supports it as torch's own."""
    simplex: Any = copy.copy(constraints.simplex)
    simplex.check = AllPositive()
    return simplex


ANGLE = constraints.interval(-math.pi, math.pi)
UNIT = open_interval(0.0, 1.0)
