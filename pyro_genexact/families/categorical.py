"""Categorical with log-probabilities of -inf: entropy, divergence, normalisation, exact gradients."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from ..core.functional import transformed
from .completed import Completed


class Categorical(Completed, dist.Categorical):
    """With gradients of the entropy and of the divergence from another one where some log-probabilities are -inf."""

    def entropy(self) -> Tensor:
        return -_expected(self.probs, self.logits)


def _expected(probs: Tensor, logits: Tensor) -> Tensor:
    """sum p l, with 0 for p = 0."""
    return (probs * torch.where(probs > 0, logits, 0.0)).sum(-1)


register_kl(Categorical, torch.distributions.Categorical)(
    lambda p, q: _expected(p.probs, p.logits) - _expected(p.probs, q.logits)
)


def log_probs(d: Any) -> Tensor:
    """(*batch, V), of the values 0 ... V - 1 of a distribution (*batch) that enumerates them."""
    if isinstance(d, torch.distributions.Categorical):
        return d.logits
    return d.log_prob(d.enumerate_support(expand=False)).movedim(0, -1)


def normalised(logits: Tensor) -> Categorical:
    """The Categorical of logits (*batch, V), -inf for what is impossible; uniform where all is.

    Log-probabilities of -inf have gradient zero.
    """
    some = logits.detach().amax(-1, keepdim=True) > -torch.inf
    logits = torch.where(some, logits, 0.0)
    d = Categorical(logits=logits, validate_args=False)
    if d.logits.requires_grad or transformed():  # whose gradients would else be those of the normaliser
        d.logits = d._param = torch.where(logits > -torch.inf, d.logits, -torch.inf)
    return d


def continuing(d: Any, eos: int) -> tuple[Categorical, Tensor]:
    """A token that is not ``eos``, and the log-probability (*batch) that a token is none, without cancellation.

    That is log sigmoid(logsumexp of the other logits - logit of ``eos``), accurate at both ends. Where ``eos`` has all the
    mass it is -inf, and the distribution is uniform on the other tokens (on ``eos``, if there are none).

    Args:
        d: a distribution (*batch) of the tokens 0 ... V - 1.
        eos: one of them.

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
