"""The learning-rate rule of every fit: how the rate rises and falls, and when a fit ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

WARM = 100  # first steps, over which the learning rate rises; at most a tenth of all
DROPS = (1.0, 0.3, 0.1, 0.03)  # of the learning rate; after the last the score is flat


class LearningRate:
    """The factor of an optimizer's own rate: it rises, falls whenever a score is flat, and falls to 0 at the end of the budget.

    Args:
        warm: steps in which it rises, along a line; at most a tenth of the budget.
        patience: readings of the score without a better one, after which it falls.
        drops: the factors between which it falls.
        cooling: the last part of the budget, in which it goes to 0 along a cosine; 0 for none.
    """

    def __init__(self, warm: float, patience: int, drops: Sequence[float], cooling: float) -> None:
        self.warm, self.patience, self.drops, self.cooling = warm, patience, drops, cooling
        self.best, self.waited, self.dropped = -math.inf, 0, 0

    def factor(self, step: int, spent: float) -> float:
        """In a step, counted from 0, when a part of the budget (0 to 1) is spent."""
        late = 0.0 if self.cooling == 0 else max(0.0, 1 - (1 - spent) / self.cooling)
        rise = min(1.0, max((step + 1) / self.warm, 10 * spent))
        return self.drops[self.dropped] * 0.5 * (1 + math.cos(math.pi * late)) * rise

    def read(self, score: float, error: float = 0.0) -> bool:
        """Takes a score, known up to an error; whether it is the best so far."""
        self.waited = 0 if score > self.best + error else self.waited + 1
        better = score > self.best
        self.best = max(score, self.best)
        if self.waited >= self.patience:
            self.waited, self.dropped = 0, self.dropped + 1
        return better

    @property
    def flat(self) -> bool:
        """Whether the score stayed flat at the last rate."""
        return self.dropped == len(self.drops)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.dropped = state["best"], state["waited"], state["dropped"]


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets the rates of an optimizer to a factor of its own."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
