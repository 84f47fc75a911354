"""The initial Gaussian of a guide, from paths of an optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..core.random import seeded
from .arrow import Arrow
from .density import Density
from .integrated import by_rows
from .lanczos import low_rank_laplace
from .laplace import modes
from .low_rank import LowRank
from .normal import Normal, Pushed
from .pathfinder import ranked
from .paths import ascend

PATHS = 8  # starts of paths
ONE_BY_ONE = 2  # paths of models whose points are evaluated one by one
CANDIDATES = 4
ENDS = 2  # paths whose ends have a low-rank Laplace approximation
DRAWS, ALONE = 500, 50  # draws in the ELBO of a candidate, together and one by one
NUMBERS = 2**18  # numbers in the draws of more than ALONE


def by_pathfinder(density: Density, starts: Tensor) -> list[Normal]:
    """Returns the best Gaussians of all paths and of their ends."""
    found = ranked(density, ascend(density, starts))[:CANDIDATES]
    return [x if isinstance(x, Normal) else Normal(x.transform.loc, x.transform.lower()) for _, x in found]


def by_laplace(density: Density, starts: Tensor) -> list[Normal]:
    """Returns the Laplace approximations at the ends of paths."""
    return modes(density, ascend(density, starts))


def by_directions(density: Density, starts: Tensor, rank: int, ends: bool) -> list[Normal | Pushed]:
    """Returns low-rank Laplace approximations at the ends of the best paths, and the best low-rank Gaussians of all paths."""
    paths = sorted((path for path in ascend(density, starts) if path), key=lambda path: -path[-1].value)
    laplace = [Pushed(low_rank_laplace(density, path[-1].point, rank)) for path in paths[:ENDS]]
    along = [] if ends else [normal for _, normal in ranked(density, paths, low_rank=True)[:CANDIDATES]]
    return [*laplace, *along]


def finder(kind: str, affine: Any, blocks: str | None) -> Callable[[Density, Tensor], Any]:
    """Returns a function of density and starts that returns Gaussians for the last layer of a guide.

    Args:
        kind: "pathfinder" or "laplace".
        affine: the layer.
        blocks: the plate of the layer's rows.
    """
    ends = kind == "laplace"
    if isinstance(affine, Arrow):
        return lambda density, starts: by_rows(density, affine, str(blocks), starts, ends)
    if isinstance(affine, LowRank):
        return lambda density, starts: by_directions(density, starts, len(affine.log_stretch), ends)
    return by_laplace if ends else by_pathfinder


def improve(
    affine: Any,
    posterior: Callable[[], Any],
    density: Density,
    candidates: Callable[[Density, Tensor], Any],
) -> bool:
    """Sets the affine map of a guide to the candidate with the highest ELBO, if that is higher than the guide's own.

    Args:
        affine: the last transform of the guide.
        posterior: returns the guide's distribution of the unconstrained latents (D,).
        density: the log density of the latents.
        candidates: returns Gaussians, given the density and the starts (S, D) of paths.

    Returns:
        Whether the map has changed.
    """
    draws = max(ALONE, min(DRAWS, NUMBERS // density.dim)) if density.batched else ALONE

    @torch.no_grad()
    def elbo() -> float:
        q = posterior()
        with seeded(0, affine.loc.device):
            z = q.sample((draws,))
        value = (density(z) - q.log_prob(z)).double().mean()
        return value.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item()

    first = affine()(torch.zeros_like(affine.loc)).detach()
    best, start, highest = copy.deepcopy(affine.state_dict()), -torch.inf, -torch.inf
    with suppress(ValueError, RuntimeError, LookupError):
        starts = density.starts(PATHS, first)  # from here on, a model with other latents in each run can raise
        if not density.batched:
            starts = starts[density(starts).topk(min(ONE_BY_ONE, len(starts))).indices]
        start = highest = elbo()
        for normal in candidates(density, starts):
            affine.put(*normal)
            if (value := elbo()) > highest:
                best, highest = copy.deepcopy(affine.state_dict()), value
    affine.load_state_dict(best)
    return highest > start
