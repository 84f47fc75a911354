"""Quasi-Newton ascent (BFGS) of a log density from several starts at once."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .density import Density

ITERATIONS = 200  # maximum number of steps of a path
TRIALS = 20  # maximum number of step lengths on a line
SUFFICIENT, FLAT = 1e-4, 0.1  # of the slope at the start of a line: gain per step length, and final slope
LONGER = 10.0  # maximum ratio of successive step lengths
LATE = 2  # the last passes, in units of those after which half of the paths have ended
SMALL = 1e-6  # nats; a path ends when it gains less
CURVED = 1e-8  # minimum cosine of the angle between a step and the change of the gradient


class Iterate(NamedTuple):
    """A point (D,) with its log density and gradient (D,), in float64 on the CPU."""

    point: Tensor
    value: float
    gradient: Tensor


Search = Generator[Tensor, Iterate, Any]  # asks for points, is sent iterates


def ascend(density: Density, starts: Tensor, iterations: int = ITERATIONS) -> list[list[Iterate]]:
    """Maximises a log density by BFGS, from starts (K, D), and returns the iterates of each path.

    Each pass evaluates one point of every path that has not ended. When half of the paths have ended, the others end after as
    many passes again. A path whose start has no finite density has no iterates.
    """
    paths: list[list[Iterate]] = [[] for _ in starts]
    searches = [
        _path(start, iterates, iterations, _eps(density)) for start, iterates in zip(starts, paths, strict=True)
    ]
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
    covariance: Tensor | None = None
    for old, new in pairwise(path):
        covariance = updated(covariance, new.point - old.point, old.gradient - new.gradient)
        if covariance is not None:
            yield new.point + covariance @ new.gradient, covariance


def updated(inverse: Tensor | None, step: Tensor, change: Tensor) -> Tensor | None:
    """Returns the BFGS update of an estimate (D, D) of the inverse of a negative Hessian, None for none so far.

    Args:
        inverse: the estimate.
        step: s (D,).
        change: y (D,), the decrease of the gradient along the step. Without positive curvature s'y, nothing changes.
    """
    sy, yy = (step @ change).item(), (change @ change).item()
    if not sy > CURVED * step.norm().item() * math.sqrt(yy):
        return inverse
    if inverse is None:
        inverse = torch.eye(len(step)).to(step) * (sy / yy)
    hy = inverse @ change
    cross = torch.outer(hy, step)
    return inverse + (1 + (change @ hy) / sy) / sy * torch.outer(step, step) - (cross + cross.mT) / sy


def _eps(density: Density) -> float:
    return torch.finfo(density.dtype).eps


def _path(start: Tensor, iterates: list[Iterate], iterations: int, eps: float) -> Search:
    """Appends its iterates to a list."""
    now = yield start.double().cpu()
    if not (math.isfinite(now.value) and now.gradient.isfinite().all()):
        return
    iterates.append(now)
    inverse: Tensor | None = None
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
