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
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .compiled import RecordedGradients
from .mapped import MappedELBO, Shapes, rows

PARTICLES = 16, 256  # least and most draws in each ELBO estimate
NUMBERS = 2**20  # numbers at all sites of a step up to which there are more draws than the least
ONE_BY_ONE = 4  # draws that are evaluated one by one

# raised by distributions with non-finite parameters (after steps that are far too long) or values outside the support
FAILURES = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def default_loss(model: Callable[[], Any], guide: Callable[[], Any], num_particles: int | None) -> Any:
    """Returns an ELBO of Pyro: with enumeration if the model has enumerated sites, of all draws in one pass if possible.

    Args:
        model: the model, called without arguments.
        guide: the guide, called without arguments.
        num_particles: the number of draws; None for 256, for fewer if sites have many numbers, but at least 16, or for 4 that
            are evaluated one by one.
    """
    with torch.no_grad():
        traces = _traces(model, guide)
        sites = [site for trace in traces for site in _sample_sites(trace)]
        dims = [frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
        nesting = -min(dims, default=0)
        size = num_particles or _affordable(sites)
        if any(site["infer"].get("enumerate") == "parallel" for site in sites):
            return TraceEnum_ELBO(num_particles=num_particles or PARTICLES[0], max_plate_nesting=nesting)
        shapes = {site["name"]: site["value"].shape for site in sites if _is_drawn(site)}
        if size > 1 and vectorizes(model, guide, nesting, shapes):
            return Trace_ELBO(num_particles=size, vectorize_particles=True, max_plate_nesting=nesting)
        if size > 1 and maps(model, guide, nesting, shapes):
            return MappedELBO(shapes, num_particles=size, max_plate_nesting=nesting)
    if size > 1:
        size = num_particles or ONE_BY_ONE
        warnings.warn(
            f"The {size} draws of each step are evaluated one by one, which is slow, because model or guide has another "
            "log_prob for several draws at once, and torch.vmap cannot map the model over draws. Index latents from the right, "
            "such as alpha[..., group], and do not branch on their values.",
            stacklevel=3,
        )
    return Trace_ELBO(num_particles=size, max_plate_nesting=nesting)


def _affordable(sites: list[Any]) -> int:
    """Returns a number of draws, a power of two, so that the sites have at most ``NUMBERS`` numbers if possible."""
    least, most = PARTICLES
    per_draw = sum(site["value"].numel() for site in sites)
    return max(least, min(most, 2 ** int(math.log2(max(1, NUMBERS // max(1, per_draw))))))


def _traces(model: Callable[[], Any], guide: Callable[[], Any], wrap: Any = lambda program: program) -> tuple[Any, Any]:
    """Returns the trace of the guide and that of the model on the guide's draws."""
    guide_trace = poutine.trace(wrap(guide)).get_trace()
    return guide_trace, poutine.trace(wrap(poutine.replay(model, trace=guide_trace))).get_trace()


def vectorizes(model: Callable[[], Any], guide: Callable[[], Any], nesting: int, shapes: Shapes) -> bool:
    """Returns whether two draws in one pass, in an outer plate, have the same log_prob as in separate runs.

    Args:
        model: the model, called without arguments.
        guide: the guide, called without arguments.
        nesting: the number of dims of their plates.
        shapes: the shapes of the latents in a single run, by name.
    """
    at_once = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=nesting)._vectorized_num_particles
    with suppress(Exception):  # models that are not vectorised can raise anything; later runs raise other errors again
        for function, trace in zip((guide, model), _traces(model, guide, at_once), strict=True):
            trace.compute_log_prob()
            together = sum(_of_rows(site["log_prob"], -1 - nesting) for site in _sample_sites(trace))
            if not _are_alone(together, function, trace, shapes):
                return False
        return True
    return False


def maps(model: Callable[[], Any], guide: Callable[[], Any], nesting: int, shapes: Shapes) -> bool:
    """Returns whether :class:`MappedELBO` gives two draws the same log_prob as separate runs; arguments as above."""
    elbo = MappedELBO(shapes, num_particles=2, max_plate_nesting=nesting)
    with suppress(Exception):
        trace = elbo.draws(guide)
        log_p, log_q = elbo.log_p(model, trace), elbo.log_q(trace)[0]
        return _are_alone(log_q, guide, trace, shapes) and _are_alone(log_p, model, trace, shapes)
    return False


def _are_alone(together: Any, function: Callable[[], Any], trace: Any, shapes: Shapes) -> bool:
    """Returns whether the log_prob of two draws (2,) are those of separate runs."""
    for row in range(2):
        one = poutine.trace(poutine.replay(function, trace=_row(trace, shapes, row))).get_trace()
        alone = torch.as_tensor(one.log_prob_sum()).to(together)
        if not torch.allclose(alone, together[row], rtol=1e-3, atol=1e-3, equal_nan=True):
            return False
    return True


def _sample_sites(trace: Any) -> Iterator[Any]:
    return (site for site in trace.nodes.values() if site["type"] == "sample")


def _is_drawn(site: Any) -> bool:
    return not site["is_observed"] and not site_is_subsample(site)


def _of_rows(log_prob: Tensor, dim: int) -> Tensor:
    """Returns the sums (2,) of log_prob over all dims but that of the two draws."""
    if log_prob.dim() < -dim or log_prob.shape[dim] != 2:
        return log_prob.sum().expand(2)
    return log_prob.movedim(dim, 0).reshape(2, -1).sum(1)


def _row(trace: Any, shapes: Shapes, row: int) -> Any:
    """Returns the trace of one of the two draws, with the shapes of a single run."""
    one = trace.copy()
    for name, site in one.nodes.items():
        if site["type"] == "sample" and _is_drawn(site):
            one.nodes[name] = {**site, "value": rows(site["value"], shapes[name], 2)[row]}
    return one


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
        for site in _sample_sites(poutine.trace(program).get_trace()):
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
