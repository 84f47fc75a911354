"""The Fenchel-Young loss of a value, also for distributions that give it probability 0."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.nn.functional import softplus

from ..core.compiling import dispatched
from ..core.shapes import sum_rightmost
from .in_support import log_prob_everywhere
from .per_site import PerSite
from .stopped import Stopped


def fenchel_young_loss(d: Distribution, value: Tensor) -> Tensor:
    """Computes the Fenchel-Young loss (*sample, *batch) of a value, which replaces -log_prob for sparse distributions.

    A sparse distribution gives some values probability 0, where ``log_prob`` is -inf and has no gradient. This loss is
    finite and convex there. For an autoregressive model, a sequence or a row of columns of several kinds, it is the sum
    over the sites of the loss of each factor given the earlier sites, from one parallel pass. Padding and masked values
    add nothing.

    - A class with a method ``fenchel_young(value)``, such as :class:`~pyro_genexact.distributions.EntmaxCategorical`
      and :class:`~pyro_genexact.distributions.BetaGaussian`, defines its own loss.
    - Any other distribution has the loss -log_prob, which is the Fenchel-Young loss of Shannon's entropy, infinite
      outside its support. This includes mixtures of sparse distributions, and therefore an
      :class:`~pyro_genexact.OrderEnsemble` in eval mode.

    Pass it to :func:`~pyro_genexact.fit` as ``loss=gx.fenchel_young_loss``. Losses of models with different families
    have different scales, so compare only the losses of one family; compare log_prob across families.

    Args:
        d: the distribution.
        value: (*sample, *batch, *event).

    Reference: Blondel, Martins, Niculae (2020), "Learning with Fenchel-Young losses", JMLR 21, arXiv:1901.02324.

    Example:
        >>> import torch
        >>> import pyro_genexact as gx
        >>> d = gx.heads.EntmaxCategorical(3)(torch.tensor([[4.0, 0.0, 0.0]]))
        >>> d.log_prob(torch.tensor([1])), gx.fenchel_young_loss(d, torch.tensor([1]))
        (tensor([-inf]), tensor([4.]))
    """
    return _loss(d, value)


@dispatched
def _loss(d: Distribution, value: Tensor) -> Tensor:
    method = getattr(d, "fenchel_young", None)
    found: Tensor = -log_prob_everywhere(d, value) if method is None else method(value)
    return found


@_loss.register(Independent)
def _(d: Any, value: Tensor) -> Tensor:
    return sum_rightmost(_loss(d.base_dist, value), d.reinterpreted_batch_ndims)


@_loss.register(MaskedDistribution)
def _(d: Any, value: Tensor) -> Tensor:
    return torch.where(torch.as_tensor(d._mask, device=value.device), _loss(d.base_dist, value), 0)


@_loss.register(PerSite)
def _(d: PerSite, value: Tensor) -> Tensor:
    return d.each(_loss, value)


@_loss.register(Stopped)
def _(d: Stopped, value: Tensor) -> Tensor:
    inner = value[..., :-1] if d.inner.event_shape else value[..., 0]
    sign = 1 - 2 * value[..., -1]  # of the logits in -log p of the flag
    return _loss(d.inner, inner) + softplus(sign * d.stop_logits)
