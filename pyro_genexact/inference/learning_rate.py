"""The learning-rate rule of guides: when the rate of ``fit_guide`` rises and drops, and when the fit ends."""

from __future__ import annotations

import math
import statistics

WARM = 100  # first steps, over which the learning rate rises; at most a tenth of them
WINDOW = 250  # steps over which ELBOs and weights are averaged
PATIENCE = 3  # windows without a better ELBO after which the learning rate drops
DROPS = (1.0, 0.3, 0.1, 0.03)  # of the learning rate; after the last the ELBO is flat
LONGEST = 20_000  # steps, unless the user says how many


class LearningRate:
    """Falls along a cosine to 0 over a number of steps; without one, it drops whenever the ELBO is flat.

    Args:
        steps: how many, or None.
    """

    def __init__(self, steps: int | None) -> None:
        self.steps, self.total = steps, steps or LONGEST
        self.best, self.waited, self.drops = -math.inf, 0, 0

    def factor(self, step: int) -> float:
        """Of the optimizer's own rate, in a step."""
        fall = DROPS[self.drops] if self.steps is None else 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return fall * min(1.0, (step + 1) / min(WARM, self.total / 10))

    def weight(self, step: int) -> float:
        """Of a step's weights in the averages."""
        window = WINDOW if self.steps is None else max(1, min(WINDOW, self.steps // 10))
        return max(1 / (step + 1), 1 / window)

    def improves(self, elbo: list[float]) -> bool:
        """Reads the ELBOs of all steps so far, after each step; whether a window ends here that is the best so far."""
        if len(elbo) % WINDOW:
            return False
        middle, error = _middle(elbo[-WINDOW:])
        self.waited = 0 if middle > self.best + error else self.waited + 1
        better, self.best = middle > self.best, max(middle, self.best)
        if self.waited >= PATIENCE and self.steps is None:
            self.waited, self.drops = 0, self.drops + 1
        return better

    @property
    def flat(self) -> bool:
        """Whether the ELBO stayed flat at the last rate."""
        return self.drops == len(DROPS)


def _middle(values: list[float]) -> tuple[float, float]:
    """Median and its standard error, whatever the tails."""
    ranked = sorted(x if math.isfinite(x) else -math.inf for x in values)
    low, high = ranked[len(ranked) // 4], ranked[3 * len(ranked) // 4]
    return statistics.median(ranked), 0.93 * (high - low) / math.sqrt(len(ranked))
