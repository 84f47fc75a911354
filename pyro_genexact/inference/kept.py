"""The weights that a fit keeps: those with the best validation."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn


class Kept:
    """The best weights of a module, of several kinds, such as those of the last step and averages: each by its own scores.

    Args:
        module: whose weights they are.
        kinds: how many.
    """

    def __init__(self, module: nn.Module, kinds: int) -> None:
        self.module = module
        self.scores, self.epochs = [-math.inf] * kinds, [-1] * kinds
        self.states: list[dict[str, Any]] = [{}] * kinds

    def record(self, kind: int, score: float, epoch: int) -> bool:
        """Keeps the weights that the module has now, if their score is the best of their kind; whether it is."""
        if not score > self.scores[kind]:
            return False
        self.scores[kind], self.epochs[kind] = score, epoch
        self.states[kind] = copy.deepcopy(self.module.state_dict())
        return True

    def load(self) -> bool:
        """Loads the best weights of all, which are the best of each kind from then on; whether there are some."""
        best, kinds = self._best, len(self.scores)
        if self.states[best]:
            self.module.load_state_dict(self.states[best])
            self.scores, self.epochs = [self.scores[best]] * kinds, [self.epochs[best]] * kinds
            self.states = [self.states[best]] * kinds
        return bool(self.states[best])

    @property
    def epoch(self) -> int:
        """That of the best weights of all; -1 for none."""
        return self.epochs[self._best]

    @property
    def _best(self) -> int:
        return max(range(len(self.scores)), key=lambda i: self.scores[i])

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "epochs": self.epochs, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.epochs, self.states = state["scores"], state["epochs"], state["states"]
