"""The initial Gaussian of a guide, from paths of an optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from .mixture_guide import FlowMixture
from .mixture_start import modes_by_laplace, modes_by_pathfinder
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
    return [normal.dense() for _, normal in found]


def by_laplace(density: Density, starts: Tensor) -> list[Normal]:
    """Returns the Laplace approximations at the ends of paths."""
    return modes(density, ascend(density, starts))


def by_directions(density: Density, starts: Tensor, rank: int, ends: bool) -> list[Normal | Pushed]:
    """Returns low-rank Laplace approximations at the ends of the best paths, and the best low-rank Gaussians of all paths."""
    paths = sorted((path for path in ascend(density, starts) if path), key=lambda path: -path[-1].value)
    laplace = [Pushed(low_rank_laplace(density, path[-1].point, rank)) for path in paths[:ENDS]]
    along = [] if ends else [normal for _, normal in ranked(density, paths, low_rank=True)[:CANDIDATES]]
    return [*laplace, *along]


def finder(kind: str, part: Any, blocks: str | None) -> Callable[[Density, Tensor], Any]:
    """Returns a function of density and starts that returns candidates for a part of a guide.

    Args:
        kind: "pathfinder" or "laplace".
        part: the last layer of a flow, or a mixture of flows.
        blocks: the plate of the layer's rows.
    """
    ends = kind == "laplace"
    if isinstance(part, FlowMixture):
        find = modes_by_laplace if ends else modes_by_pathfinder
        return lambda density, starts: find(density, ascend(density, starts), len(part.parts))
    if isinstance(part, Arrow):
        return lambda density, starts: by_rows(density, part, str(blocks), starts, ends)
    if isinstance(part, LowRank):
        return lambda density, starts: by_directions(density, starts, len(part.log_stretch), ends)
    return by_laplace if ends else by_pathfinder


def improve(
    part: Any,
    center: Tensor,
    posterior: Callable[[], Any],
    density: Density,
    candidates: Callable[[Density, Tensor], Any],
    paths: int = PATHS,
) -> bool:
    """Puts the candidate with the highest ELBO into a guide, if that is higher than the guide's own.

    Args:
        part: the module whose method ``put`` is called with the items of a candidate.
        center: the first start (D,).
        posterior: returns the guide's distribution of the unconstrained latents (D,).
        density: the log density of the latents.
        candidates: returns candidates, such as Gaussians, given the density and the starts (S, D) of paths.
        paths: the number of starts.

    Returns:
        Whether the guide has changed.
    """
    draws = max(ALONE, min(DRAWS, NUMBERS // density.dim)) if density.batched else ALONE

    @torch.no_grad()
    def elbo() -> float:
        q = posterior()
        with seeded(0, center.device):
            z = q.sample((draws,))
        value = (density(z) - q.log_prob(z)).double().mean()
        return value.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item()

    best, start, highest = copy.deepcopy(part.state_dict()), -torch.inf, -torch.inf
    try:
        starts = density.starts(paths, center)  # from here on, a model with other latents in each run can raise
        if not density.batched:
            starts = starts[density(starts).topk(min(ONE_BY_ONE * paths // PATHS, len(starts))).indices]
        start = highest = elbo()
        for candidate in candidates(density, starts):
            part.put(*candidate)
            if (value := elbo()) > highest:
                best, highest = copy.deepcopy(part.state_dict()), value
    except (ValueError, RuntimeError, LookupError):
        pass  # the best candidate so far
    finally:  # also after an interrupt
        part.load_state_dict(best)
    return highest > start
