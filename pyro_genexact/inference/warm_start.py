"""The initial Gaussian of a guide, from paths of an optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..core.random import seeded
from .density import Density
from .gaussian import Gaussian
from .laplace import modes
from .pathfinder import Normal, best_of
from .paths import Iterate, ascend

PATHS = 8  # starts of paths
ONE_BY_ONE = 2  # paths of models whose points are evaluated one by one
DRAWS = 500  # draws in the ELBO of a candidate


def by_laplace(density: Density, paths: list[list[Iterate]]) -> list[Normal]:
    """Returns the Laplace approximations at the ends of the paths."""
    return modes(density, paths)


def by_pathfinder(density: Density, paths: list[list[Iterate]]) -> list[Normal]:
    """Returns the best Gaussian of the iterates of all paths, and the Laplace approximations at their ends."""
    best = sorted(best_of(density, paths), key=lambda pair: -pair[0])
    return [normal for _, normal in best[:2]] + modes(density, paths)


def improve(
    affine: Gaussian,
    posterior: Callable[[], Any],
    density: Density,
    candidates: Callable[[Density, list[list[Iterate]]], list[Normal]],
) -> bool:
    """Sets the affine map of a guide to the candidate with the highest ELBO, if that is higher than the guide's own.

    Args:
        affine: the last transform of the guide.
        posterior: returns the guide's distribution of the unconstrained latents (D,).
        density: the log density of the latents.
        candidates: returns Gaussians from the paths.

    Returns:
        Whether the map has changed.
    """
    draws = DRAWS if density.batched else 2 * DRAWS // 16

    @torch.no_grad()
    def elbo() -> float:
        q = posterior()
        with seeded(0, affine.loc.device):
            z = q.sample((draws,))
        value = (density(z) - q.log_prob(z)).double().mean()
        return value.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item()

    with torch.random.fork_rng([]):
        first = affine()(torch.zeros_like(affine.loc)).detach()
        starts = density.starts(PATHS, first)
        if not density.batched:
            starts = starts[density(starts).topk(min(ONE_BY_ONE, len(starts))).indices]
        best, start = copy.deepcopy(affine.state_dict()), elbo()
        highest = start
        for normal in candidates(density, ascend(density, starts)):
            affine.put(*normal)
            if (value := elbo()) > highest:
                best, highest = copy.deepcopy(affine.state_dict()), value
        affine.load_state_dict(best)
    return highest > start
