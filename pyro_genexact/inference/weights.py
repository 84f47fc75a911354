"""Weights: running averages and the best values of a guide's parameters; the best ones are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

State = dict[Tensor, Tensor]


class Weights:
    """Values of parameters that are kept on the way."""

    def __init__(self) -> None:
        self.start: State = {}
        self.average: State = {}
        self.best: State = {}

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Keeps the start of new parameters."""
        self.start |= _copies(parameters)

    @torch.no_grad()
    def follow(self, parameters: Iterable[Tensor], weight: float) -> None:
        """Moves the averages towards parameters by a weight."""
        for p in parameters:
            self.average.setdefault(p, p.detach().clone()).lerp_(p, weight)

    def remember(self) -> None:
        """Takes the averages for the best so far."""
        self.best = {p: value.clone() for p, value in self.average.items()}

    def go_back(self) -> None:
        """Loads the best weights so far, or the averages."""
        _load(self.best or self.average)

    def keep_best(self, score: Callable[[], tuple[float, float]]) -> float:
        """Loads the weights, of the averages, the remembered and the last ones, with the best score, and returns that.

        Those of the start if they are better by more than chance: losses need not tell of each improvement.

        Args:
            score: of the weights that are loaded, and its standard error.
        """
        scores = []
        for state in filter(None, [_copies(self.average), self.average, self.best, self.start]):
            _load(state)
            scores.append((*score(), state))
        *others, (first, error, _) = scores
        best, _, state = max(others, key=lambda one: one[0])
        if first - 2 * error > best:
            best, state = first, self.start
        _load(state)
        return best


def _copies(parameters: Iterable[Tensor]) -> State:
    return {p: p.detach().clone() for p in parameters}


@torch.no_grad()
def _load(state: State) -> None:
    for p, value in state.items():
        p.copy_(value)
