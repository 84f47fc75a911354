"""The optimiser's step in fit_guide: new parameters, gradient clipping, a lower rate on restart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SLOWER = 0.3  # the factor of the learning rate after each restart


class Descent:
    """Steps of an optimizer that is made with the first parameters.

    Args:
        make: the optimizer from parameters.
        allowed: the only parameters to change; None for all.
        max_ratio: gradients longer than this times their usual norm are cut to it.
    """

    def __init__(
        self, make: Callable[[list[Tensor]], Optimizer], allowed: Iterable[Tensor] | None, max_ratio: float
    ) -> None:
        self.make, self.allowed, self.max_ratio = make, None if allowed is None else set(allowed), max_ratio
        self.names: dict[Tensor, str] = {}
        self.optimizer: Optimizer | None = None
        self.usual_norm, self.restarts = math.nan, 0

    def meet(self, found: dict[Tensor, str]) -> list[Tensor]:
        """Takes on the parameters that are allowed and new, by name, and returns them."""
        new = [p for p in found if p not in self.names and (self.allowed is None or p in self.allowed)]
        if not new and not self.names:
            raise ValueError("Expected model or guide to have parameters; got none.")
        self.names |= {p: found[p] for p in new}
        for p in found.keys() - self.names.keys():
            p.grad = None
        if self.optimizer is None:
            self.optimizer = self.make(new)
        elif new:
            self.optimizer.add_param_group({"params": new})
        return new

    def clear(self) -> None:
        """Drops the gradients."""
        for p in self.names:
            p.grad = None

    def gradients(self) -> list[tuple[str, Tensor]]:
        """Those that there are, with the parameters' names."""
        return [(name, p.grad) for p, name in self.names.items() if p.grad is not None]

    def step(self, factor: float, norm: float) -> None:
        """Takes a step at ``factor`` times the optimizer's own rate; norm is that of the gradients."""
        longest = self.max_ratio * self.usual_norm
        if norm > longest:
            nn.utils.clip_grads_with_norm_(
                [p for p in self.names if p.grad is not None], longest, torch.as_tensor(norm)
            )
            norm = longest
        self.usual_norm = norm if math.isnan(self.usual_norm) else 0.98 * self.usual_norm + 0.02 * norm
        for group in self.optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = factor * SLOWER**self.restarts * group.setdefault("initial_lr", group["lr"])
        self.optimizer.step()  # type: ignore[union-attr]

    def restart(self) -> None:
        """Forgets the optimizer's state; steps are slower from here."""
        self.optimizer.state.clear()  # type: ignore[union-attr]
        self.restarts += 1
