"""The learning-rate rule of every fit: how the rate rises and falls, and when a fit ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

WARM = 100  # first steps, over which the learning rate rises


class LearningRate:
    """The factor of an optimizer's own rate: it rises, drops whenever a score is flat, and goes to 0 at the end of the budget.

    Args:
        warm: steps in which it rises, along a line; at most a tenth of the budget.
        drops: the factors through which it drops.
        cooling: the last part of the budget, in which it goes to 0 along a cosine; 0 for none.
    """

    def __init__(self, warm: float, drops: Sequence[float], cooling: float) -> None:
        self.warm, self.drops, self.cooling = warm, drops, cooling
        self.waited, self.dropped = 0.0, 0

    def factor(self, step: int, spent: float) -> float:
        """In a step, counted from 0, when a part of the budget (0 to 1) is spent."""
        late = 0.0 if self.cooling == 0 else max(0.0, 1 - (1 - spent) / self.cooling)
        rise = min(1.0, max((step + 1) / self.warm, 10 * spent))
        return self.drops[self.dropped] * 0.5 * (1 + math.cos(math.pi * late)) * rise

    def read(self, improved: bool, waited: float) -> bool:
        """Takes whether the score improved, and else the part of the patience that this took; whether the rate drops."""
        self.waited = 0.0 if improved else self.waited + waited
        if self.waited < 1 - 1e-9:
            return False
        self.waited, self.dropped = 0.0, self.dropped + 1
        return True

    @property
    def flat(self) -> bool:
        """Whether the score stayed flat at the last rate."""
        return self.dropped == len(self.drops)

    def state_dict(self) -> dict[str, Any]:
        return {"waited": self.waited, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waited, self.dropped = state["waited"], state["dropped"]


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets the rates of an optimizer to a factor of its own."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
