"""Pathfinder: Gaussians along the paths of a quasi-Newton optimiser, chosen by their ELBO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice

import torch

from .density import Density
from .laplace import modes
from .normal import Normal, Pushed
from .paths import DENSE, Iterate, gaussians, limited_gaussians

HESSIAN = 1000  # maximum number of latents with Laplace approximations
DRAWS = 20  # draws in the estimate of the ELBO of each iterate
NUMBERS = 2**22  # maximum of numbers in the draws that are evaluated together


def elbos(density: Density, normals: Sequence[Normal | Pushed], draws: int = DRAWS) -> list[float]:
    """Estimates ELBOs (nats), -inf where not finite, from the same standard normal draws for each distribution."""
    noise = torch.randn(draws, density.dim, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        log_p = density(torch.cat([normal.at(noise) for normal in normals])).reshape(len(normals), draws)
    found = log_p - torch.stack([normal.log_prob_at(noise) for normal in normals])
    return found.mean(1).nan_to_num(-torch.inf, -torch.inf, -torch.inf).tolist()  # type: ignore[no-any-return]


def ranked(density: Density, paths: list[list[Iterate]], low_rank: bool = False) -> list[tuple[float, Normal | Pushed]]:
    """Returns the Gaussian with the highest ELBO on each path and the Laplace approximations at their ends, with their ELBOs.

    They are sorted by ELBO, the highest first; those of no finite ELBO are left out. With more than 100 latents, the
    Gaussians on the paths are those of L-BFGS. With more than 1000 latents, there are no Laplace approximations.

    Args:
        density: the log density.
        paths: of its ascents.
        low_rank: whether to return Gaussians of L-BFGS only.

    Reference: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel quasi-Newton variational inference", JMLR 2022.
    """
    ends = [] if low_rank or density.dim > HESSIAN else modes(density, paths)
    along = map(partial(normals_of, low_rank=low_rank or density.dim > DENSE), paths)
    groups = chain(along, (iter([normal]) for normal in ends))  # one path in memory at a time
    best = [pair for normals in groups if (pair := best_of(density, normals))]
    return sorted(best, key=_first, reverse=True)


def best_of(density: Density, normals: Iterator[Normal | Pushed]) -> tuple[float, Normal | Pushed] | None:
    """Returns the distribution with the highest finite ELBO, and that."""
    best: tuple[float, Normal | Pushed] | None = None
    while some := list(islice(normals, max(1, NUMBERS // (DRAWS * density.dim)))):
        pairs = [pair for pair in zip(elbos(density, some), some, strict=True) if math.isfinite(pair[0])]
        best = max([*([best] if best else []), *pairs], key=_first, default=None)
    return best


def _first(pair: tuple[float, Normal | Pushed]) -> float:
    return pair[0]


def normals_of(path: list[Iterate], low_rank: bool) -> Iterator[Normal | Pushed]:
    """Yields the Gaussians of the iterates of a path, those of L-BFGS with ``low_rank``."""
    if low_rank:
        yield from (Pushed(root) for root in limited_gaussians(path) if all(t.isfinite().all() for t in root.watched()))
        return
    for mean, covariance in gaussians(path):
        root, failed = torch.linalg.cholesky_ex(covariance)
        if not failed and mean.isfinite().all():
            yield Normal(mean, root)
