"""The choice of the ELBO for a model and its guide, its gradients and estimates, and sites with non-finite terms."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from .bounds import Bound
from .compiled import RecordedGradients
from .draws import Draws, drawn, samples

PARTICLES = 16, 256  # least and most draws in each ELBO estimate
NUMBERS = 2**20  # numbers at all sites of a step up to which there are more draws than the least
ONE_BY_ONE = 4  # draws that are evaluated one by one

# raised by distributions with non-finite parameters (after steps that are far too long) or values outside the support
FAILURES = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def default_loss(
    model: Callable[[], Any],
    guide: Callable[[], Any],
    num_particles: int | None,
    objective: str = "elbo",
    path: bool = False,
    tempered: bool = False,
) -> Any:
    """Returns an ELBO of Pyro or a :class:`Bound`, which evaluates all draws in one pass if possible.

    Args:
        model: the model, called without arguments.
        guide: the guide, called without arguments.
        num_particles: the number of draws; None for 256, for fewer if sites have many numbers, but at least 16, or for 4 that
            are evaluated one by one.
        objective: see :class:`Bound`.
        path: see :class:`Bound`.
        tempered: whether the loss needs a ``power``.
    """
    with torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
        sites = [site for trace in (guide_trace, model_trace) for _, site in samples(trace)]
        frames = [frame for site in sites for frame in site["cond_indep_stack"]]
        nesting = -min((frame.dim for frame in frames if frame.vectorized), default=0)
        if objective != "elbo":
            _check_weights(objective, guide_trace, frames)
        enumerates = [
            any(site["infer"].get("enumerate") == "parallel" for _, site in samples(trace))
            for trace in (guide_trace, model_trace)
        ]
        plain = (
            objective == "elbo" and not path and not tempered and (enumerates[0] or not _needs_baseline(guide_trace))
        )
        if enumerates[0] and plain:
            return TraceEnum_ELBO(num_particles=num_particles or PARTICLES[0], max_plate_nesting=nesting)
        if enumerates[0]:
            options = f"objective={objective!r}" if objective != "elbo" else "path_gradient or tempering"
            raise ValueError(f"Expected a guide without sites to enumerate for {options}; got some.")
        shapes = {name: site["value"].shape for name, site in drawn(guide_trace)}
        numbers = sum(site["value"].numel() for site in sites)
        if enumerates[1]:
            numbers += _enumerated_numbers(poutine.replay(model, trace=guide_trace), nesting)
        size = num_particles or _affordable(numbers)
        draws = Draws.checked(model, guide, size, nesting, shapes, enumerates[1])
    if enumerates[1] and plain:
        together = draws.way == "plated" and size * numbers <= NUMBERS
        size = size if together else num_particles or PARTICLES[0]
        return TraceEnum_ELBO(num_particles=size, vectorize_particles=together, max_plate_nesting=nesting)
    if draws.way == "alone" and draws.size > 1:
        draws.size = num_particles or ONE_BY_ONE
        warnings.warn(
            f"The {draws.size} draws of each step are evaluated one by one, which is slow, because model or guide has another "
            "log_prob for several draws at once, and torch.vmap cannot map the model over draws. Index latents from the right, "
            "such as alpha[..., group], and do not branch on their values.",
            stacklevel=3,
        )
    if plain and draws.way != "mapped":
        together = draws.way == "plated"
        return Trace_ELBO(num_particles=draws.size, vectorize_particles=together, max_plate_nesting=nesting)
    return Bound(draws, objective, path)


def _check_weights(objective: str, guide_trace: Any, frames: list[Any]) -> None:
    """Raises a ValueError if the ratio of the log-probabilities of model and guide is not that of an importance weight."""
    parts = sorted({frame.name for frame in frames if frame.full_size not in (None, frame.size)})
    if parts:
        raise ValueError(
            f"Expected plates without subsampling for objective={objective!r}, as weights of some rows do not estimate "
            f"those of all; got {', '.join(parts)}."
        )
    scaled = [
        name for name, site in samples(guide_trace) if bool((torch.as_tensor(site["scale"], device="cpu") != 1).any())
    ]
    if scaled:
        raise ValueError(
            f"Expected a guide without poutine.scale for objective={objective!r}, whose weights would not be those of "
            f"its draws; got {', '.join(scaled)}."
        )


def _affordable(numbers: int) -> int:
    """Returns a number of draws, a power of two, with at most ``NUMBERS`` numbers if possible."""
    least, most = PARTICLES
    return max(least, min(most, 2 ** int(math.log2(max(1, NUMBERS // max(1, numbers))))))


def _enumerated_numbers(model: Callable[[], Any], nesting: int) -> int:
    """Returns how many log-probabilities a run has for all values of the enumerated latents."""
    trace = poutine.trace(poutine.enum(model, first_available_dim=-1 - nesting)).get_trace()
    trace.compute_log_prob()
    return sum(site["log_prob"].numel() for _, site in samples(trace))


def _needs_baseline(trace: Any) -> bool:
    """Returns whether draws of a guide have score terms, all outside of plates, such as those of a mixture.

    Pyro's ELBOs have no baseline for them. In plates, their costs are those of the row, which has less noise.
    """
    trace.compute_score_parts()
    stacks = [
        site["cond_indep_stack"] for _, site in samples(trace) if isinstance(site["score_parts"].score_function, Tensor)
    ]
    return bool(stacks) and not any(frame.vectorized for stack in stacks for frame in stack)


@contextmanager
def needs_log_prob(*programs: Callable[[], Any]) -> Iterator[None]:
    """If a NotImplementedError is raised in this context, raises one that names the sites without a log_prob instead."""
    try:
        yield
    except NotImplementedError as error:
        if missing := [name for program in programs for name in _without_log_prob(program)]:
            raise NotImplementedError(
                f"Expected every site to have a log_prob; got none for {', '.join(missing)}. The ELBO and importance "
                "weights need the likelihood, so a simulator without one cannot be an observed site here."
            ) from error
        raise


def _without_log_prob(program: Callable[[], Any]) -> Iterator[str]:
    with suppress(Exception), torch.no_grad(), poutine.block():
        for _, site in samples(poutine.trace(program).get_trace()):
            try:
                site["fn"].log_prob(site["value"])
            except NotImplementedError:
                yield f"{site['name']!r} ({type(site['fn']).__name__})"


class Objective:
    """An ELBO of Pyro together with model, guide and their arguments; it is evaluated under a fabric's autocast.

    With ``compile``, the gradients are computed by a compiled function, except in the first call.
    """

    def __init__(
        self,
        loss: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        autocast: Callable[[], AbstractContextManager[Any]],
        compile: bool = False,
    ) -> None:
        self.loss, self.model, self.guide, self.args, self.kwargs = loss, model, guide, args, kwargs
        self.autocast, self.compile = autocast, compile
        self.recorded: RecordedGradients | None = None
        self.found: dict[Tensor, str] = {}

    def gradients(self) -> tuple[float, dict[Tensor, str]]:
        """Adds the gradients of the loss to the parameters; returns the loss and the names of the parameters."""
        if self.recorded is None and self.compile and self.found:
            loss = partial(self.loss.differentiable_loss, self.model, self.guide, *self.args, **self.kwargs)
            self.recorded = RecordedGradients(loss, self.found)
        if self.recorded is not None:
            with self.autocast():
                return self.recorded(), self.found
        with poutine.trace(param_only=True) as capture, self.autocast():
            value = _number(self.loss.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs))
        store: Any = pyro.get_param_store()  # a later run may have replaced a parameter (running averages of baselines)
        nodes: dict[str, Any] = capture.trace.nodes
        values = {name: site["value"].unconstrained() for name, site in nodes.items() if site["type"] == "param"}
        found = {p: name for name, p in values.items() if name not in store or store[name].unconstrained() is p}
        for part in (self.model, self.guide):
            if isinstance(part, nn.Module):  # Pyro's store holds only one of two modules with the same name
                found |= {p: found.get(p, name) for name, p in part.named_parameters() if p.requires_grad}
        self.found = found
        return value, found

    @torch.no_grad()
    def elbo(self, seed: int, repeats: int) -> tuple[float, float]:
        """Returns the mean of ELBO estimates (-inf if it is not finite or the loss raises) and its standard error."""
        torch.default_generator.manual_seed(seed)
        try:
            with self.autocast(), pyro.validation_enabled(False):  # -inf for draws outside of a support
                values = [
                    _number(self.loss.loss(self.model, self.guide, *self.args, **self.kwargs)) for _ in range(repeats)
                ]
        except FAILURES:
            return -math.inf, 0.0
        mean = -statistics.fmean(values)
        return (mean, statistics.stdev(values) / math.sqrt(repeats)) if math.isfinite(mean) else (-math.inf, 0.0)

    @torch.no_grad()
    def non_finite_sites(self) -> list[str]:
        """Returns the names of the sites whose log_prob is not finite in a run."""
        if not hasattr(self.loss, "_get_traces"):
            return []
        found: dict[str, None] = {}
        try:
            with pyro.validation_enabled(False):
                for traces in self.loss._get_traces(self.model, self.guide, self.args, self.kwargs):
                    for of, trace in zip(("model", "guide"), traces, strict=True):
                        trace.compute_log_prob()
                        sites = ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and "log_prob" in s)
                        found |= {f"{n} ({of})": None for n, s in sites if not s["log_prob"].isfinite().all()}
        except FAILURES:
            return []
        return list(found)


def _number(loss: Any) -> float:
    """Converts a loss to a float; of the two losses of ``ReweightedWakeSleep``, the model's."""
    return float(loss[0] if isinstance(loss, tuple) else loss)
