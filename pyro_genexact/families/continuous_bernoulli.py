"""The continuous Bernoulli distribution, also for large logits."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from .special import tilted_cdf


class ContinuousBernoulli(dist.ContinuousBernoulli):  # type: ignore[name-defined]
    r"""The continuous Bernoulli distribution with logits l of any size: p(x) = l exp(l x) / (exp(l) - 1).

    Torch clamps the probabilities, so its density does not integrate to 1 for large logits. The distance w of x from
    the end with the higher density has the density r exp(-a w) with a = \|l\| and 1 / r = (1 - exp(-a)) / a.
    """

    sample = Distribution.sample  # uses rsample

    def _sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns whether l > 0, a, and a with 1 in place of small values; a has the right derivative at l = 0."""
        up = self.logits > 0
        a = torch.where(up, self.logits, -self.logits).double()
        return up, a, torch.where(a < 0.1, 1, a)

    def _log_norm(self) -> Tensor:
        _, a, far = self._sizes()
        series = a * (-1 / 2 + a * (1 / 24 - a**2 / 2880 + a**4 / 181440))
        return torch.where(a < 0.1, series, torch.log(-torch.expm1(-far)) - far.log())

    def log_prob(self, value: Tensor) -> Tensor:
        up, a, _ = self._sizes()
        return (-a * torch.where(up, 1 - value, value) - self._log_norm()).to(self.logits)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return tilted_cdf(self.logits, value.clamp(0, 1))

    def icdf(self, value: Tensor) -> Tensor:
        return self._from_end(torch.where(self.logits > 0, 1 - value, value))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self._from_end(torch.rand(shape, dtype=torch.float64, device=self.logits.device))

    def _from_end(self, v: Tensor) -> Tensor:
        """Returns the x whose distance is the quantile of level v, w = -log(1 - v (1 - exp(-a))) / a."""
        up, a, _ = self._sizes()
        v, near = v.double(), a < 1e-4
        far = torch.where(near, 1, a)
        series = v * (1 + a * (v - 1) / 2 * (1 - a * (1 - 2 * v) / 3))
        w = torch.where(near, series, (-torch.log1p(v * torch.expm1(-far)) / far).clamp(max=1))
        return torch.where(up, 1 - w, w).to(self.logits)

    @property
    def mean(self) -> Tensor:
        return torch.where(self.logits > 0, 1 - self._mean_distance(), self._mean_distance()).to(self.logits)

    def _mean_distance(self) -> Tensor:
        _, a, far = self._sizes()
        return torch.where(a < 0.1, 1 / 2 - a * (1 / 12 - a**2 / 720 + a**4 / 30240), 1 / far - 1 / torch.expm1(far))

    @property
    def variance(self) -> Tensor:
        _, a, far = self._sizes()
        series = 1 / 12 - a**2 / 240 + a**4 / 6048 - a**6 / 172800
        exact = 1 / far**2 - torch.exp(-far) / torch.expm1(-far) ** 2
        return torch.where(a < 0.1, series, exact).to(self.logits)

    def entropy(self) -> Tensor:
        _, a, _ = self._sizes()
        return (a * self._mean_distance() + self._log_norm()).to(self.logits)
