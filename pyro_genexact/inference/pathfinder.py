"""Pathfinder: Gaussians along the paths of a quasi-Newton optimiser, chosen by their ELBO."""

from __future__ import annotations

import math
from itertools import chain

import torch

from .density import Density
from .laplace import modes
from .normal import Normal
from .paths import Iterate, gaussians

DRAWS = 20  # draws in the estimate of the ELBO of each iterate


def elbos(density: Density, normals: list[Normal], draws: int = DRAWS) -> list[float]:
    """Estimates ELBOs (nats), -inf where not finite, from the same standard normal draws for each distribution."""
    noise = torch.randn(draws, density.dim, dtype=torch.float64)
    with torch.no_grad():
        log_p = density(torch.cat([normal.at(noise) for normal in normals])).reshape(len(normals), draws)
    found = log_p - torch.stack([normal.log_prob_at(noise) for normal in normals])
    return found.mean(1).nan_to_num(-torch.inf, -torch.inf, -torch.inf).tolist()  # type: ignore[no-any-return]


def ranked(density: Density, paths: list[list[Iterate]]) -> list[tuple[float, Normal]]:
    """Returns the Gaussian with the highest ELBO on each path and the Laplace approximations at their ends, with their ELBOs.

    They are sorted by ELBO, the highest first; those of no finite ELBO are left out.

    Reference: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel quasi-Newton variational inference", JMLR 2022.
    """
    groups = chain(
        map(normals_of, paths), ([normal] for normal in modes(density, paths))
    )  # one path in memory at a time
    best = (best_of(density, normals) for normals in groups)
    return sorted((pair for pair in best if pair is not None), key=_first, reverse=True)


def best_of(density: Density, normals: list[Normal]) -> tuple[float, Normal] | None:
    """Returns the Gaussian with the highest ELBO, and this; None if no ELBO is finite."""
    pairs = zip(elbos(density, normals), normals, strict=True) if normals else ()
    return max((pair for pair in pairs if math.isfinite(pair[0])), key=_first, default=None)


def _first(pair: tuple[float, Normal]) -> float:
    return pair[0]


def normals_of(path: list[Iterate]) -> list[Normal]:
    """Returns the Gaussians of the iterates of a path."""
    found = []
    for mean, covariance in gaussians(path):
        root, failed = torch.linalg.cholesky_ex(covariance)
        if not failed and mean.isfinite().all():
            found.append(Normal(mean, root))
    return found
