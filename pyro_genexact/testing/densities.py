"""Helpers for laws of distributions: log densities without validation, quadrature, samples and goodness of fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from math import inf, prod
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from .helpers import broken, same, seeded


def unvalidated_log_prob(d: Any, value: Tensor) -> Tensor:
    """Returns log_prob without validation in the distribution and in all distributions that it contains."""
    with pyro.validation_enabled(False):
        return _unvalidated(d).log_prob(value)


def _unvalidated(d: Any) -> Any:
    d = copy.copy(d)
    d.__dict__.pop("_validate_args", None)
    if hasattr(d, "base_dist"):
        d.base_dist = _unvalidated(d.base_dist)
    return d


def log_density(d: Any, u: Tensor) -> Tensor:
    """Returns the log density of unconstrained values (N, *batch, size)."""
    t = biject_to(d.support)
    u = u.reshape(*u.shape[:-1], *t.inverse_shape(d.event_shape))
    y = t(u)
    return unvalidated_log_prob(d, y) + t.log_abs_det_jacobian(u, y)


def quadrature(d: Any, points: int = 500, chunk: int = 100_000) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields points (N, *batch, size), weights (N, *batch) and densities of a trapezoid rule in sinh-spaced coordinates."""
    like = d.sample()
    size = prod(biject_to(d.support).inverse_shape(d.event_shape))
    if size > 2:
        raise ValueError(f"Expected a distribution of one or two unconstrained numbers; got {size}.")
    v = torch.linspace(-8.0, 8.0, 10 * points if size == 1 else points, dtype=like.dtype, device=like.device)
    axis, weight = v.sinh(), v.cosh() * (v[1] - v[0])
    grid = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
    weights = torch.cartesian_prod(*[weight] * size).reshape(-1, size).prod(-1)
    for u, w in zip(grid.split(chunk), weights.split(chunk), strict=True):
        u = u.reshape(-1, *[1] * len(d.batch_shape), size).expand(-1, *d.batch_shape, -1)
        w = w.reshape(-1, *[1] * len(d.batch_shape)).expand(u.shape[:-1])
        with torch.no_grad():
            yield u, w, log_density(d, u).exp()


def drawn(law: str, case: str, d: Any, count: int) -> Iterator[tuple[str, Tensor]]:
    """Yields samples (count, *batch, *event), directly and by ``expand``, with their case, after checking the support."""
    ways: dict[str, Callable[[], Tensor]] = {
        "sample": lambda: d.sample(torch.Size([count])),
        "sample of expand": lambda: d.expand((count, *d.batch_shape)).sample(),
    }
    for name, draw in ways.items():
        with seeded(0):
            y = draw()
        if not d.support.check(y).all():
            broken(law, f"{name}{case}", "a value outside the support")
        yield f"{name}{case}", y


def frequencies(law: str, case: str, draws: Tensor, values: Tensor, log_prob: Tensor, limit: float = 5.0) -> None:
    """Checks that draws (M, *batch, *event) have the values (N, *batch or 1s, *event) with probabilities exp(log_prob)."""
    dim = log_prob.dim()
    seen = torch.stack([(draws == v).unsqueeze(-1).flatten(dim).all(-1).sum(0) for v in values]).to(log_prob)
    same(law, f"{case}, draws among all values", seen.sum(0).min().item(), float(len(draws)))
    goodness_of_fit(law, case, seen, len(draws) * log_prob.detach().exp(), limit)


def goodness_of_fit(law: str, case: str, observed: Tensor, expected: Tensor, limit: float = 5.0) -> None:
    """Checks counts (N, *batch) against the expected ones by Pearson's chi-square.

    The statistic is compared with ``limit`` standard deviations of a normal (Wilson, Hilferty 1931).
    """
    if (observed[expected == 0] > 0).any():
        broken(law, case, "a value of probability 0")
    rare = expected < 5  # rare values and the least frequent of the others are joined to one cell
    rare = rare.scatter(0, expected.masked_fill(rare, inf).argmin(0, keepdim=True), True)
    cells = [(torch.where(rare, 0.0, n), torch.where(rare, n, 0.0).sum(0, keepdim=True)) for n in (observed, expected)]
    observed, expected = (torch.cat(pair) for pair in cells)
    terms = torch.where(expected > 0, (observed - expected).square() / expected.clamp(min=1e-300), 0.0)
    freedom = ((expected > 0).sum(0) - 1).clamp(min=1)
    spread = 2 / (9 * freedom)
    z = ((terms.sum(0) / freedom) ** (1 / 3) - (1 - spread)) / spread.sqrt()
    if not z.max() < limit:
        broken(law, case, f"chi-square {z.max():.3g} deviations off, not below {limit}")
