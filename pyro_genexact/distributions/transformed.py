"""Distributions pushed through transforms."""

from __future__ import annotations

import pyro.distributions as dist

from ..base import Settable


class TransformedDistribution(dist.TransformedDistribution):
    """Pyro's own, whose ``has_rsample`` can be set: there ``has_rsample_`` raises an AttributeError.

    Example:
        >>> import torch
        >>> d = TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [dist.transforms.ExpTransform()])
        >>> d.has_rsample, d.has_rsample_(False).has_rsample
        (True, False)
    """

    @Settable
    def has_rsample(self) -> bool:
        """Whether the base is reparameterised."""
        return self.base_dist.has_rsample  # type: ignore[no-any-return]
