"""Pareto-smoothed importance sampling with a guide: how far its draws may be trusted, and what they say once weighed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_sizes
from ..core.values import numbers
from . import arviz_compat
from .guide_draws import draw

SMALLEST = 25  # draws, of which five make a tail
FLAT = 1e-4  # ratios within so many nats have no tail, only rounding


@dataclass(frozen=True)
class Importance:
    r"""Draws of a guide with their log importance ratios log p - log q, p the joint density of latents and data.

    The largest weights are replaced by quantiles of a generalised Pareto distribution fitted to them, whose shape k-hat says
    how many moments the ratios have: below 0.5 the variance of what is estimated is finite; up to :attr:`threshold` (0.7 for many
    draws) estimates are usable; above it neither they nor the guide can be trusted, whatever the other numbers say.

    Args:
        log_ratios: (S,), S at least 25.
        draws: latents by name, (S, ...).

    Attributes:
        log_weights: smoothed, normalised to a sum of 1, (S,) in float64.
        khat: -inf if the ratios are equal, as those of the exact posterior are.
        ess: effective sample size 1 / sum w^2, between 1 and S.

    Raises:
        ValueError: for log ratios of another shape, NaN, or infinity, and for draws of another number.

    Reference: Vehtari et al., "Pareto smoothed importance sampling", JMLR 2024; Yao et al., "Yes, but did it work?", ICML 2018.

    Example:
        >>> import torch
        >>> x = torch.linspace(-3, 3, 1000, dtype=torch.float64)
        >>> exact = Importance(torch.full((1000,), -2.0), {"x": x})
        >>> exact.khat, round(exact.ess), round(exact.log_evidence, 6), round(exact.expectation(lambda d: d["x"] ** 2).item(), 3)
        (-inf, 1000, -2.0, 3.006)
        >>> bool(exact.khat_of(lambda d: d["x"] ** 2) < exact.threshold)
        True
    """

    log_ratios: Tensor
    draws: dict[str, Tensor] = field(default_factory=dict)
    log_weights: Tensor = field(init=False)
    khat: float = field(init=False)
    ess: float = field(init=False)

    def __post_init__(self) -> None:
        ratios = self.log_ratios
        if ratios.dim() != 1 or len(ratios) < SMALLEST:
            raise ValueError(f"Expected log_ratios of shape (S,), S >= {SMALLEST}; got {tuple(ratios.shape)}.")
        if bad := int((ratios.isnan() | (ratios == torch.inf)).sum()):
            raise ValueError(
                f"Expected log_ratios below infinity; got NaN or infinity for {bad} of {len(ratios)} draws."
            )
        if not ratios.isfinite().any():
            raise ValueError("Expected draws of positive density under the model; got log_ratios of -inf alone.")
        if wrong := {name: tuple(x.shape) for name, x in self.draws.items() if x.shape[:1] != ratios.shape}:
            raise ValueError(f"Expected draws of shape ({len(ratios)}, ...), one for each ratio; got {wrong}.")
        weights, khat = (ratios.double().log_softmax(0), -math.inf) if is_flat(ratios) else arviz_compat.psislw(ratios)
        ess = (-(2 * weights).logsumexp(0)).exp().item()
        for name, value in (("log_weights", weights), ("khat", khat), ("ess", ess)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Importance(khat={self.khat:.2f}, ess={self.ess:.0f} of {len(self.log_ratios)})"

    @property
    def threshold(self) -> float:
        """The k-hat up to which S draws suffice, min(1 - 1 / log10(S), 0.7)."""
        return min(1 - 1 / math.log10(len(self.log_ratios)), 0.7)

    def khat_of(self, function: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """k-hat of the estimate of E[function(draws)], elementwise: (...) in float64 for values (S, ...).

        It is the largest of ``khat`` and of the shapes of both tails of the values times the ratios. ``khat`` alone
        warrants the evidence and expectations of bounded functions; a second moment of heavy tails may need more.

        Raises:
            ValueError: if the function's result has another leading dim than S, or is not finite.
        """
        values = self._values(function)
        if not values.isfinite().all():
            raise ValueError("Expected finite values of function(draws); got NaN or infinity.")
        ratios = self.log_ratios.double().to(values.device)
        found = [self._khat_of(column, ratios) for column in values.double().reshape(len(values), -1).unbind(1)]
        return torch.tensor(found, dtype=torch.float64, device=values.device).reshape(values.shape[1:])

    def _khat_of(self, values: Tensor, ratios: Tensor) -> float:
        tails = [torch.where(side > 0, side.abs().log() + ratios, -torch.inf) for side in (values, -values)]
        return max(self.khat, *(tail_shape(tail) for tail in tails))

    @property
    def elbo(self) -> float:
        """Mean log ratio, a lower bound of the log evidence (nats)."""
        return self.log_ratios.double().mean().item()

    @property
    def log_evidence(self) -> float:
        """log p(data) in nats: the log of the mean ratio, its tail smoothed."""
        ratios = self.log_ratios.double()
        # smoothing keeps the ratios below the tail: any of them gives the constant that normalising took away
        kept = ratios.masked_fill(ratios.isneginf(), torch.inf).argsort()[: max(1, int(ratios.isfinite().sum()) // 2)]
        constant = (ratios[kept] - self.log_weights[kept]).median()
        return constant.item() - math.log(len(ratios))

    def expectation(self, function: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """The posterior mean of ``function(draws)`` (S, ...): its values averaged by the smoothed weights.

        Raises:
            ValueError: if the function's result has another leading dim than S.
        """
        values = self._values(function)
        weights = self.log_weights.exp().to(values.device)
        return torch.tensordot(weights, values.to(weights.dtype), 1)

    def _values(self, function: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        values = numbers("function(draws)", function(self.draws))
        if values.shape[:1] != self.log_weights.shape:
            raise ValueError(
                f"Expected function(draws).shape[0] == {len(self.log_weights)}; got {tuple(values.shape)}."
            )
        return values

    def resample(self, num_samples: int | None = None) -> dict[str, Tensor]:
        """Draws (num_samples, ...) of the smoothed weights, with replacement, S by default: for :func:`inference_data`.

        Drawn systematically: a draw of weight w comes num_samples w times, rounded up or down; then shuffled.
        """
        size = len(self.log_weights) if num_samples is None else num_samples
        check_sizes(1, num_samples=size)
        cumulative = self.log_weights.exp().cumsum(0)
        points = (torch.arange(size, device=cumulative.device) + torch.rand((), device=cumulative.device)) / size
        index = torch.searchsorted(cumulative, points.to(cumulative)).clamp(max=len(cumulative) - 1)
        index = index[torch.randperm(size, device=index.device)]
        return {name: value[index] for name, value in self.draws.items()}


def is_flat(log_ratios: Tensor) -> bool:
    """Whether ratios are equal, so that they have no tail."""
    return bool(log_ratios.max() - log_ratios.min() <= FLAT)


def tail_shape(log_terms: Tensor) -> float:
    """The shape of the upper tail of positive terms, given by their logarithms; -inf where there is none."""
    positive = log_terms > -torch.inf
    if not positive.any() or is_flat(log_terms[positive]):
        return -math.inf
    return arviz_compat.psislw(log_terms.where(positive, log_terms[positive].min() - 1))[1]


def psis(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 1000, **kwargs: Any
) -> Importance:
    """Draws of a guide, weighed by the model: k-hat, effective sample size, evidence, corrected expectations.

    Both programs are run with the same arguments, in one vectorised pass where that gives what single runs give. Discrete
    latents that the guide lacks and the model marks with ``infer={"enumerate": "parallel"}`` are summed out, one run a draw.

    Args:
        model: a Pyro model with its data observed.
        guide: a guide of all of its other latents.
        args: of model and guide.
        num_samples: S, draws of the guide.
        kwargs: of model and guide.

    Raises:
        ValueError: for latents that the guide leaves out, the model does not have or has in some runs only, guides of point
            estimates, subsampled plates, and NaN.
        NotImplementedError: if the distribution of a site has no ``log_prob``, such as a simulator at an observed site.

    Cost: S evaluations of model and guide, without gradients; at once, in S times the memory of one, where vectorised.

    Example:
        >>> import torch
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
        >>> result = psis(model, guide, torch.tensor(1.0))
        >>> result.khat, round(result.log_evidence, 3)
        (-inf, -1.516)
    """
    check_sizes(SMALLEST, num_samples=num_samples)
    found = draw(model, guide, args, kwargs, num_samples)
    if found.points:
        raise ValueError(
            f"Expected a guide with a density of each latent; got one value in all draws for {found.points}."
        )
    return Importance(found.log_p - found.log_q, found.draws)
