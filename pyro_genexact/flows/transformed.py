"""Distributions pushed through transforms."""

from __future__ import annotations

import copy
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from ..core.independent import of_events
from ..core.settable import Settable


class TransformedDistribution(dist.TransformedDistribution):
    """Pyro's own, whose ``has_rsample`` can be set: there ``has_rsample_`` raises an AttributeError.

    Example:
        >>> import torch
        >>> d = TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [dist.transforms.ExpTransform()])
        >>> d.has_rsample, d.has_rsample_(False).has_rsample
        (True, False)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, also of no rows, of which bases of vectors have none by themselves."""
        if value.numel() and self.batch_shape.numel():
            return super().log_prob(value)  # type: ignore[no-any-return]
        new = copy.copy(self)
        new.base_dist = of_events(self.base_dist)
        return super(TransformedDistribution, new).log_prob(value)  # type: ignore[no-any-return]

    base_dist: Any

    @Settable
    def has_rsample(self) -> bool:
        """Whether the base is reparameterised."""
        return self.base_dist.has_rsample  # type: ignore[no-any-return]
