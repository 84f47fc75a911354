"""Pareto-smoothed importance sampling (PSIS) with a guide as the proposal."""

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

SMALLEST = 25  # minimum number of draws; the tail then has five
FLAT = 1e-4  # nats; differences between log ratios below this are taken for rounding


@dataclass(frozen=True)
class Importance:
    """Draws of a guide with their log importance ratios log p - log q, where p is the joint density of latents and data.

    The largest weights are replaced by quantiles of a generalised Pareto distribution that is fitted to them. Its shape
    parameter k-hat measures the reliability of the draws. If it is below 0.5, the variance of the weights is finite. Up to
    :attr:`threshold` (0.7 for many draws), importance-weighted estimates are reliable. Above it, neither these estimates nor
    the guide's draws are reliable, even if the other numbers look good. None of the numbers detects posterior mass that the
    guide never samples.

    Args:
        log_ratios: (S,) in nats, S at least 25.
        draws: latents by name, (S, ...).

    Attributes:
        log_weights: (S,) in float64, logarithms of the smoothed weights w, whose sum is 1.
        khat: the shape parameter k-hat; -inf if the largest ratios are equal, as for the exact posterior, or for a latent with
            few values.
        ess: the effective sample size 1 / sum w^2, between 1 and S.

    Raises:
        ValueError: if ``log_ratios`` has another shape, contains NaN or infinity or only -inf, or if the number of draws
            differs from S.

    Reference: Vehtari et al., "Pareto smoothed importance sampling", JMLR 2024; Yao et al., "Yes, but did it work?", ICML 2018.

    Example:
        >>> import torch
        >>> x = torch.linspace(-3, 3, 1000, dtype=torch.float64)
        >>> exact = Importance(torch.full((1000,), -2.0), {"x": x})
        >>> exact.khat, round(exact.ess), round(exact.log_evidence, 6)
        (-inf, 1000, -2.0)
        >>> round(exact.expectation(lambda d: d["x"] ** 2).item(), 3)
        3.006
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
                f"Expected log_ratios to be finite or -inf; got NaN or infinity for {bad} of {len(ratios)} draws."
            )
        if not ratios.isfinite().any():
            raise ValueError("Expected draws of positive density under the model; got -inf for all log_ratios.")
        if wrong := {name: tuple(x.shape) for name, x in self.draws.items() if x.shape[:1] != ratios.shape}:
            raise ValueError(f"Expected draws of shape ({len(ratios)}, ...), one per ratio; got {wrong}.")
        weights, khat = (
            (ratios.double().log_softmax(0), -math.inf) if is_flat(ratios, len(ratios)) else arviz_compat.psislw(ratios)
        )
        ess = (-(2 * weights).logsumexp(0)).exp().item()
        for name, value in (("log_weights", weights), ("khat", khat), ("ess", ess)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Importance(khat={self.khat:.2f}, ess={self.ess:.0f} of {len(self.log_ratios)})"

    @property
    def threshold(self) -> float:
        """The largest k-hat for which S draws are enough, min(1 - 1 / log10(S), 0.7)."""
        return min(1 - 1 / math.log10(len(self.log_ratios)), 0.7)

    def khat_of(self, function: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Computes k-hat for the estimate of E[function(draws)], elementwise.

        It is the largest of ``khat`` and of the shape parameters of both tails of values times ratios. ``khat`` alone is
        enough for the evidence and for expectations of bounded functions. Values that grow, such as squares, can have
        heavier tails.

        Args:
            function: a function from the draws to values (S, ...).

        Returns:
            A float64 tensor (...).

        Raises:
            TypeError: if the values are not a tensor of real numbers.
            ValueError: if the first dim of the values is not S, or if they are not finite.
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
        """The mean log ratio (nats), an estimate of a lower bound of the log evidence."""
        return self.log_ratios.double().mean().item()

    @property
    def log_evidence(self) -> float:
        """An estimate of log p(data) in nats, the logarithm of the mean of the smoothed ratios."""
        ratios = self.log_ratios.double()
        # smoothing leaves ratios below the tail unchanged, so each of them gives the normalising constant of the weights
        kept = ratios.masked_fill(ratios.isneginf(), torch.inf).argsort()[: max(1, int(ratios.isfinite().sum()) // 2)]
        constant = (ratios[kept] - self.log_weights[kept]).median()
        return constant.item() - math.log(len(ratios))

    def expectation(self, function: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Estimates the posterior mean of a function by the mean of its values with the smoothed weights.

        Args:
            function: a function from the draws to values (S, ...).

        Returns:
            A float64 tensor (...).

        Raises:
            TypeError: if the values are not a tensor of real numbers.
            ValueError: if the first dim of the values is not S.
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
        """Resamples the draws with the smoothed weights, with replacement, for use in :func:`inference_data`.

        The sampling is systematic: a draw with weight w is in the result num_samples w times, rounded up or down. The
        result is shuffled.

        Args:
            num_samples: the number of new draws, by default S.

        Returns:
            Draws (num_samples, ...) by name.

        Raises:
            ValueError: if ``num_samples`` is not a positive integer.
        """
        size = len(self.log_weights) if num_samples is None else num_samples
        check_sizes(1, num_samples=size)
        index = systematic(self.log_weights, size)
        index = index[torch.randperm(size, device=index.device)]
        return {name: value[index] for name, value in self.draws.items()}


def systematic(log_weights: Tensor, size: int) -> Tensor:
    """Draws indices (size,) in ascending order; index i comes size * w_i times, rounded up or down."""
    cumulative = log_weights.exp().cumsum(0)
    options: Any = {
        "dtype": cumulative.dtype,
        "device": cumulative.device,
    }  # in float32, the last point can be rounded up to 1
    points = (torch.arange(size, **options) + torch.rand((), **options)) / size * cumulative[-1]
    return torch.searchsorted(cumulative, points, right=True).clamp(max=len(cumulative) - 1)


def is_flat(log_ratios: Tensor, size: int) -> bool:
    """Returns whether the largest log ratios, which are the tail of ``size`` draws, are equal up to rounding."""
    length = math.ceil(min(size / 5, 3 * size**0.5))
    tail = log_ratios.topk(min(len(log_ratios), length + 1)).values
    return bool(tail[0] - tail[-1] <= FLAT)


def tail_shape(log_terms: Tensor) -> float:
    """Returns the shape parameter of the upper tail of positive terms, from their logarithms; -inf if there is no tail."""
    positive = log_terms > -torch.inf
    if not positive.any() or is_flat(log_terms[positive], len(log_terms)):
        return -math.inf
    return arviz_compat.psislw(log_terms.where(positive, log_terms[positive].min() - 1))[1]


def psis(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 1000, **kwargs: Any
) -> Importance:
    """Computes importance weights of a guide's draws: k-hat, effective sample size, evidence and corrected expectations.

    Model and guide are run with the same arguments, in one vectorised pass if that agrees with single runs. Discrete latents
    that only the model has, and that it marks with ``infer={"enumerate": "parallel"}``, are summed out.

    Args:
        model: a Pyro model with observed data.
        guide: a guide of all other latents.
        args: arguments of model and guide.
        num_samples: S, the number of draws of the guide, at least 25.
        kwargs: keyword arguments of model and guide.

    Returns:
        The draws with their log ratios and weights.

    Raises:
        ValueError: if guide and model do not have the same latents in every run, if the guide has point estimates, if a
            plate is subsampled, or if a log ratio is NaN.
        NotImplementedError: if the distribution of a site has no ``log_prob``, such as a simulator at an observed site.

    Reference: see :class:`Importance`.

    Cost: S evaluations of model and guide without gradients. If they are vectorised, S times the memory of one evaluation.

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
    return Importance(found.log_ratios, found.draws)
