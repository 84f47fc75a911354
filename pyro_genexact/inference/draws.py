"""Several draws of a guide, and what model and guide compute from them: in an outer plate, by vmap, or one by one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import scale_and_mask
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match
from torch import Size, Tensor

from ..core.devices import device_of
from .mapped import mapped, rows

PLATE = "num_particles_vectorized"
TOLERANCE = 1e-3  # relative to 1 + |log p| of a site or of all, of the comparison with single runs

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
            model = _on_rows_of(traces[0], model)
            return mapped(lambda row: self._alone(poutine.condition(model, data=row)), values)  # type: ignore[no-any-return]
        if self.way == "plated":
            trace = self._in_plate(model, traces[0])
            self._match(trace, traces[0])
            return marginal(trace, PLATE, self.size) if self.enumerates else self._log_prob(trace)
        return torch.stack([self._alone(poutine.replay(model, trace=trace), trace) for trace in traces])

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
            model = _on_rows_of(_traced(poutine.replay(model, trace=self.row(trace, 0))), model)
            together = self.log_p(model, traces), self.log_q(self.again(guide, traces))  # of values, as for single runs
            for i in range(self.size):
                one = _traced(poutine.replay(guide, trace=self.row(trace, i)))
                alone = self._alone(poutine.replay(model, trace=one), one), _summed(one)
                for a, b in zip(alone, together, strict=True):
                    if not torch.allclose(a.to(b), b[i], TOLERANCE, TOLERANCE, equal_nan=True):
                        return False
            return self.way == "mapped" or self._agree_sites(model, trace)
        return False

    def _agree_sites(self, model: Program, guide_trace: Any) -> bool:
        """Returns whether each site in the outer plate has the log_prob of single runs, since a total can hide an error."""
        wide = self._in_plate(model, guide_trace)
        wide.compute_log_prob()
        for i in range(self.size):
            one = self._single(poutine.replay(model, trace=self.row(guide_trace, i)))
            one.compute_log_prob()
            for name, site in samples(one):
                found = self._of_draws(wide.nodes[name]["log_prob"], self.size)[i]
                if not torch.allclose(site["log_prob"].sum().to(found), found, TOLERANCE, TOLERANCE, equal_nan=True):
                    return False
        return True

    def _in_plate(self, model: Program, guide_trace: Any) -> Any:
        """Returns the trace of a model in the outer plate, on the draws in a trace of the guide."""
        wide = self._plate()(model)
        if self.enumerates:
            wide = poutine.enum(wide, first_available_dim=-2 - self.nesting)
        return _traced(poutine.replay(wide, trace=guide_trace))

    def _single(self, model: Program) -> Any:
        return _traced(poutine.enum(model, first_available_dim=-1 - self.nesting) if self.enumerates else model)

    def _plate(self) -> Any:
        return pyro.plate(PLATE, self.size, dim=-1 - self.nesting)

    def _alone(self, model: Program, guide_trace: Any = None) -> Tensor:
        """Returns log p () of a single run, whose latents must be those of a trace of the guide, if that is given."""
        trace = self._single(model)
        if guide_trace is not None:
            self._match(trace, guide_trace)
        return marginal(trace)[0] if self.enumerates else _summed(trace)

    def _match(self, trace: Any, guide_trace: Any) -> None:
        """Makes Pyro warn, if it validates, about latents of only the model or only the guide."""
        if is_validation_enabled():
            check_model_guide_match(trace, guide_trace, self.nesting)

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


def drawn(trace: Any) -> Iterator[tuple[str, Any]]:
    """Yields the sample sites of a trace that are not observed."""
    return ((name, site) for name, site in samples(trace) if not site["is_observed"])


def _traced(program: Program) -> Any:
    return poutine.trace(program).get_trace()


def _summed(trace: Any) -> Tensor:
    """Returns the log-probability () of a trace, which is 0 if it has no sites."""
    total = trace.log_prob_sum()
    return total if isinstance(total, Tensor) else torch.tensor(total)


def _on_rows_of(trace: Any, program: Program) -> Program:
    """Returns a program whose subsampled plates have the rows of those in a trace."""
    rows = poutine.Trace()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site_is_subsample(site):
            rows.add_node(name, **site)
    return poutine.replay(program, trace=rows)  # type: ignore[no-any-return]


def marginal(trace: Any, plate: str | None = None, size: int = 1) -> Tensor:
    """Returns log-probabilities (S,) of a model with enumerated latents summed out.

    The sum is over unscaled probabilities, and its logarithm is scaled. Masks apply to what depends on the latents, not
    to their own probabilities, whose sum is 1.

    Args:
        trace: a trace of the model under ``poutine.enum``.
        plate: the name of the outer plate of draws, if there is one.
        size: S.

    Raises:
        ValueError: if sites that depend on enumerated latents have different scales.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols, scales = trace.plate_to_symbol, set[float]()
    enumerated = {*trace.symbol_to_dim} - {*symbols.values()}
    outer = frozenset(symbols[name] for name in (plate,) if name in symbols)
    single = outer if size == 1 else frozenset()  # packed tensors have no dims of size 1
    plain, summed = OrderedDict[Any, Any](), OrderedDict[Any, Any]()
    for _, site in samples(trace):
        plates = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized) - single
        packed = site["packed"]
        if enumerated.isdisjoint(packed["log_prob"]._pyro_dims):
            plain.setdefault(plates, []).append(packed["log_prob"])
            continue
        mask = None if "_enumerate_dim" in site["infer"] else packed["mask"]
        summed.setdefault(plates, []).append(scale_and_mask(packed["unscaled_log_prob"], mask=mask))
        scales.add(float(site["scale"]))
    if len(scales) > 1:
        raise ValueError(f"Expected one scale of all sites that depend on enumerated latents; got {sorted(scales)}.")
    parts = [(1.0, plain), *((scale, summed) for scale in scales)]
    terms = [scale * contract_to_tensor(factors, enumerated, outer - single) for scale, factors in parts if factors]
    return sum(terms).expand(size)  # type: ignore[union-attr, no-any-return]
