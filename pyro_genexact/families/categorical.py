"""A Categorical distribution that supports log-probabilities of -inf in its entropy, KL divergence and gradients."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from ..core.functional import at_hand, transformed
from ..core.random import chosen
from .completed import Completed


class Categorical(Completed, dist.Categorical):
    """Pyro's Categorical, with finite gradients of entropy and KL divergence if some log-probabilities are -inf.

    It normalises logits by ``log_softmax``, whose backward pass needs one copy of the logits less than torch's own way.
    """

    def __init__(
        self, probs: Tensor | None = None, logits: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        if probs is not None or logits is None or not (logits.dim() and logits.is_floating_point()):
            super().__init__(probs, logits, validate_args=validate_args)
            return
        self.logits = self._param = logits.log_softmax(-1)
        self._num_events = logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Categorical:
        expanded: Categorical = super().expand(batch_shape, self._get_checked_instance(Categorical, _instance))
        return expanded

    def sample(self, sample_shape: Any = ()) -> Tensor:
        if at_hand(self._param) or torch.Size(sample_shape).numel() != 1 or not self._param.numel():
            return super().sample(sample_shape)
        with torch.no_grad():
            return chosen(self.probs.expand(*self._extended_shape(torch.Size(sample_shape)), -1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -_expected(self.probs, self.logits)


def _expected(probs: Tensor, logits: Tensor) -> Tensor:
    """Returns sum_v p_v l_v, where terms with p_v = 0 are 0."""
    return (probs * torch.where(probs > 0, logits, 0.0)).sum(-1)


register_kl(Categorical, torch.distributions.Categorical)(
    lambda p, q: _expected(p.probs, p.logits) - _expected(p.probs, q.logits)
)


def log_probs(d: Any) -> Tensor:
    """Returns the log-probabilities (*batch, V) of a distribution over 0 ... V - 1 that enumerates its support."""
    if isinstance(d, torch.distributions.Categorical):
        return d.logits
    return d.log_prob(d.enumerate_support(expand=False)).movedim(0, -1)


def normalised(logits: Tensor) -> Categorical:
    """Returns the Categorical with logits (*batch, V), of which some may be -inf; uniform in rows where all are -inf.

    Log-probabilities of -inf have gradient zero.
    """
    some = logits.detach().amax(-1, keepdim=True) > -torch.inf
    logits = torch.where(some, logits, 0.0)
    d = Categorical(logits=logits, validate_args=False)
    if d.logits.requires_grad or transformed():  # else log-probabilities of -inf have the normaliser's gradient
        d.logits = d._param = torch.where(logits > -torch.inf, d.logits, -torch.inf)
    return d


def continuing(d: Any, eos: int) -> tuple[Categorical, Tensor]:
    """Returns the distribution of a token given that it is not ``eos``, and the log-probability (*batch) of this.

    The latter is log sigmoid(logsumexp of the other logits - logit of ``eos``), which is accurate near 0 and near -inf.
    If ``eos`` has all the mass, it is -inf, and the distribution is uniform on the other tokens (on ``eos``, if there
    are no others).

    Args:
        d: a distribution (*batch) of the tokens 0 ... V - 1.
        eos: the token to exclude.

    Example:
        >>> rest, log_p = continuing(dist.Categorical(torch.tensor([0.5, 0.3, 0.2])), eos=0)
        >>> rest.probs, log_p.exp()
        (tensor([0.0000, 0.6000, 0.4000]), tensor(0.5000))
    """
    logits = log_probs(d)
    end = torch.arange(logits.shape[-1], device=logits.device) == eos
    rest = torch.where(end, -torch.inf, logits)
    some = (rest > -torch.inf).any(-1, keepdim=True)
    odds = torch.where(some, rest, 0.0).logsumexp(-1) - logits[..., eos]
    log_p = torch.where(some.squeeze(-1), logsigmoid(odds), -torch.inf)
    return normalised(torch.where(some | end, rest, 0.0)), log_p
