"""Models that do not run in an outer plate: ``torch.vmap`` maps them over the draws of a guide that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

Shapes = Mapping[str, torch.Size]
CHUNK = 1000  # maximum number of draws in one pass without gradients


def mapped(function: Callable[[Any], Any], values: Any, randomness: str = "different") -> Any:
    """Returns what ``function`` returns for each draw, stacked; ``values``, a tensor or dict, have the draws in dim 0.

    The function cannot branch on values, so Pyro's validation, which does, is off meanwhile.
    """
    with pyro.validation_enabled(False):
        return torch.vmap(function, randomness=randomness, chunk_size=CHUNK)(values)


def rows(value: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Reshapes a value to (S, *shape), without dims of size 1 in between; expands values without a dim of size S."""
    if value.numel() == size * shape.numel():
        return value.reshape(size, *shape)
    return value.expand(size, *shape)


class MappedELBO(Trace_ELBO):
    """The ELBO of a model that is written for one draw: it loops over scalars, stacks them, or indexes from the left.

    The guide runs in an outer plate. The model is mapped over its draws, and draws nothing itself. Latents that are not
    reparameterised have score-function gradients.

    Args:
        shapes: the shapes of the guide's latents in a single run, by name.
        options: keyword arguments of ``pyro.infer.Trace_ELBO``.
    """

    def __init__(self, shapes: Shapes, **options: Any) -> None:
        super().__init__(**options)
        self.shapes = shapes

    def draws(self, guide: Callable[[], Any]) -> Any:
        """Returns the trace of a guide, called without arguments, in an outer plate."""
        plate: Any = pyro.plate("num_particles_vectorized", self.num_particles, dim=-1 - self.max_plate_nesting)
        return prune_subsample_sites(poutine.trace(plate(guide)).get_trace())

    def log_p(self, model: Callable[[], Any], trace: Any) -> Tensor:
        """Returns log p (S,) of a model, called without arguments, on the draws of the guide's trace."""

        def one(row: dict[str, Tensor]) -> Any:
            run = prune_subsample_sites(poutine.trace(poutine.condition(model, data=row)).get_trace())
            run.compute_log_prob()
            return sum(site["log_prob_sum"] for site in run.nodes.values() if site["type"] == "sample")

        return mapped(
            one, {k: rows(trace.nodes[k]["value"], shape, self.num_particles) for k, shape in self.shapes.items()}
        )  # type: ignore[no-any-return]

    def log_q(self, trace: Any) -> tuple[Any, Any, Any]:
        """Returns log q and its score-function and entropy terms, (S,) each or 0."""
        trace.compute_score_parts()
        parts = [site["score_parts"] for site in trace.nodes.values() if site["type"] == "sample"]
        log_q, score, entropy = (sum(map(self._of_draws, terms)) for terms in zip(*parts, strict=True))
        return log_q, score, entropy

    def _of_draws(self, term: Any) -> Any:
        """Returns the sum of a term of each draw (S,)."""
        if not isinstance(term, Tensor):
            return term
        return term.reshape(self.num_particles, -1).sum(1)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the negative ELBO (nats), whose gradient is that of the surrogate loss."""
        trace = self.draws(partial(guide, *args, **kwargs))
        log_p, (log_q, score, entropy) = self.log_p(partial(model, *args, **kwargs), trace), self.log_q(trace)
        elbo = (log_p - log_q).detach()
        surrogate = log_p - entropy + elbo * score
        return -(elbo + surrogate - surrogate.detach()).mean()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Returns the negative ELBO (nats)."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Adds the gradients to the parameters, and returns the negative ELBO (nats)."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()
