"""The conditional distribution of counts: a chain rule of mixtures of logistic variables, rounded on a logarithmic scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu

from ..conditioners.made import MADE
from ..core.buffers import WithDerived, register_derived
from .latent_block import Encoded, regression

COMPONENTS = 4
BOUND = 8.0  # of the log-scales, relative to the standard deviation of log(1 + y)


class CountBlock(WithDerived):
    """A distribution over n counts, each in ``low ... high`` with high up to infinity, given an encoding.

    With u(k) = log(1 + k - low), count i has the probability of a cell of a mixture of logistic variables,

        P(k) = sum_j w_j [sigma((u(k + 1/2) - m_j) / s_j) - sigma((u(k - 1/2) - m_j) / s_j)],

    where the first cell extends to minus infinity and the last one, if high is finite, to infinity. So the total mass is 1. The
    weights, locations and scales are predicted from the encoding and the earlier counts; the locations are relative to a linear
    regression of u on the inputs, which ``standardise`` computes.

    Args:
        ranges: ``(low, high)`` of each count.
        linear: L, the number of inputs of the regression.
        context: C, the number of inputs of the network.
    """

    low: Tensor
    high: Tensor
    regression: Tensor
    shift: Tensor
    sd: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, ranges: Sequence[tuple[float, float]], linear: int, context: int) -> None:
        super().__init__()
        n = len(ranges)
        self.net = MADE(n, 3 * COMPONENTS, context=context, activation=silu)
        for name, i in (("low", 0), ("high", 1)):
            register_derived(self, name, torch.tensor([r[i] for r in ranges], device="cpu"))
        self.register_buffer("regression", torch.zeros(n, linear))
        for name in ("shift", "mean"):
            self.register_buffer(name, torch.zeros(n))
        for name in ("sd", "spread"):  # of the residuals and of u
            self.register_buffer(name, torch.ones(n))
        self.features = n

    def _features(self, counts: Tensor) -> Tensor:
        return ((counts - self.low).log1p() - self.mean) / self.spread

    def _mixture(self, phi: Tensor, centre: Tensor, sd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log-weights, locations and scales (..., n, K) of phi (..., n, 3 K) and the regression (..., n)."""
        logits, loc, raw = phi.unflatten(-1, (3, COMPONENTS)).unbind(-2)
        spaced = torch.linspace(-1, 1, COMPONENTS, dtype=phi.dtype, device=phi.device)
        scale = (BOUND * (raw / BOUND).tanh()).exp() / 2
        return logits.log_softmax(-1), centre[..., None] + sd[..., None] * (loc + spaced), sd[..., None] * scale

    def log_prob(self, counts: Tensor, given: Encoded) -> tuple[Tensor, Tensor]:
        """Returns the log mass (*batch,) of counts (*batch, n) within their ranges, and their features (*batch, n)."""
        batch, features = counts.shape[:-1], self._features(counts)
        given, rows = given.expand(batch), batch.numel()
        phi = self.net(features.reshape(rows, self.features), given.context.reshape(rows, given.context.shape[-1]))
        weights, loc, scale = self._mixture(phi.reshape(*batch, *phi.shape[1:]), self._centre(given.linear), self.sd)
        k = (counts - self.low).unsqueeze(-1)
        first, last = k <= 0, (counts >= self.high).unsqueeze(-1)
        upper, lower = (k + 0.5).log1p(), (k - 0.5).clamp(min=0).log1p()
        above = logsigmoid((upper - loc) / scale).masked_fill(last, 0.0)
        below = logsigmoid((loc - lower) / scale).masked_fill(first, 0.0)
        width = torch.log1p(1 / (k + 0.5).clamp(min=0.5)) / scale  # of the cell, without cancellation
        inside = (-torch.expm1(-width)).log().masked_fill(first | last, 0.0)
        return (weights + above + below + inside).logsumexp(-1).sum(-1), features

    def sample(self, given: Encoded, differentiable: bool = False) -> tuple[Tensor, Tensor]:
        """Returns counts (*batch, n) and their features, one row for each row of what is given."""
        batch = given.context.shape[:-1]
        context, centre = (x.reshape(batch.numel(), x.shape[-1]) for x in (given.context, self._centre(given.linear)))
        phi, state = self.net.start(context, len(context))
        counts: list[Tensor] = []
        for i in range(self.features):
            weights, loc, scale = self._mixture(phi, centre[:, i], self.sd[i])
            uniform = torch.rand((len(context), 2, COMPONENTS), dtype=phi.dtype, device=phi.device)
            uniform = uniform.clamp(min=torch.finfo(phi.dtype).tiny)
            which = (weights - (-uniform[:, 0].log()).log()).argmax(-1, keepdim=True)  # by Gumbel noise
            noise = uniform[:, 1, :1].logit()
            u = (loc.gather(-1, which) + scale.gather(-1, which) * noise).squeeze(-1)
            counts.append((self.low[i] + (u.exp() - 0.5).floor()).clamp(self.low[i], self.high[i]))
            if i + 1 < self.features:
                feature = ((counts[-1] - self.low[i]).log1p() - self.mean[i]) / self.spread[i]
                phi, state = self.net.extend(feature[:, None], state)
                phi = phi.squeeze(1)
        found = torch.stack(counts, -1).reshape(*batch, self.features)
        return found, self._features(found)

    def _centre(self, linear: Tensor) -> Tensor:
        return self.shift + linear @ self.regression.T

    @torch.no_grad()
    def standardise(self, counts: Tensor, given: Encoded) -> Tensor:
        """Sets the regression by N rows of counts (N, n); returns their features (N, n)."""
        x, u = given.linear.double(), (counts - self.low).double().log1p()
        slope, shift, rest = regression(x, u)
        self.regression.copy_(slope)
        self.shift.copy_(shift)
        self.mean.copy_(u.mean(0))
        for buffer, sd in ((self.sd, rest.square().mean(0).sqrt()), (self.spread, u.std(0, correction=0))):
            buffer.copy_(sd)
            buffer[buffer < 1e-3] = 1.0  # constant counts
        return self._features(counts)
