"""Zero-inflated distributions, also for large logits of the gate."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _uncached(name: str, other: str, link: Any) -> Any:
    """Returns a property for a parameter that was passed, or else is computed from the other one on each access.

    Pyro's own lazy property caches the computed value and then treats it as passed.
    """

    def get(self: Any) -> Tensor:
        return self.__dict__[name] if name in self.__dict__ else link(self.__dict__[other])

    def put(self: Any, value: Tensor) -> None:
        self.__dict__[name] = value

    return property(get, put)


class _ZeroInflated:
    """Computes log_prob from the logits of the gate if they were passed, also after a sample was drawn."""

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
    """Returns log(gate + (1 - gate) base), with exact gradients also at gates 0 and 1."""
    mass = gate + (1 - gate) * log_base.exp()
    fits = mass >= torch.finfo(mass.dtype).tiny  # otherwise the gate is 0 and the base underflows
    return torch.where(fits, torch.where(fits, mass, 1).log(), log_base)


def _log_mass_of_rest(gate: Tensor, log_base: Tensor, zero: Tensor) -> Tensor:
    """Returns log((1 - gate) base), -inf with gradient zero at gate 1; no gradient by the gate for values of zero."""
    open_ = gate < 1
    return torch.where(open_, torch.log1p(-torch.where(open_ & ~zero, gate, 0)) + log_base, -torch.inf)


class ZeroInflatedDistribution(_ZeroInflated, dist.ZeroInflatedDistribution):
    """A ZeroInflatedDistribution with an accurate log_prob for large logits of the gate."""


class ZeroInflatedNegativeBinomial(_ZeroInflated, dist.ZeroInflatedNegativeBinomial):
    """A ZeroInflatedNegativeBinomial with an accurate log_prob for large logits of the gate."""


class ZeroInflatedPoisson(_ZeroInflated, dist.ZeroInflatedPoisson):
    """A ZeroInflatedPoisson with an accurate log_prob for large logits of the gate."""
