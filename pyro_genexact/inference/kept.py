"""The weights that a fit keeps: those with the best validation."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import nn


class Kept:
    """The best weights of modules of one kind, such as a module and the averages of its weights, each by its own scores.

    Args:
        modules: that are validated.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.scores = [-math.inf] * len(modules)
        self.epochs = [-1] * len(modules)
        self.states: list[dict[str, Any]] = [{}] * len(modules)

    def record(self, epoch: int, scores: Sequence[float]) -> bool:
        """Keeps the weights with better scores than their module had; whether there are some."""
        better = [i for i, score in enumerate(scores) if score > self.scores[i]]
        for i in better:
            self._keep(i, scores[i], epoch, copy.deepcopy(self.modules[i].state_dict()))
        return bool(better)

    def load(self) -> None:
        """Loads the best weights of all into every module."""
        best = self._best
        if not self.states[best]:
            return
        for i, module in enumerate(self.modules):
            module.load_state_dict(self.states[best])
            self._keep(i, self.scores[best], self.epochs[best], self.states[best])

    @property
    def epoch(self) -> int:
        """That of the best weights of all; -1 for none."""
        return self.epochs[self._best]

    @property
    def _best(self) -> int:
        return max(range(len(self.scores)), key=lambda i: self.scores[i])

    def _keep(self, i: int, score: float, epoch: int, state: dict[str, Any]) -> None:
        self.scores[i], self.epochs[i], self.states[i] = score, epoch, state

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "epochs": self.epochs, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.epochs, self.states = state["scores"], state["epochs"], state["states"]
