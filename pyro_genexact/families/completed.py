"""Adds Pyro's methods, validation of values and support for empty batches to a family, as heads need them."""

from __future__ import annotations

from types import new_class
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Size, Tensor
from torch.distributions import Distribution

from ..core.compiling import classes
from ..core.functional import compiling
from ..core.precision import full_precision
from ..core.shapes import sum_rightmost
from .enumeration import in_batch


class Completed:
    """Validates values, and supports empty batches and sample shapes that the family may be unable to reshape."""

    _rows: Any = None  # the distribution with rows that was expanded to an empty batch

    @full_precision
    def log_prob(self: Any, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if value.numel() and 0 not in self._batch_shape:
            if compiling() and isinstance(self, dist.Categorical):  # Pyro's method compares identities
                return torch.distributions.Categorical.log_prob(self, value)  # type: ignore[no-any-return]
            return super().log_prob(value)  # type: ignore[misc,no-any-return]
        shape, d = torch.broadcast_shapes(value.shape, self._batch_shape + self._event_shape), self._nonempty()
        if d is None:
            return super().log_prob(value)  # type: ignore[misc,no-any-return]
        with torch.random.fork_rng(devices=[]):
            one = d.sample()
        # an empty tensor that is connected to the gradients of value and parameters
        return sum_rightmost(value.expand(shape), len(self._event_shape)) + d.log_prob(one).sum()  # type: ignore[no-any-return]

    def sample(self: Any, sample_shape: Any = ()) -> Tensor:
        if 0 not in self._batch_shape and 0 not in sample_shape:
            return super().sample(Size(sample_shape))  # type: ignore[misc,no-any-return]
        shape, d = self._extended_shape(Size(sample_shape)), self._nonempty()
        return super().sample(Size(sample_shape)) if d is None else d.sample().new_empty(shape)  # type: ignore[misc,no-any-return]

    def enumerate_support(self: Any, expand: bool = True) -> Tensor:
        d = self._nonempty()
        if d is self or d is None:
            return super().enumerate_support(expand)  # type: ignore[misc,no-any-return]
        return in_batch(d.enumerate_support(False), self, expand)

    @full_precision
    def rsample(self: Any, sample_shape: Any = ()) -> Tensor:
        return super().rsample(Size(sample_shape))  # type: ignore[misc,no-any-return]

    def expand(self: Any, batch_shape: Any, _instance: Any = None) -> Any:
        new = super().expand(Size(batch_shape), _instance)  # type: ignore[misc]
        if 0 in batch_shape:
            new._rows = self._nonempty()
        return new

    def _nonempty(self: Any) -> Any:
        """Returns a distribution with at least one row, or None if the batch was empty from the start."""
        return self._rows if 0 in self._batch_shape else self


@classes
def completed(family: Any) -> Any:
    """Returns a subclass of the family that is :class:`Completed` and has the methods of Pyro's distributions."""
    if issubclass(family, Completed):
        return family
    methods: dict[str, Any] = {"__module__": family.__module__, "__doc__": family.__doc__}
    methods["__reduce__"] = lambda self: (_restore, (family, self.__dict__))
    bases = [Completed, family]
    if not issubclass(family, TorchDistributionMixin):
        bases.append(TorchDistributionMixin)
        if family.expand is Distribution.expand:
            bases.insert(1, _Expanding)
    return new_class(family.__name__, tuple(bases), {}, lambda body: body.update(methods))


class _Expanding:
    """Uses Pyro's general ``expand``, for families that do not define one."""

    expand = TorchDistribution.expand


def _restore(family: Any, fields: dict[str, Any]) -> Any:
    made = object.__new__(completed(family))
    made.__dict__.update(fields)
    return made
