"""The optimizer's part in ``fit_guide``: new parameters, gradient clipping, averaged and best weights, restarts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .learning_rate import set_rate

SLOWER = 0.3  # factor of the learning rate after each return to earlier weights
STATES = ("start", "average", "best")
State = dict[Tensor, Tensor]


class Descent:
    """An optimizer, which is created with the first parameters, and the averages and best values of the parameters.

    Args:
        make: a function from parameters to an optimizer.
        allowed: the parameters to optimise, or None for all.
        max_ratio: gradients are clipped to this multiple of their running average norm.
    """

    optimizer: Optimizer

    def __init__(
        self, make: Callable[[list[Tensor]], Optimizer], allowed: Iterable[Tensor] | None, max_ratio: float
    ) -> None:
        self.make, self.allowed, self.max_ratio = make, None if allowed is None else set(allowed), max_ratio
        self.names: dict[Tensor, str] = {}
        self.groups: list[list[Tensor]] = []
        self.start: State = {}
        self.average: State = {}
        self.best: State = {}
        self.last: State = {}
        self.usual_norm, self.went_back = math.nan, 0

    def meet(self, found: dict[Tensor, str]) -> None:
        """Adds parameters that are allowed and new to the optimizer; ``found`` has the names of all parameters."""
        new = [p for p in found if p not in self.names and (self.allowed is None or p in self.allowed)]
        if not new and not self.names:
            raise ValueError("Expected model or guide to have parameters; got none.")
        if new:
            self._take(new)
        self.names |= {p: found[p] for p in new}
        for p in found.keys() - self.names.keys():
            p.grad = None

    def _take(self, new: list[Tensor]) -> None:
        if self.groups:
            self.optimizer.add_param_group({"params": new})
        else:
            self.optimizer = self.make(new)
        self.groups.append(new)
        self.start |= _copies(new)

    def clear(self) -> None:
        """Sets all gradients to None."""
        for p in self.names:
            p.grad = None

    def gradients(self) -> list[tuple[str, Tensor]]:
        """Returns the gradients that are not None, with the names of their parameters."""
        return [(name, p.grad) for p, name in self.names.items() if p.grad is not None]

    def step(self, factor: float, norm: float, weight: float) -> None:
        """Takes a step and updates the averages.

        Args:
            factor: factor of the optimizer's own learning rate.
            norm: the norm of the gradients.
            weight: the weight of the new parameters in the averages.
        """
        longest = self.max_ratio * self.usual_norm
        if norm > longest:
            nn.utils.clip_grads_with_norm_(
                [p for p in self.names if p.grad is not None], longest, torch.tensor(norm, device="cpu")
            )
            norm = longest
        self.usual_norm = norm if math.isnan(self.usual_norm) else 0.98 * self.usual_norm + 0.02 * norm
        set_rate(self.optimizer, factor * SLOWER**self.went_back)
        self.optimizer.step()
        with torch.no_grad():
            for p in self.names:
                self.average.setdefault(p, p.detach().clone()).lerp_(p, weight)

    def remember(self) -> None:
        """Stores the averages as the best weights so far."""
        self.best = {p: value.clone() for p, value in self.average.items()}

    def go_back(self, works: Callable[[], bool]) -> None:
        """Loads earlier weights, resets the optimizer's state and lowers the learning rate.

        Args:
            works: returns whether the loaded weights have a finite ELBO. The best weights are tried first, then the
                averages, then the initial weights.
        """
        for state in filter(None, (self.best, self.average, self.start)):
            _load(state)
            if works():
                break
        self.optimizer.state.clear()
        self.went_back += 1

    def keep_best(self, score: Callable[[], tuple[float, float]]) -> tuple[float, float | None]:
        """Loads the best of the last, averaged and best weights so far, and returns their score.

        The initial weights are loaded instead if they are better by more than two standard errors. In this case, the best
        score of the others is returned as well.

        Args:
            score: returns the score of the loaded weights and its standard error.
        """
        # kept for a second call after an interrupt
        last = self.last = self.last or _copies(self.average)
        scores = []
        for state in filter(None, [last, self.average, self.best, self.start]):
            _load(state)
            scores.append((*score(), state))
        *others, (first, error, _) = scores
        best, _, state = max(others, key=lambda one: one[0])
        worse = None
        if first - 2 * error > best:
            best, worse, state = first, best, self.start
        _load(state)
        self.clear()
        return best, worse

    def state_dict(self) -> dict[str, Any]:
        """Returns the names and values of the parameters, in the order in which they were added, and the optimizer's state."""
        order = list(self.names)
        states = {name: [getattr(self, name).get(p) for p in order] for name in STATES}
        groups = [[self.names[p] for p in group] for group in self.groups]
        numbers = {"usual_norm": self.usual_norm, "went_back": self.went_back}
        optimizer = self.optimizer.state_dict() if self.groups else None
        return {"groups": groups, "values": [p.detach() for p in order], "optimizer": optimizer, **states, **numbers}

    def load_state_dict(self, state: dict[str, Any], found: dict[Tensor, str]) -> None:
        """Restores a state; ``found`` has the names of all parameters."""
        named: dict[str, list[Tensor]] = {}
        for p, name in found.items():
            if self.allowed is None or p in self.allowed:
                named.setdefault(name, []).append(p)
        for names in state["groups"]:
            group = [named[name].pop(0) for name in names]
            self._take(group)
            self.names |= dict(zip(group, names, strict=True))
        order = list(self.names)
        _load(dict(zip(order, state["values"], strict=True)))
        for name in STATES:
            values = zip(order, state[name], strict=True)
            setattr(self, name, {p: value.to(p.device) for p, value in values if value is not None})
        if self.groups:
            self.optimizer.load_state_dict(state["optimizer"])
        self.usual_norm, self.went_back = state["usual_norm"], state["went_back"]


def _copies(parameters: Iterable[Tensor]) -> State:
    return {p: p.detach().clone() for p in parameters}


@torch.no_grad()
def _load(state: State) -> None:
    for p, value in state.items():
        p.copy_(value)
