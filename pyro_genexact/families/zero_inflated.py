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
        zero, log_base = value == 0, self.base_dist.log_prob(value)
        if "gate" in self.__dict__:
            log_rest = _log_mass_of_rest(self.gate, log_base, zero)
            return torch.where(zero, _log_mass_of_zero(self.gate, log_base), log_rest)
        log_rest = logsigmoid(-self.gate_logits) + log_base
        return torch.where(zero, torch.logaddexp(logsigmoid(self.gate_logits), log_rest), log_rest)


def _log_mass_of_zero(gate: Tensor, log_base: Tensor) -> Tensor:
    """log(gate + (1 - gate) base), with exact gradients at gates 0 and 1 too."""
    mass = gate + (1 - gate) * log_base.exp()
    fits = mass >= torch.finfo(mass.dtype).tiny  # else the gate is 0 and the base underflows
    return torch.where(fits, torch.where(fits, mass, 1).log(), log_base)


def _log_mass_of_rest(gate: Tensor, log_base: Tensor, zero: Tensor) -> Tensor:
    """log((1 - gate) base), -inf with gradient zero at gate 1; the gradient is zero where the value is."""
    open_ = gate < 1
    return torch.where(open_, torch.log1p(-torch.where(open_ & ~zero, gate, 0)) + log_base, -torch.inf)


class ZeroInflatedDistribution(_ZeroInflated, dist.ZeroInflatedDistribution):
    pass


class ZeroInflatedNegativeBinomial(_ZeroInflated, dist.ZeroInflatedNegativeBinomial):
    pass


class ZeroInflatedPoisson(_ZeroInflated, dist.ZeroInflatedPoisson):
    pass
