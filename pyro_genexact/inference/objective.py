"""Objective: a Pyro ELBO of model and guide evaluated: gradients, estimates, non-finite sites."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn


class Objective:
    """A loss of Pyro's, called with a model, its guide and their arguments."""

    def __init__(
        self, loss: Any, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> None:
        self.loss, self.model, self.guide, self.args, self.kwargs = loss, model, guide, args, kwargs

    def gradients(self) -> tuple[float, dict[Tensor, str]]:
        """The loss, added to the gradients of the parameters that it has, and the names of these."""
        with poutine.trace(param_only=True) as capture:
            value = _number(self.loss.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs))
        store: Any = pyro.get_param_store()  # where averages that serve as baselines are replaced in each step
        sites = {name: site for name, site in capture.trace.nodes.items() if site["type"] == "param"}
        values: dict[str, Tensor] = {name: site["value"].unconstrained() for name, site in sites.items()}  # type: ignore[union-attr]
        found = {p: name for name, p in values.items() if name not in store or store[name].unconstrained() is p}
        for part in (self.model, self.guide):
            if isinstance(part, nn.Module):  # of two modules with the same name Pyro's store knows one
                found |= {p: found.get(p, name) for name, p in part.named_parameters() if p.requires_grad}
        return value, found

    @torch.no_grad()
    def elbo(self, seed: int, repeats: int) -> tuple[float, float]:
        """The mean of estimates, -inf if it is not finite, and its standard error."""
        torch.default_generator.manual_seed(seed)
        values = [_number(self.loss.loss(self.model, self.guide, *self.args, **self.kwargs)) for _ in range(repeats)]
        mean = -statistics.fmean(values)
        return (mean, statistics.stdev(values) / math.sqrt(repeats)) if math.isfinite(mean) else (-math.inf, 0.0)

    @torch.no_grad()
    def non_finite_sites(self, state: Tensor) -> list[str]:
        """The sites whose log_prob is not finite, with the draws from a state of torch's generator."""
        torch.set_rng_state(state)
        if not hasattr(self.loss, "_get_traces"):
            return []
        found: dict[str, None] = {}
        for traces in self.loss._get_traces(self.model, self.guide, self.args, self.kwargs):
            for of, trace in zip(("model", "guide"), traces, strict=True):
                trace.compute_log_prob()
                sites = ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and "log_prob" in s)
                found |= {f"{n} ({of})": None for n, s in sites if not s["log_prob"].isfinite().all()}
        return list(found)


def _number(loss: Any) -> float:
    """A loss as a number; of two, as ``ReweightedWakeSleep`` has, the model's: minus the importance-weighted bound."""
    return float(loss[0] if isinstance(loss, tuple) else loss)
