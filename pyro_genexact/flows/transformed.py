"""TransformedDistribution: Pyro's class with a settable ``has_rsample`` and support for empty batches."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from ..core.independent import of_events
from ..core.precision import exactly
from ..core.settable import Settable
from ..core.shapes import sum_rightmost
from ..numerics.fixed_point import passes_of
from ..transforms.base import adapted


class TransformedDistribution(dist.TransformedDistribution):
    """Pyro's ``TransformedDistribution`` with a settable ``has_rsample`` and support for empty batches.

    ``has_rsample_`` works as for other Pyro distributions; Pyro's own class raises an AttributeError there.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> base = dist.Normal(torch.zeros(2), 1.0)
        >>> d = TransformedDistribution(base, [dist.transforms.ExpTransform()])
        >>> d.has_rsample, d.has_rsample_(False).has_rsample
        (True, False)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(value) in nats, shape (*sample, *batch), for values (*sample, *batch, *event)."""
        if self._validate_args:
            self._validate_sample(value)
        event_dim, ladjs = len(self.event_shape), []
        for t in map(adapted, reversed(self.transforms)):
            value, ladj = t.inverse_and_ladj(value)
            event_dim += t.domain.event_dim - t.codomain.event_dim
            ladjs.append(sum_rightmost(ladj, event_dim - t.domain.event_dim))
        base = self.base_dist if value.numel() and self.batch_shape.numel() else of_events(self.base_dist)
        total: Tensor = sum_rightmost(exactly(base.log_prob, value), event_dim - len(base.event_shape))
        return sum(ladjs, total)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Returns samples (*sample_shape, *batch, *event) without gradients."""
        with torch.no_grad():
            return self._pushed(exactly(self.base_dist.sample, Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Returns samples (*sample_shape, *batch, *event) with gradients, if the base has ``rsample``."""
        return self._pushed(exactly(self.base_dist.rsample, Size(sample_shape)))

    def _pushed(self, x: Tensor) -> Tensor:
        for t in self.transforms:
            x = t(x)
        return x

    base_dist: Any

    @property
    def passes(self) -> list[int] | None:
        """The number of passes of the last parallel solve of each autoregressive transform, or None before one."""
        return passes_of(self.transforms)

    @Settable
    def has_rsample(self) -> bool:
        """Whether the base is reparameterised."""
        return self.base_dist.has_rsample  # type: ignore[no-any-return]
