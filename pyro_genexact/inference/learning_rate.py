"""The learning-rate rule of all fits: warm-up, drops on plateaus, cosine decay, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

WARM = 100  # steps over which the learning rate rises


class LearningRate:
    """The factor by which an optimizer's own learning rate is multiplied.

    It rises, drops whenever a score stops improving, and decays to 0 at the end of the budget.

    Args:
        warm: the number of steps over which it rises linearly; at most a tenth of the budget.
        drops: the factors after 0, 1, ... drops.
        cooling: the final fraction of the budget, over which it decays to 0 along a cosine; 0 for no decay.
    """

    def __init__(self, warm: float, drops: Sequence[float], cooling: float) -> None:
        self.warm, self.drops, self.cooling = warm, drops, cooling
        self.waited, self.dropped = 0.0, 0

    def factor(self, step: int, spent: float) -> float:
        """Returns the factor for a step, counted from 0, when the fraction ``spent`` of the budget is spent."""
        late = 0.0 if self.cooling == 0 else max(0.0, 1 - (1 - spent) / self.cooling)
        rise = min(1.0, max((step + 1) / self.warm, 10 * spent))
        return self.drops[self.dropped] * 0.5 * (1 + math.cos(math.pi * late)) * rise

    def read(self, improved: bool, waited: float) -> bool:
        """Drops the factor if the score has not improved for too long.

        Args:
            improved: whether the score improved.
            waited: the fraction of the patience that has passed since the last call.

        Returns:
            Whether the factor drops.
        """
        self.waited = 0.0 if improved else self.waited + waited
        if self.waited < 1 - 1e-9:
            return False
        self.waited, self.dropped = 0.0, self.dropped + 1
        return True

    @property
    def flat(self) -> bool:
        """Whether the score has stopped improving at the last of the factors."""
        return self.dropped == len(self.drops)

    def state_dict(self) -> dict[str, Any]:
        """Returns the patience spent and the number of drops."""
        return {"waited": self.waited, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state."""
        self.waited, self.dropped = state["waited"], state["dropped"]


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets the learning rates of an optimizer to a multiple of its initial ones."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
