"""Zero-inflated distributions, however large the logits of the gate."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _uncached(name: str, other: str, link: Any) -> Any:
    """A parameter as it was given, or computed from the other one each time: Pyro takes what is cached for given."""

    def get(self: Any) -> Tensor:
        return self.__dict__[name] if name in self.__dict__ else link(self.__dict__[other])

    def put(self: Any, value: Tensor) -> None:
        self.__dict__[name] = value

    return property(get, put)


class _ZeroInflated:
    """By the logits of the gate where these were given, also after a sample."""

    gate = _uncached("gate", "gate_logits", torch.sigmoid)
    gate_logits = _uncached("gate_logits", "gate", torch.logit)

    def log_prob(self: Any, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if "gate" in self.__dict__:
            log_gate, log_rest = self.gate.log(), torch.log1p(-self.gate)
        else:
            log_gate, log_rest = logsigmoid(self.gate_logits), logsigmoid(-self.gate_logits)
        log_rest = log_rest + self.base_dist.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(log_gate, log_rest), log_rest)


class ZeroInflatedDistribution(_ZeroInflated, dist.ZeroInflatedDistribution):
    pass


class ZeroInflatedNegativeBinomial(_ZeroInflated, dist.ZeroInflatedNegativeBinomial):
    pass


class ZeroInflatedPoisson(_ZeroInflated, dist.ZeroInflatedPoisson):
    pass
