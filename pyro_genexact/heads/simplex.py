"""Heads whose sites are points of a simplex."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import constraints

from ..base import Head
from ..core.checks import check_sizes
from ..families import continuous_categorical


class ContinuousCategorical(Head):
    """Sites (k,) on the simplex with a log-linear density: phi (*batch, S, k) are the logits, and phi = 0 is uniform.

    See :class:`pyro_genexact.distributions.ContinuousCategorical` for the density and its reference.

    Args:
        k: the number of shares of a site, at least 2.

    Raises:
        ValueError: for fewer than two.

    Example:
        >>> import torch
        >>> ContinuousCategorical(3)(torch.zeros(5, 2, 3)).mean[0, 0]
        tensor([0.3333, 0.3333, 0.3333])
    """

    support = constraints.simplex

    def __init__(self, k: int) -> None:
        super().__init__()
        check_sizes(2, k=k)
        self.num_params, self.site_shape = k, (k,)

    def forward(self, phi: Tensor, first: int = 0) -> continuous_categorical.ContinuousCategorical:
        """The distribution of values (*batch, S, k) from phi (*batch, S, k)."""
        return continuous_categorical.ContinuousCategorical(phi, validate_args=False)
