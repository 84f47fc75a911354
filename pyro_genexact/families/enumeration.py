"""Entropy, mean and mode by enumeration of a small finite support."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def in_batch(values: Tensor, d: Any, expand: bool) -> Tensor:
    """Reshapes values (N, *event) of a distribution to the shape that its ``enumerate_support`` returns."""
    values = values.reshape(-1, *[1] * len(d.batch_shape), *d.event_shape)
    return values.expand(-1, *d.batch_shape, *d.event_shape) if expand else values


class ByEnumeration:
    """Computes entropy, mean and mode from ``enumerate_support``, which raises if the support cannot be enumerated."""

    def entropy(self: Any) -> Tensor:
        """Returns the entropy -sum_y p(y) log p(y) in nats, (*batch)."""
        log_prob = self.log_prob(self.enumerate_support(expand=False))
        possible = log_prob > -torch.inf
        log_prob = torch.where(possible, log_prob, 0.0)  # 0 log 0 = 0, with gradient 0
        return -(log_prob * torch.where(possible, log_prob.exp(), 0.0)).sum(0)

    @property
    def mean(self: Any) -> Tensor:
        """The mean sum_y p(y) y, (*batch, *event)."""
        support = self.enumerate_support(expand=False)
        p = self.log_prob(support).exp()
        return (p.reshape(p.shape + (1,) * len(self.event_shape)) * support.to(p)).sum(0)

    @property
    def mode(self: Any) -> Tensor:
        """The most probable value, (*batch, *event)."""
        support = self.enumerate_support(expand=False)
        best = self.log_prob(support).argmax(0)
        return support.reshape(-1, *self.event_shape)[best]
