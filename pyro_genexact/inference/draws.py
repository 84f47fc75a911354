"""Several draws of a guide, and what model and guide compute from them: in an outer plate, by vmap, or one by one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from ..core.devices import device_of
from .mapped import mapped, rows

PLATE = "num_particles_vectorized"
TOLERANCE = 1e-3  # relative to 1 + |log p|, of the comparison with single runs

Program = Callable[[], Any]  # a model or a guide, called without arguments


class Draws:
    """S draws of a guide, and the log-probabilities of model and guide.

    ``way`` is "plated" if both run in an outer plate, "mapped" if the guide does and ``torch.vmap`` maps the model, which is
    written for one draw, over the draws, or "alone" if both run once per draw. A model that branches on values of latents, or
    a guide that does not run in a plate, needs the last.

    Args:
        size: S.
        nesting: the number of dims of the plates of model and guide.
        shapes: the shapes of the guide's latents in a single run, by name.
        enumerates: whether the model has latents to enumerate, which are summed out, which
            "mapped" cannot do.
        way: as above.
    """

    def __init__(
        self, size: int, nesting: int, shapes: Mapping[str, Size], enumerates: bool = False, way: str = "alone"
    ) -> None:
        self.size, self.nesting, self.shapes = size, nesting, shapes
        self.enumerates, self.way = enumerates, way

    @classmethod
    def checked(
        cls,
        model: Program,
        guide: Program,
        size: int,
        nesting: int,
        shapes: Mapping[str, Size],
        enumerates: bool = False,
    ) -> Draws:
        """Returns draws in the first way that agrees with single runs on two draws; arguments as above."""
        two = (cls(2, nesting, shapes, enumerates, way) for way in ("plated", "mapped") if size > 1)
        way = next((draws.way for draws in two if draws._agrees(model, guide)), "alone")
        return cls(size, nesting, shapes, enumerates, way)

    def of(self, guide: Program) -> list[Any]:
        """Returns traces of a guide: one of all draws, or one of each draw."""
        if self.way == "alone":
            return [_traced(guide) for _ in range(self.size)]
        return [_traced(self._plate()(guide))]

    def again(self, guide: Program, traces: list[Any]) -> list[Any]:
        """Returns traces of a guide on the values in traces of it."""
        guide = guide if self.way == "alone" else self._plate()(guide)
        return [_traced(poutine.replay(guide, trace=trace)) for trace in traces]

    def log_p(self, model: Program, traces: list[Any]) -> Tensor:
        """Returns log p (S,) of a model on the draws in traces of a guide."""
        if self.way == "mapped":
            values = {name: rows(traces[0].nodes[name]["value"], s, self.size) for name, s in self.shapes.items()}
            model = poutine.replay(model, trace=subsamples(traces[0]))
            return mapped(lambda row: self._alone(poutine.condition(model, data=row)), values)  # type: ignore[no-any-return]
        if self.way == "plated":
            wide = self._plate()(model)
            if self.enumerates:
                wide = poutine.enum(wide, first_available_dim=-2 - self.nesting)
            trace = _traced(poutine.replay(wide, trace=traces[0]))
            return marginal(trace, PLATE, self.size) if self.enumerates else self._log_prob(trace)
        return torch.stack([self._alone(poutine.replay(model, trace=trace)) for trace in traces])

    def log_q(self, traces: list[Any]) -> Tensor:
        """Returns log q (S,) of the guide whose traces these are."""
        return torch.cat([self._log_prob(trace) for trace in traces])

    def score_parts(self, traces: list[Any]) -> tuple[Tensor, Tensor]:
        """Returns the sums (S,) of Pyro's score-function and entropy terms of the guide whose traces these are."""
        for trace in traces:
            trace.compute_score_parts()
        parts = [self._total(trace, lambda site: site["score_parts"].score_function) for trace in traces]
        entropies = [self._total(trace, lambda site: site["score_parts"].entropy_term) for trace in traces]
        return torch.cat(parts), torch.cat(entropies)

    def row(self, trace: Any, i: int) -> Any:
        """Returns the trace of one of the draws, with the shapes of a single run."""
        one = trace.copy()
        for name, site in drawn(trace):
            one.nodes[name] = {**site, "value": rows(site["value"], self.shapes[name], self.size)[i]}
        return one

    def _agrees(self, model: Program, guide: Program) -> bool:
        with suppress(
            Exception
        ):  # models that are not written for several draws can raise anything; later runs raise again
            (trace,) = traces = self.of(guide)
            once = _traced(poutine.replay(model, trace=self.row(trace, 0)))
            model = poutine.replay(model, trace=subsamples(once))  # so that all runs have the same rows
            together = self.log_p(model, traces), self.log_q(self.again(guide, traces))  # of values, as for single runs
            for i in range(self.size):
                one = _traced(poutine.replay(guide, trace=self.row(trace, i)))
                alone = self._alone(poutine.replay(model, trace=self.row(trace, i))), one.log_prob_sum()
                for a, b in zip(alone, together, strict=True):
                    if not torch.allclose(torch.as_tensor(a).to(b), b[i], TOLERANCE, TOLERANCE, equal_nan=True):
                        return False
            return True
        return False

    def _plate(self) -> Any:
        return pyro.plate(PLATE, self.size, dim=-1 - self.nesting)

    def _alone(self, model: Program) -> Tensor:
        """Returns log p () of a single run."""
        if self.enumerates:
            trace = _traced(poutine.enum(model, first_available_dim=-1 - self.nesting))
            return marginal(trace, PLATE, 1).squeeze(0)
        return torch.as_tensor(_traced(model).log_prob_sum())

    def _log_prob(self, trace: Any) -> Tensor:
        trace.compute_log_prob()
        return self._total(trace, lambda site: site["log_prob"])

    def _total(self, trace: Any, term: Callable[[Any], Any]) -> Tensor:
        """Returns the sum of a term of each site, for the draws of a trace: (S,), or (1,) if it has one draw."""
        size = 1 if self.way == "alone" else self.size
        found = [value for _, site in samples(trace) if isinstance(value := term(site), Tensor)]
        if not found:
            return torch.zeros(size, device=device_of(site["value"] for _, site in samples(trace)))
        return torch.stack([self._of_draws(value, size) for value in found]).sum(0)

    def _of_draws(self, value: Tensor, size: int) -> Tensor:
        dim = -1 - self.nesting
        if size == 1 or value.dim() < -dim or value.shape[dim] != size:
            return value.sum().expand(size)
        return value.movedim(dim, 0).reshape(size, -1).sum(1)


def samples(trace: Any) -> Iterator[tuple[str, Any]]:
    """Yields the sample sites of a trace, with their names, without those that hold the rows of subsampled plates."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def subsamples(trace: Any) -> Any:
    """Returns a trace of only the sites that hold the rows of subsampled plates."""
    found = poutine.Trace()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site_is_subsample(site):
            found.add_node(name, **site)
    return found


def drawn(trace: Any) -> Iterator[tuple[str, Any]]:
    """Yields the sample sites of a trace that are not observed."""
    return ((name, site) for name, site in samples(trace) if not site["is_observed"])


def _traced(program: Program) -> Any:
    return poutine.trace(program).get_trace()


def marginal(trace: Any, plate: str, size: int) -> Tensor:
    """Returns log-probabilities (S,) of a model with enumerated latents summed out.

    As in Pyro's ``TraceEnum_ELBO``, scales (of subsampled plates, for example) multiply the logarithm of the sum, and masks hide the
    sites that depend on enumerated latents, but not these latents, whose masses sum to 1.

    Args:
        trace: a trace of the model in an outer plate, or of one run, under ``poutine.enum``.
        plate: the name of the outer plate.
        size: S.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = {name: symbol for name, symbol in trace.plate_to_symbol.items() if name != plate or size > 1}
    kept = frozenset(symbols[name] for name in (plate,) if name in symbols)
    summed = {*trace.symbol_to_dim} - {*trace.plate_to_symbol.values()}
    factors, scales, rest = OrderedDict[Any, Any](), [], []
    for _, site in samples(trace):
        log_p = site["packed"]["log_prob"]
        if summed.isdisjoint(log_p._pyro_dims):
            others = [i for i, dim in enumerate(log_p._pyro_dims) if dim not in kept]
            rest.append(log_p.sum(others) if others else log_p)
            continue
        plates = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized and f.name in symbols)
        mask = None if site["infer"].get("_enumerate_dim") is not None else site["packed"]["mask"]
        factors.setdefault(plates, []).append(scale_and_mask(site["packed"]["unscaled_log_prob"], mask=mask))
        scales.append(site["scale"])
    if factors:
        rest.append(_common(scales) * contract_to_tensor(factors, summed, kept))
    return torch.stack([term.expand(size) for term in rest]).sum(0)


def _common(scales: list[Any]) -> Any:
    """Returns the scale of all sites that depend on enumerated latents."""
    if any(getattr(scale, "ndim", 0) for scale in scales) or len({float(scale) for scale in scales}) > 1:
        raise ValueError(
            "Expected one scale of all sites that depend on enumerated latents (by poutine.scale or subsampled plates); got "
            f"{scales}."
        )
    return scales[0]
