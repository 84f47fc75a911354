"""Families whose own methods refuse samples or batches without elements, repaired."""

from __future__ import annotations

from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..core.shapes import sum_rightmost
from .enumeration import ByEnumeration


class WithoutRows:
    """Handles empty batches and empty samples by evaluating one row."""

    _wide: Any = None

    def expand(self: Any, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)  # type: ignore[misc]
        if not prod(batch_shape):
            new._wide = self._some
        return new

    def sample(self: Any, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return super().sample(torch.Size(sample_shape)) if prod(shape) else self._some.sample().new_empty(shape)  # type: ignore[misc,no-any-return]

    def log_prob(self: Any, value: Tensor) -> Tensor:
        if value.numel() and prod(self.batch_shape):
            return super().log_prob(value)  # type: ignore[misc,no-any-return]
        shape, d = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape), self._some
        with torch.random.fork_rng(devices=[]):
            one = d.sample()
        # a number that has their gradients, for each of no values
        return sum_rightmost(value.expand(shape), len(self.event_shape)) + d.log_prob(one).sum()  # type: ignore[no-any-return]

    def enumerate_support(self: Any, expand: bool = True) -> Tensor:
        if prod(self.batch_shape):
            return super().enumerate_support(expand)  # type: ignore[misc,no-any-return]
        values = self._some.enumerate_support(False).reshape(-1, *[1] * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values  # type: ignore[no-any-return]

    @property
    def _some(self: Any) -> Any:
        """The distribution of some rows."""
        return self if prod(self.batch_shape) or self._wide is None else self._wide


class BetaBinomial(WithoutRows, dist.BetaBinomial):  # type: ignore[name-defined]
    pass


class Binomial(WithoutRows, dist.Binomial):  # type: ignore[name-defined]
    entropy = ByEnumeration.entropy


class DirichletMultinomial(WithoutRows, dist.DirichletMultinomial):  # type: ignore[name-defined]
    pass


class ExtendedBetaBinomial(WithoutRows, dist.ExtendedBetaBinomial):  # type: ignore[name-defined]
    pass


class ExtendedBinomial(WithoutRows, dist.ExtendedBinomial):  # type: ignore[name-defined]
    entropy = ByEnumeration.entropy


class Multinomial(WithoutRows, dist.Multinomial):  # type: ignore[name-defined]
    def expand(self: Any, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        new._binomial = self._binomial  # of the entropy, which torch leaves out
        return new


class OneHotCategorical(WithoutRows, dist.OneHotCategorical):  # type: ignore[name-defined]
    pass


class OrderedLogistic(WithoutRows, dist.OrderedLogistic):  # type: ignore[name-defined]
    pass
