"""Heads of mixtures: of K components of one head, or of several heads."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor, nn

from ..base import Head
from ..core.buffers import register_derived
from ..core.checks import check_sizes
from ..core.shapes import parts_of
from ..families.discretized_logistic import DiscretizedLogistic as DiscretizedLogisticDistribution
from ..families.mixture import Mixture as MixtureDistribution
from ..families.mixture import union
from .checks import checked_heads
from .parameters import bounded

_BOUND = 10.0  # the bound of the log-scale
_GOLDEN = 0.6180339887498949


class Mixture(Head):
    """A mixture sum_k w_k p_k(y), with weights and components predicted by phi.

    phi contains the K logits of the weights, then the parameters of each component in turn. The K components of a
    single head are evaluated in one call. Equal components would receive equal gradients and stay equal, so fixed
    offsets between -1 and 1 are added to their parameters. The offsets of parameter p are evenly spaced, (k + 1/2) / K
    scaled to [-1, 1], and shifted cyclically by p times the golden ratio, so that different parameters order the
    components differently. The first parameter, in most families the location, starts at the centres of K equal cells
    of [-1, 1]. A list of heads gets no offsets.

    Args:
        head: one head for all components, or a list with one head per component, all of the same site_shape.
        K: the number of components, only for a single head.

    Raises:
        TypeError: if ``head`` is not a head of distributions or a sequence of these.
        ValueError: if ``K`` is given with a list or missing with a head, if the heads' site shapes differ, if some
            heads are discrete and others continuous, or if one is a ``PerSite``.

    Reference: Bishop, "Mixture Density Networks", 1994.

    Example:
        >>> import torch
        >>> head = Mixture(DiscretizedLogistic(16), K=3)
        >>> head.num_params
        9
        >>> head(torch.zeros(4, 5, 9)).sample().shape
        torch.Size([4, 5])
    """

    def __init__(self, head: Head | Sequence[Head], K: int | None = None) -> None:
        super().__init__()
        heads = checked_heads("head", [head] if isinstance(head, Head) else head)
        if any(part.num_sites is not None for part in heads):
            raise ValueError(
                "Expected head to treat all sites alike; got a PerSite (use PerSite([Mixture(...), ...]) instead)."
            )
        if isinstance(head, Head) != (K is not None):
            raise ValueError(f"Expected K with one head, and no K with a list of heads; got K={K}.")
        if K is not None:
            check_sizes(1, K=K)
        self.heads = nn.ModuleList(heads)
        self._supports = [h.support for h in heads]
        self.site_shape, self.support = heads[0].site_shape, union(self._supports)
        if len({support.is_discrete for support in self._supports}) > 1:
            raise ValueError("Expected heads to be all discrete or all continuous; got some of both.")
        self.num_components = len(heads) if K is None else K
        self._sizes = [h.num_params for h in heads] if K is None else [K * heads[0].num_params]
        self.num_params = self.num_components + sum(self._sizes)
        offsets = None if K is None else _offsets(K, heads[0].num_params)
        register_derived(self, "offsets", offsets)

    def forward(self, phi: Tensor, first: int = 0) -> MixtureDistribution:
        """Returns the mixture of batch shape (*batch, S) for phi (*batch, S, P)."""
        logits, *parts = phi.split([self.num_components, *self._sizes], -1)
        if self.offsets is None:
            components = [head(part, first) for head, part in zip(self.heads, parts, strict=True)]
            return MixtureDistribution(logits, components, self._supports, validate_args=False)
        offsets = self.offsets.to(phi)
        raw = (parts[0].unflatten(-1, offsets.shape) + offsets).movedim(-2, 0)
        return MixtureDistribution(logits, self.heads[0](raw, first), self.support, validate_args=False)


class DiscretizedLogistic(Head):
    """A mixture of K discretised logistic distributions on the integers 0 ... levels - 1; P = 3 K, or 2 if K = 1.

    Locations are predicted on the scale where the levels span -1 ... 1. The scale of a component is
    exp(10 tanh(r / 10)) / pi for a predicted r, so that phi = 0 gives the variance of the uniform distribution. See
    :class:`pyro_genexact.distributions.DiscretizedLogistic` for the probabilities.

    Args:
        levels: the number of integers, at least 2.
        K: the number of components, at least 1.

    Raises:
        ValueError: if ``levels`` or ``K`` is too small.

    Reference: Salimans, Karpathy, Chen, Kingma, "PixelCNN++", ICLR 2017.

    Example:
        >>> import torch
        >>> head = DiscretizedLogistic(256, K=10)
        >>> d = head(torch.zeros(28, 30))
        >>> head.num_params, d.log_prob(torch.tensor(127.0)).shape
        (30, torch.Size([28]))
    """

    def __init__(self, levels: int, K: int = 1) -> None:
        super().__init__()
        check_sizes(2, levels=levels)
        check_sizes(1, K=K)
        self.levels = levels
        self.support = torch.distributions.constraints.integer_interval(0, levels - 1)
        self.mixture = Mixture(DiscretizedLogistic(levels), K) if K > 1 else None
        self.num_params = 3 * K if K > 1 else 2

    def forward(self, phi: Tensor, first: int = 0) -> DiscretizedLogisticDistribution | MixtureDistribution:
        """Returns the distribution of batch shape (*batch, S) for phi (*batch, S, P)."""
        if self.mixture is not None:
            return self.mixture(phi, first)
        loc, raw = parts_of(phi)
        scale = bounded(raw, _BOUND).exp() / pi
        return DiscretizedLogisticDistribution(loc, scale, self.levels, validate_args=False)


def _offsets(K: int, num_params: int) -> Tensor:
    """Returns offsets (K, P) in [-1, 1] that are exact in float32; zeros if K = 1."""
    if K == 1:
        return torch.zeros(1, num_params, device="cpu")
    cells = (torch.arange(K, dtype=torch.float64, device="cpu") + 0.5) / K
    rolled = (cells.unsqueeze(-1) + _GOLDEN * torch.arange(num_params, dtype=torch.float64, device="cpu")) % 1
    return ((2**20 * (2 * rolled - 1)).round() / 2**20).to(torch.get_default_dtype())
