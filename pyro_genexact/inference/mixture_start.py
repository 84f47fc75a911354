"""The start of a mixture of flows: Gaussians at several modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .density import Density, apart
from .laplace import MODES, distinct, laplace
from .normal import Normal
from .pathfinder import HESSIAN, best_of, normals_of
from .paths import DENSE, Iterate

DRAWS = 100  # draws of each candidate
ROUNDS = 50  # updates of the weights
MINOR = 1e-3  # nats; a mode that raises the ELBO by less is no separate component
SHIFT = 0.5  # standard deviations between copies of one Gaussian
EVEN = 0.1  # total initial weight that all components share, so that each is drawn in the first steps

Candidates = tuple[list[Normal], Tensor]


def modes_by_pathfinder(density: Density, paths: list[list[Iterate]], size: int) -> list[Candidates]:
    """Returns K Gaussians among the best ones of all paths and the Laplace approximations at their ends."""
    first: list[Normal] = []
    others: list[Normal] = []
    for i, group in enumerate(distinct(density, paths)):
        at_end = [laplace(density, group[0][-1].point)] if i < MODES + size and density.dim <= HESSIAN else []
        along = (normals_of(path, density.dim > DENSE) for path in group)
        found = [best_of(density, normals) for normals in (*along, *map(iter, zip(at_end)))]
        pairs = sorted((pair for pair in found if pair is not None), key=lambda pair: -pair[0])
        normals = [normal.dense() for _, normal in pairs]
        first, others = first + normals[:1], others + normals[1:]
    return mixtures(density, first, others, size)


def modes_by_laplace(density: Density, paths: list[list[Iterate]], size: int) -> list[Candidates]:
    """Returns K Laplace approximations at ends of paths."""
    groups = distinct(density, paths)[: MODES + size] if density.dim <= HESSIAN else []
    normals = [laplace(density, group[0][-1].point) for group in groups]
    return mixtures(density, [x for x in normals if best_of(density, iter([x])) is not None], [], size)


def mixtures(density: Density, first: list[Normal], others: list[Normal], size: int) -> list[Candidates]:
    """Returns K Gaussians and their weights (K,), or nothing if there is no candidate.

    Candidates are added one after another, each time the one for which the mixture with optimal weights has the highest ELBO:
    first those of ``first``, one for each mode, as long as one matters, then all others. If there are fewer than K candidates,
    copies of the heaviest one with shifted means come last.
    """
    if not first:
        return []
    found = _Weighed(density, [*first, *others])
    chosen = found.added([], range(len(first)), min(size, len(first)), MINOR)
    chosen = found.added(chosen, range(len(found.normals)), min(size, len(found.normals)), -math.inf)
    normals = [found.normals[i] for i in chosen]
    weights = found.weights([chosen])[1][0]
    missing = size - len(normals)
    if missing:
        heaviest = normals[int(weights.argmax())]
        for _ in range(missing):
            noise = torch.randn_like(heaviest.mean)
            normals.append(heaviest._replace(mean=heaviest.at((SHIFT * noise / noise.norm())[None])[0]))
        share = torch.zeros(size).to(weights)
        share[: len(chosen)] = weights
        share[[int(weights.argmax()), *range(len(chosen), size)]] = weights.max() / (missing + 1)
        weights = share
    return [(normals, (1 - EVEN) * weights + EVEN / size)]


class _Weighed:
    """Candidates with the log densities of the model and of all candidates at draws of each."""

    def __init__(self, density: Density, normals: list[Normal]) -> None:
        self.normals = normals
        draws = DRAWS if density.batched else DRAWS // 5
        noise = torch.randn(draws, density.dim, dtype=torch.float64, device="cpu")
        points = torch.cat([normal.at(noise) for normal in normals])
        with torch.no_grad():
            self.log_p = density(points).reshape(len(normals), draws)  # (C, N)
        log_q = torch.stack([normal.log_prob(points) for normal in normals], -1)
        self.log_q = log_q.reshape(len(normals), draws, len(normals))  # (C, N, C)

    def weights(self, candidates: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns the highest ELBOs (M,) of mixtures of M times k candidates, and their weights (M, k).

        The weights are those of mirror ascent, w_k <- w_k exp(E_k[log p - log q]), normalised, as for the capacity of a channel.
        """
        subsets = torch.tensor(candidates, device="cpu")
        log_p = self.log_p[subsets]  # (M, k, N)
        log_q = self.log_q[subsets[:, :, None], :, subsets[:, None, :]].movedim(-1, 2)  # (M, k, N, k)
        log_w = torch.zeros(subsets.shape).to(log_p).log_softmax(-1)
        for _ in range(ROUNDS):
            log_w = (log_w + self._gains(log_p, log_q, log_w)).log_softmax(-1)
        elbos = (log_w.exp() * self._gains(log_p, log_q, log_w)).sum(-1)
        return elbos.nan_to_num(-torch.inf, -torch.inf, -torch.inf), log_w.exp()

    @staticmethod
    def _gains(log_p: Tensor, log_q: Tensor, log_w: Tensor) -> Tensor:
        return (log_p - (log_q + log_w[:, None, None]).logsumexp(-1)).mean(-1)

    def added(self, chosen: list[int], pool: Any, size: int, least: float) -> list[int]:
        """Adds candidates of a pool until there are ``size``, or until the ELBO rises by less than ``least``."""
        highest = self.weights([chosen])[0].item() if chosen else -math.inf
        while len(chosen) < size:
            left = [i for i in pool if i not in chosen]
            elbos, _ = self.weights([[*chosen, i] for i in left])
            best = int(elbos.argmax())
            if not elbos[best] > highest + least and chosen:
                break
            chosen, highest = [*chosen, left[best]], elbos[best].item()
        return chosen


def spread(loc: Tensor, scale: float, size: int, density: Callable[[], Density]) -> list[Tensor]:
    """Returns K points (D,): loc, and starts of paths or loc again, with noise of standard deviation ``scale``, as starts repeat."""
    points: Sequence[Tensor] = ()
    with suppress(ValueError, RuntimeError, LookupError), apart():
        points = density().starts(size, loc)[1:].to(loc).unbind()
    others = [*points, *[loc] * (size - 1 - len(points))]
    return [loc, *(point + scale * torch.randn_like(loc) for point in others)]
