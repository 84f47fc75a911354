"""Quasi-Newton ascent (BFGS) of a log density from several starts at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .density import Density
from .low_rank import LowRankAffine
from .secants import dense, limited

ITERATIONS = 200  # maximum number of steps of a path
TRIALS = 20  # maximum number of step lengths on a line
SUFFICIENT, FLAT = 1e-4, 0.1  # of the slope at the start of a line: gain per step length, and final slope
LONGER = 10.0  # maximum ratio of successive step lengths
LATE = 2  # the last passes, in units of those after which half of the paths have ended
SMALL = 1e-6  # nats; a path ends when it gains less
DENSE = 100  # maximum number of latents with a dense estimate of the inverse Hessian


class Iterate(NamedTuple):
    """A point (D,) with its log density and gradient (D,), in float64 on the CPU."""

    point: Tensor
    value: float
    gradient: Tensor


Search = Generator[Tensor, Iterate, Any]  # asks for points, is sent iterates


def ascend(density: Density, starts: Tensor, iterations: int = ITERATIONS) -> list[list[Iterate]]:
    """Maximises a log density by BFGS, from starts (K, D), and returns the iterates of each path.

    With more than 100 latents, it is L-BFGS, whose memory is O(D) per path, apart from the iterates.

    Each pass evaluates one point of every path that has not ended. When half of the paths have ended, the others end after as
    many passes again. A path whose start has no finite density has no iterates.
    """
    paths: list[list[Iterate]] = [[] for _ in starts]
    settings = iterations, torch.finfo(density.dtype).eps, dense if starts.shape[1] <= DENSE else limited
    searches = [_path(start, iterates, *settings) for start, iterates in zip(starts, paths, strict=True)]
    asked = {search: next(search) for search in searches}
    passes, last = 0, math.inf
    while asked and passes < last:
        passes += 1
        points = torch.stack(list(asked.values()))
        values, gradients = density.gradients(points)
        found = map(Iterate, points, values.tolist(), gradients)
        new = {}
        for search, iterate in zip(asked, found, strict=True):
            with suppress(StopIteration):
                new[search] = search.send(iterate)
        asked = new
        if 2 * len(asked) <= len(starts):
            last = min(last, LATE * (passes + 10))
    return paths


def gaussians(path: list[Iterate]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the mean (D,) and the covariance (D, D), an estimate of the inverse Hessian, after each step of a path."""
    yield from _gaussians(path, dense)


def limited_gaussians(path: list[Iterate]) -> Iterator[LowRankAffine]:
    """Yields the map from noise to the Gaussian of the L-BFGS estimate after each step of a path. Memory: O(D)."""
    for mean, inverse in _gaussians(path, limited):
        yield inverse.root(mean)


def _gaussians(path: list[Iterate], updated: Callable[[Any, Tensor, Tensor], Any]) -> Iterator[tuple[Tensor, Any]]:
    inverse = None
    for old, new in pairwise(path):
        inverse = updated(inverse, new.point - old.point, old.gradient - new.gradient)
        if inverse is not None:
            yield new.point + inverse @ new.gradient, inverse


def _path(
    start: Tensor, iterates: list[Iterate], iterations: int, eps: float, updated: Callable[[Any, Tensor, Tensor], Any]
) -> Search:
    """Appends its iterates to a list."""
    now = yield start.double().cpu()
    if not (math.isfinite(now.value) and now.gradient.isfinite().all()):
        return
    iterates.append(now)
    inverse: Any = None
    for _ in range(iterations):
        small = SMALL + eps * abs(now.value)
        step = now.gradient / max(1.0, now.gradient.norm().item()) if inverse is None else inverse @ now.gradient
        if not (slope := (step @ now.gradient).item()) > small:
            return
        new = yield from _along(now, step, slope)
        if new is None:
            return
        inverse = updated(inverse, new.point - now.point, now.gradient - new.gradient)
        iterates.append(new)
        if not new.value - now.value > small:
            return
        now = new


def _along(start: Iterate, step: Tensor, slope: float) -> Search:
    """Searches start + t step until gain and slope satisfy Wolfe's conditions; returns the best point, or None.

    The secant of the slopes gives the next t, which is exact for quadratic functions.
    """
    best: Iterate | None = None
    low, high, t = (0.0, slope), (math.inf, math.nan), 1.0
    for _ in range(TRIALS):
        new = yield start.point + t * step
        good = new.value >= start.value + SUFFICIENT * t * slope and bool(new.gradient.isfinite().all())
        here = (new.gradient @ step).item()
        if good and (best is None or new.value > best.value):
            best = new
        if good and abs(here) <= FLAT * slope:
            break
        if good and here > 0:
            low = (t, here)
        else:
            high = (t, here)
        t = _next(low, high, slope)
    return best


def _next(low: tuple[float, float], high: tuple[float, float], slope: float) -> float:
    """Returns the zero of the secant of the slopes inside of a bracket, or beyond ``low`` if nothing limits t."""
    (t, here), (end, there) = low, high
    if math.isinf(end):
        zero = t * slope / (slope - here) if here < slope else math.inf
        return min(max(zero, 1.05 * t), LONGER * t)
    share = here / (here - there) if there < 0 else 0.3
    return t + (end - t) * min(max(share, 0.05), 0.95)
