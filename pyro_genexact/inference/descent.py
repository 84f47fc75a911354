"""The optimiser's steps in fit_guide: new parameters, gradient clipping, averaged and best weights, restarts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .learning_rate import set_rate

SLOWER = 0.3  # the factor of the learning rate after each return to earlier weights
STATES = ("start", "average", "best")
State = dict[Tensor, Tensor]


class Descent:
    """Steps of an optimizer that is made with the first parameters, and values of these that are kept on the way.

    Args:
        make: the optimizer from parameters.
        allowed: the only parameters to change; None for all.
        max_ratio: gradients longer than this times their usual norm are cut to it.
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
        """Takes on the parameters that are allowed and new, by name."""
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
        """Drops the gradients."""
        for p in self.names:
            p.grad = None

    def gradients(self) -> list[tuple[str, Tensor]]:
        """Those that there are, with the parameters' names."""
        return [(name, p.grad) for p, name in self.names.items() if p.grad is not None]

    def step(self, factor: float, norm: float, weight: float) -> None:
        """Takes a step at ``factor`` times the optimizer's own rate; moves the averages to the new weights by ``weight``.

        ``norm`` is that of the gradients.
        """
        longest = self.max_ratio * self.usual_norm
        if norm > longest:
            nn.utils.clip_grads_with_norm_(
                [p for p in self.names if p.grad is not None], longest, torch.as_tensor(norm)
            )
            norm = longest
        self.usual_norm = norm if math.isnan(self.usual_norm) else 0.98 * self.usual_norm + 0.02 * norm
        set_rate(self.optimizer, factor * SLOWER**self.went_back)
        self.optimizer.step()
        with torch.no_grad():
            for p in self.names:
                self.average.setdefault(p, p.detach().clone()).lerp_(p, weight)

    def remember(self) -> None:
        """Takes the averages for the best so far."""
        self.best = {p: value.clone() for p, value in self.average.items()}

    def go_back(self, works: Callable[[], bool]) -> None:
        """Loads the best weights so far, the averages or the first ones; forgets the optimizer's state; next steps are shorter.

        Args:
            works: whether weights that are loaded are of use.
        """
        for state in filter(None, (self.best, self.average, self.start)):
            _load(state)
            if works():
                break
        self.optimizer.state.clear()
        self.went_back += 1

    def keep_best(self, score: Callable[[], tuple[float, float]]) -> tuple[float, float | None]:
        """Loads the weights, of the averages, the remembered and the last ones, with the best score, and returns that.

        Those of the start if they are better by more than chance: losses need not tell of each improvement. Then the best
        score of the others is returned too.

        Args:
            score: of the weights that are loaded, and its standard error.
        """
        last = self.last = self.last or _copies(self.average)  # an interrupt leaves other weights loaded
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
        """Names and values of the parameters, in the order in which they were met, and the optimizer's state."""
        order = list(self.names)
        states = {name: [getattr(self, name).get(p) for p in order] for name in STATES}
        groups = [[self.names[p] for p in group] for group in self.groups]
        numbers = {"usual_norm": self.usual_norm, "went_back": self.went_back}
        optimizer = self.optimizer.state_dict() if self.groups else None
        return {"groups": groups, "values": [p.detach() for p in order], "optimizer": optimizer, **states, **numbers}

    def load_state_dict(self, state: dict[str, Any], found: dict[Tensor, str]) -> None:
        """Restores a state; ``found`` are the parameters by name."""
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
