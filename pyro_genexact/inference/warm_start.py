"""The initial Gaussian of a guide, from paths of an optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..core.random import seeded
from .density import Density
from .gaussian import Gaussian
from .normal import Normal
from .pathfinder import ranked
from .paths import Iterate, ascend

PATHS = 8  # starts of paths
ONE_BY_ONE = 2  # paths of models whose points are evaluated one by one
CANDIDATES = 4
DRAWS, ALONE = 500, 50  # draws in the ELBO of a candidate, together and one by one


def by_pathfinder(density: Density, paths: list[list[Iterate]]) -> list[Normal]:
    """Returns the best Gaussians of all paths and of their ends."""
    return [normal for _, normal in ranked(density, paths)[:CANDIDATES]]


def improve(
    part: nn.Module,
    put: Callable[..., None],
    first: Gaussian,
    posterior: Callable[[], Any],
    density: Density,
    candidates: Callable[[Density, list[list[Iterate]]], Sequence[Any]],
    paths: int = PATHS,
) -> bool:
    """Puts the candidate with the highest ELBO into a guide, if that is higher than the guide's own.

    Args:
        part: what changes.
        put: is called with the items of a candidate, and changes this part.
        first: the map whose center is the first start.
        posterior: returns the guide's distribution of the unconstrained latents (D,).
        density: the log density of the latents.
        candidates: returns candidates from the paths, such as Gaussians.
        paths: the number of starts.

    Returns:
        Whether the guide has changed.
    """

    @torch.no_grad()
    def elbo() -> float:
        q = posterior()
        with seeded(0, first.loc.device):
            z = q.sample((DRAWS if density.batched else ALONE,))
        value = (density(z) - q.log_prob(z)).double().mean()
        return value.nan_to_num(-torch.inf, -torch.inf, -torch.inf).item()

    center = first()(torch.zeros_like(first.loc)).detach()
    best, start, highest = copy.deepcopy(part.state_dict()), -torch.inf, -torch.inf
    with suppress(ValueError, RuntimeError, LookupError):
        starts = density.starts(paths, center)  # from here on, a model with other latents in each run can raise
        if not density.batched:
            starts = starts[density(starts).topk(min(ONE_BY_ONE * paths // PATHS, len(starts))).indices]
        start = highest = elbo()
        for candidate in candidates(density, ascend(density, starts)):
            put(*candidate)
            if (value := elbo()) > highest:
                best, highest = copy.deepcopy(part.state_dict()), value
    part.load_state_dict(best)
    return highest > start
