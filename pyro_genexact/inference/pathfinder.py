"""Pathfinder: Gaussians along the paths of a quasi-Newton optimiser, chosen by their ELBO."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .density import Density
from .paths import Iterate, gaussians

DRAWS = 20  # draws in the estimate of the ELBO of each iterate


class Normal(NamedTuple):
    """A multivariate normal distribution with mean (D,) and a lower triangular root (D, D) of the covariance."""

    mean: Tensor
    root: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """Returns mean + root noise, (S, D)."""
        return self.mean + noise @ self.root.mT

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log densities (S,) at points (S, D)."""
        noise = torch.linalg.solve_triangular(self.root, (z - self.mean).mT, upper=False)
        return self.log_prob_at(noise.mT)

    def log_prob_at(self, noise: Tensor) -> Tensor:
        """Returns log densities (S,) at mean + root noise."""
        constant = len(self.mean) * math.log(2 * math.pi) / 2 + self.root.diagonal().log().sum()
        return -noise.square().sum(1) / 2 - constant


def elbos(density: Density, normals: list[Normal], draws: int = DRAWS) -> list[float]:
    """Estimates ELBOs (nats), -inf where not finite, from the same standard normal draws for each distribution."""
    if not normals:
        return []
    noise = torch.randn(draws, density.dim, dtype=torch.float64)
    with torch.no_grad():
        log_p = density(torch.cat([normal.at(noise) for normal in normals])).reshape(len(normals), draws)
    found = log_p - torch.stack([normal.log_prob_at(noise) for normal in normals])
    return found.mean(1).nan_to_num(-torch.inf, -torch.inf, -torch.inf).tolist()  # type: ignore[no-any-return]


def best_of(density: Density, paths: list[list[Iterate]]) -> list[tuple[float, Normal]]:
    """Returns the Gaussian with the highest ELBO on each path, and that ELBO; paths without one are left out.

    Reference: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel quasi-Newton variational inference", JMLR 2022.
    """
    normals = [list(_normals(path)) for path in paths]
    values = iter(elbos(density, [normal for some in normals for normal in some]))
    best = [max(((next(values), n) for n in some), key=lambda pair: pair[0], default=None) for some in normals]
    return [pair for pair in best if pair and math.isfinite(pair[0])]


def _normals(path: list[Iterate]) -> list[Normal]:
    found = []
    for mean, covariance in gaussians(path):
        root, failed = torch.linalg.cholesky_ex(covariance)
        if not failed and mean.isfinite().all():
            found.append(Normal(mean, root))
    return found
