"""The weights with the best validation score, which a fit keeps."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn


class Kept:
    """Copies of the best weights of a module, separately for several kinds such as plain and averaged weights.

    Args:
        module: the module.
        kinds: the number of kinds, each of which has its own scores.
    """

    def __init__(self, module: nn.Module, kinds: int) -> None:
        self.module = module
        self.scores, self.epochs = [-math.inf] * kinds, [-1] * kinds
        self.states: list[dict[str, Any]] = [{}] * kinds

    def record(self, kind: int, score: float, epoch: int) -> bool:
        """Copies the module's current weights if their score is the best of their kind; returns whether it is."""
        if not score > self.scores[kind]:
            return False
        self.scores[kind], self.epochs[kind] = score, epoch
        self.states[kind] = copy.deepcopy(self.module.state_dict())
        return True

    def load(self) -> bool:
        """Loads the best weights of all kinds, and makes them the best of each kind; returns whether there are any."""
        best, kinds = self._best, len(self.scores)
        if self.states[best]:
            self.module.load_state_dict(self.states[best])
            self.scores, self.epochs = [self.scores[best]] * kinds, [self.epochs[best]] * kinds
            self.states = [self.states[best]] * kinds
        return bool(self.states[best])

    @property
    def epoch(self) -> int:
        """The epoch of the best weights of all kinds; -1 if there are none."""
        return self.epochs[self._best]

    @property
    def _best(self) -> int:
        return max(range(len(self.scores)), key=lambda i: self.scores[i])

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights, scores and epochs."""
        return {"scores": self.scores, "epochs": self.epochs, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state."""
        self.scores, self.epochs, self.states = state["scores"], state["epochs"], state["states"]
