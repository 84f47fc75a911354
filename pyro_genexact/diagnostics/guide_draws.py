"""Runs a model on draws of a guide, in one vectorised pass if the programs allow it, and otherwise one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..core.devices import device_of
from ..inference.draws import marginal
from ..inference.elbo import needs_log_prob
from ..inference.mapped import mapped, rows
from ..simulation.simulations import ResampleObserved, is_deterministic

Site = dict[str, Any]
COMPUTED = ("draws", "deterministic", "log_p", "log_q", "log_likelihood", "predictive")  # in the order of the fields
DRAWS = "_draws_of_the_guide"  # the name of a plate
CHECKED = 1e-3  # tolerance, relative to 1 + |log p|, of the comparison between vectorised and single runs


@dataclass
class GuideDraws:
    """S draws of a guide, and what the model computes from them.

    Attributes:
        draws: the model's latents by name, (S, *plates, *event).
        deterministic: ``pyro.deterministic`` sites by name, (S, *plates, *event).
        log_p: joint log-probabilities of the model, (S,).
        log_q: joint log-probabilities of the guide, (S,).
        log_likelihood: log-likelihoods of the observed values by site, (S, *plates).
        predictive: new values of the observed sites, (S, *plates, *event).
        observed: the observed values, (*plates, *event).
        points: names of the latents for which the guide has a point estimate.
        dims: names of the batch dims of each site; None for dims of size 1 without a plate.
    """

    draws: dict[str, Tensor]
    deterministic: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    log_likelihood: dict[str, Tensor]
    predictive: dict[str, Tensor]
    observed: dict[str, Tensor] = field(default_factory=dict)
    points: list[str] = field(default_factory=list)
    dims: dict[str, list[str | None]] = field(default_factory=dict)

    @property
    def log_ratios(self) -> Tensor:
        """The log importance ratios log p - log q (S,). Raises a ValueError if the guide has point estimates."""
        if self.points:
            raise ValueError(
                f"Expected a guide with a density for each latent; got a point estimate for {self.points}."
            )
        return self.log_p - self.log_q


@torch.no_grad()
def draw(
    model: Callable[..., Any],
    posterior: Callable[..., Any] | Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_samples: int,
    predict: bool = False,
) -> GuideDraws:
    """Runs the model on S draws of the guide, or on given draws (S, ...).

    The vectorised pass runs both in a plate around all others, and if that fails, ``torch.vmap`` maps the model over draws.
    The result of a pass is used only if the log-probabilities of its first and last draw agree with those of single runs.
    """
    return ModelAndPosterior(model, posterior, args, kwargs, predict).run(num_samples)


class ModelAndPosterior:
    """A model and its posterior; one run of both, at construction, determines the shapes of all sites."""

    def __init__(self, model: Any, posterior: Any, args: Any, kwargs: Any, predict: bool) -> None:
        self.model, self.posterior, self.args, self.kwargs, self.predict = model, posterior, args, kwargs, predict
        self.guide = self._proposal(0)
        self.trace = self._replay(self.guide)
        self.latents = list(latents(self.trace))
        self.enumerated = [] if predict else [name for name in self.latents if self._is_summed_out(name)]
        self.latents = [name for name in self.latents if name not in self.enumerated]
        _check(self.guide, self.trace, self.latents)
        sites = [s for t in (self.trace, self.guide) for _, s in _samples(t)]
        depths = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
        self.depth = max([0, *depths, *(len(s["fn"].batch_shape) for s in sites if s["fn"] is not None)])

    def run(self, size: int) -> GuideDraws:
        """Returns S draws, from one pass if possible."""
        found = self.vectorised(size)
        if found is None:
            programs = [self.model, self.posterior] if callable(self.posterior) else [self.model]
            with needs_log_prob(*(partial(program, *self.args, **self.kwargs) for program in programs)):
                found = combined(torch.cat, [self.one(i) for i in range(size)])
        return self.described(found)

    def one(self, i: int) -> GuideDraws:
        """Runs guide and model once, or the model on given draw i."""
        return self._single(self._proposal(i))

    def vectorised(self, size: int) -> GuideDraws | None:
        """Returns all draws from one pass, or None if no pass runs or agrees with single runs."""
        plate: Any = pyro.plate(DRAWS, size, dim=-self.depth - 1)
        for read in (self._plated, self._mapped):
            with suppress(
                Exception
            ):  # what does not run in a pass can raise anything; single runs raise other errors again
                guide = self._all(size) if isinstance(self.posterior, Mapping) else self._traced(plate(self.posterior))
                found = read(guide, size, plate)
                if all(self._is_alone(found, guide, i, size) for i in {0, size - 1}):
                    return found
        return None

    def _single(self, guide: Any) -> GuideDraws:
        """Runs the model once on the values in a trace."""
        return self._plated(guide, 1, lambda program: program)

    def _plated(self, guide: Any, size: int, plate: Any) -> GuideDraws:
        found = self._read(guide, self._replay(guide, plate(self.model)), size, plate)
        if not self.enumerated:
            return found
        return replace(found, deterministic={}, log_p=self._marginal(guide, size, plate))

    def _mapped(self, guide: Any, size: int, plate: Any) -> GuideDraws:
        values = {name: rows(guide.nodes[name]["value"], self.shape(name), size) for name in self.latents}

        def one(row: dict[str, Tensor]) -> list[Any]:
            found = self._single(_given(row))
            return [getattr(found, name) for name in COMPUTED]

        runs = GuideDraws(*mapped(one, values))
        return replace(combined(lambda x: x[0].flatten(0, 1), [runs]), log_q=_total(guide, size))

    def _is_alone(self, found: GuideDraws, guide: Any, i: int, size: int) -> bool:
        """Returns whether draw i has the same log-probabilities and deterministic values as in a single run."""
        row = self._row(guide, i, size)
        one = self._single(row if isinstance(self.posterior, Mapping) else self._replay(row, self.posterior))
        pairs = [(one.log_p[0], found.log_p[i]), (one.log_q[0], found.log_q[i])]
        pairs += [(one.deterministic[name][0].double(), v[i].double()) for name, v in found.deterministic.items()]
        return all(torch.allclose(a, b.to(a), rtol=CHECKED, atol=CHECKED, equal_nan=True) for a, b in pairs)

    def described(self, found: GuideDraws) -> GuideDraws:
        """Adds observed values, point estimates and names of dims."""
        found.observed = {name: site["value"] for name, site in observations(self.trace)}
        fixed = [name for name, x in found.draws.items() if (x == x[:1]).all()]
        found.points = [n for n in fixed if self.guide.nodes[n]["fn"] is not None and _is_delta(self.guide.nodes[n])]
        found.dims = {name: dims_of(name, site) for name, site in _samples(self.trace)}
        return found

    def _traced(self, program: Any) -> Any:
        return poutine.trace(program).get_trace(*self.args, **self.kwargs)

    def _replay(self, guide: Any, program: Any = None) -> Any:
        return self._traced(poutine.replay(self.model if program is None else program, trace=guide))

    def _proposal(self, i: int) -> Any:
        if not isinstance(self.posterior, Mapping):
            return self._traced(self.posterior)
        return _given({name: value[i] for name, value in self.posterior.items()})

    def _all(self, size: int) -> Any:
        """Returns a trace of all given draws, with dims of size 1 between the outer plate and those of each site."""
        values = {}
        for name, value in self.posterior.items():
            gap = self.depth - len(self.trace.nodes[name]["fn"].batch_shape)
            values[name] = value.reshape(size, *[1] * gap, *value.shape[1:])
        return _given(values)

    def _row(self, guide: Any, i: int, size: int) -> Any:
        """Returns a trace of the random values of draw i; sites that the guide computes from them are left out."""
        random = {name: site["value"] for name, site in _samples(guide) if site["fn"] is None or not _is_delta(site)}
        return _given({name: rows(v, self.guide.nodes[name]["value"].shape, size)[i] for name, v in random.items()})

    def _read(self, guide: Any, model: Any, size: int, plate: Any) -> GuideDraws:
        if (now := set(latents(model)) - {*self.enumerated}) != set(self.latents):
            raise ValueError(
                f"Expected the same latents in every run of the model; got {sorted(now ^ set(self.latents))} in some runs only."
            )
        value = {name: rows(site["value"], self.shape(name), size) for name, site in _samples(model)}
        likelihood = {}
        for name, site in observations(model):
            log_p = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            likelihood[name] = rows(log_p, self.trace.nodes[name]["fn"].batch_shape, size)
        predictive = {}
        if self.predict:
            new = self._replay(guide, plate(ResampleObserved()(self.model)))
            predictive = {name: rows(new.nodes[name]["value"], self.shape(name), size) for name in likelihood}
        return GuideDraws(
            {name: value[name] for name in self.latents},
            {name: value[name] for name, site in _samples(model) if is_deterministic(site)},
            _total(model, size),
            _total(guide, size),
            likelihood,
            predictive,
        )

    def _is_summed_out(self, name: str) -> bool:
        return name not in self.guide.nodes and self.trace.nodes[name]["infer"].get("enumerate") == "parallel"

    def _marginal(self, guide: Any, size: int, plate: Any) -> Tensor:
        """Returns the log-probabilities (S,) of the model with enumerated latents summed out."""
        enumerated = poutine.enum(plate(self.model), first_available_dim=-2 - self.depth)
        trace = self._replay(guide, enumerated)
        return marginal(trace, DRAWS, size)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a site of the model in a single run."""
        shape: torch.Size = self.trace.nodes[name]["value"].shape
        return shape


def latents(trace: Any) -> Iterator[str]:
    """Returns the names of the sites that are neither observed nor deterministic nor auxiliary."""
    return (name for name, site in _samples(trace) if not site["is_observed"] and not _is_helper(site))


def observations(trace: Any) -> Iterator[tuple[str, Site]]:
    """Yields observed sites, without deterministic ones and factors."""
    for name, site in _samples(trace):
        if site["is_observed"] and not is_deterministic(site) and site["value"].numel():
            yield name, site


def _is_helper(site: Site) -> bool:
    return is_deterministic(site) or bool(site["infer"].get("is_auxiliary"))


def _samples(trace: Any) -> Iterator[tuple[str, Site]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def _is_delta(site: Site) -> bool:
    fn = site["fn"]
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _given(values: Mapping[str, Tensor]) -> Any:
    """Returns a trace of values to replay."""
    trace = poutine.Trace()
    for name, value in values.items():
        given: dict[str, Any] = {"fn": None, "infer": {}, "cond_indep_stack": (), "is_observed": False, "mask": None}
        trace.add_node(name, name=name, type="sample", value=value, **given)
    return trace


def _check(guide: Any, model: Any, of_model: list[str]) -> None:
    """Raises a ValueError if log p - log q is not exact: for subsampled plates and different latents."""
    for trace in (guide, model):
        for _, site in _samples(trace):
            for frame in site["cond_indep_stack"]:
                if frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"Expected plates without subsampling (log p would be an estimate); got {frame.size} of "
                        f"{frame.full_size} rows in plate {frame.name!r}."
                    )
    if missing := [name for name in of_model if name not in guide.nodes]:
        raise ValueError(f"Expected posterior to draw all latents of the model; {missing} are missing.")
    if extra := [name for name, site in _samples(guide) if name not in of_model and not _is_helper(site)]:
        raise ValueError(
            f"Expected posterior to have only latents of the model, {of_model}, and sites with "
            f"infer={{'is_auxiliary': True}}; got {extra}."
        )


def _total(trace: Any, size: int) -> Tensor:
    """Returns the joint log-probability of each draw (S,); 0 for given draws, whose density is unknown."""
    sites = [site for _, site in _samples(trace)]
    if not sites or any(site["fn"] is None for site in sites):
        return torch.zeros(size, device=device_of(site["value"] for site in sites))
    trace.compute_log_prob()
    parts = [site["log_prob"] for site in sites]
    sums = [p.reshape(size, -1).sum(1) if len(p.shape[:1]) and len(p) == size else p.sum().expand(size) for p in parts]
    return torch.stack(sums).sum(0)


def dims_of(name: str, site: Site) -> list[str | None]:
    """Returns the names of the batch dims of a site's value, which are those of plates; None for size 1 without a plate."""
    shape: torch.Size = site["value"].shape
    plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    batch = shape[: len(shape) - site["fn"].event_dim]
    if not batch and plates and is_deterministic(site):  # all dims of these sites are event dims by default
        batch = shape if all(-d <= len(shape) and shape[d] == frame.size for d, frame in plates.items()) else batch
    names: list[str | None] = [None if size == 1 else f"{name}_dim_{i}" for i, size in enumerate(batch)]
    for dim, frame in plates.items():
        if -dim <= len(batch):
            names[dim] = frame.name
    return names


def combined(function: Callable[[list[Tensor]], Tensor], runs: list[GuideDraws]) -> GuideDraws:
    """Applies a function to the list of each computed tensor of all runs."""

    def of(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return function(values)
        return {name: function([value[name] for value in values]) for name in values[0]}

    return GuideDraws(*(of([getattr(run, name) for run in runs]) for name in COMPUTED))
