"""Draws from the prior predictive of a model, in one vectorised run if the model takes one, and otherwise one by one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.checks import check_sizes
from ..core.leaves import tensors_in
from ..core.random import generator, seeded
from ..inference.fitting import Progress

CHECKED = 1e-4  # tolerance of the comparison between vectorised and single runs, relative to 1 + |value|

Draws = dict[str, Tensor]


def is_deterministic(site: Any) -> bool:
    """Returns whether a site is one of ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic"))


class ResampleObserved(UnconditionMessenger):
    """Samples observed sites, except deterministic ones."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


@torch.no_grad()
def traced(program: Callable[[], Any], given: Draws | None = None) -> Any:
    """Returns the trace of one run in which observed sites are sampled, without effects on outer handlers.

    Args:
        program: a model without arguments.
        given: the values of some sites.
    """
    values = poutine.Trace()
    empty: dict[str, Any] = {"fn": None, "infer": {}, "cond_indep_stack": (), "is_observed": False, "mask": None}
    for name, value in (given or {}).items():
        values.add_node(name, name=name, type="sample", value=value, **empty)
    with poutine.block():
        return poutine.trace(poutine.replay(ResampleObserved()(program), trace=values)).get_trace()


def simulate(
    program: Callable[[], Any],
    names: Sequence[str],
    size: int,
    *,
    given: Draws | None = None,
    seed: int = 0,
    vectorize: bool | None = None,
    num_workers: int = 0,
    progress: bool = False,
    stacklevel: int = 3,
) -> Draws:
    """Returns N joint draws of some sites, tensors (N, ...) by name.

    Args:
        program: a model without arguments.
        names: the sites.
        size: N.
        given: values (N, ...) of some sites, given which the others are drawn, as in a posterior predictive.
        seed: the seed. Runs one by one have the same numbers for any ``num_workers``.
        vectorize: whether to use one run in a plate around all others; by default, if its draws have the right shapes and,
            for the latents of its first and last draw, agree with single runs.
        num_workers: the number of processes for runs one by one.
        progress: whether to report runs one by one.
        stacklevel: that of the warning about runs one by one; by default it names the caller of the caller.

    Raises:
        ValueError: if a site does not exist in every run, or has another shape in some.
    """
    check_sizes(1, simulations=size)
    with seeded(seed, torch.device("cpu")), poutine.block():
        one = traced(program, _row(given, 0))
        shapes = {name: _value(one, name).shape for name in names}
        if vectorize or vectorize is None:
            try:
                return _vectorised(program, shapes, size, one, bool(vectorize), given or {})
            except (
                Exception
            ) as error:  # the model does not run in an outer plate; a loop raises errors of the model itself
                if vectorize:
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            reason = ""
    if reason and size > 1:
        warnings.warn(
            f"The model is run {size} times, one by one, since it does not run in an outer plate: {reason} Pass "
            "vectorize=False if this is intended, or vectorize=True if one run of all draws is right.",
            stacklevel=stacklevel,
        )
    return _one_by_one(Runs(program, shapes, size, seed, given), num_workers, progress)


def _value(trace: Any, name: str) -> Tensor:
    if name not in trace.nodes:
        raise ValueError(f"Expected the sites {name!r} in every run of the model; got a run without it.")
    value = trace.nodes[name]["value"]
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected the value of {name!r} to be a tensor; got {type(value).__name__}.")
    return value


def _vectorised(
    program: Any, shapes: Mapping[str, torch.Size], size: int, one: Any, forced: bool, given: Draws
) -> Draws:
    nodes = [s for s in one.nodes.values() if s["type"] == "sample" and not site_is_subsample(s)]
    dims = [-f.dim for s in nodes for f in s["cond_indep_stack"] if f.vectorized]
    depth = max([0, *dims, *(len(s["fn"].batch_shape) for s in nodes)])
    plate: Any = pyro.plate("_simulations", size, dim=-depth - 1)
    gaps = {name: [1] * (depth - len(one.nodes[name]["fn"].batch_shape)) for name in given}
    trace = traced(plate(program), {n: v.reshape(size, *gaps[n], *v.shape[1:]) for n, v in given.items()})
    found = {}
    for name, shape in shapes.items():
        value = _value(trace, name)
        if value.shape[:1] != (size,) or value.numel() != size * shape.numel():
            raise ValueError(f"{name!r} has shape {tuple(value.shape)} for {size} draws of shape {tuple(shape)}.")
        found[name] = value.reshape(size, *shape)
    if not forced:
        _compare(program, trace, found, size)
    return found


def _compare(program: Any, trace: Any, found: Draws, size: int) -> None:
    """Raises a ValueError unless single runs agree with draws of a vectorised run, given the same values of its sites."""
    for i in sorted({0, size - 1}):
        given = {n: value[i] for n, value in found.items() if not is_deterministic(trace.nodes[n])}
        alone = traced(program, given)
        for name, value in found.items():
            site = alone.nodes[name]
            if is_deterministic(site):
                if not torch.allclose(site["value"].double(), value[i].double(), CHECKED, CHECKED, equal_nan=True):
                    raise ValueError(
                        f"{name!r} differs between a single run and a vectorised one, or has noise that is no sample site."
                    )
            elif name in given and not _same_log_prob(trace.nodes[name], site, i, size):
                raise ValueError(f"the distribution of {name!r} differs between a single run and a vectorised one.")


def _same_log_prob(many: Any, one: Any, i: int, size: int) -> bool:
    try:
        all_of, alone = many["fn"].log_prob(many["value"]), one["fn"].log_prob(one["value"])
    except NotImplementedError:  # simulators without a density
        pairs = [*zip(tensors_in(many["fn"]), tensors_in(one["fn"]), strict=True)]
        rows = [(a.reshape(size, -1)[i] if a.numel() == size * b.numel() else a.flatten(), b) for a, b in pairs]
        return all(a.shape == b.flatten().shape and torch.allclose(a, b.flatten(), CHECKED, CHECKED) for a, b in rows)
    return torch.allclose(all_of.reshape(size, -1)[i].sum(), alone.sum().to(all_of), 1e-3, 1e-3, equal_nan=True)


@contextmanager
def all_seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of torch, NumPy and Python, and restores their states on exit."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with seeded(seed, torch.device("cpu")):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class Runs(Dataset[Draws]):
    """N runs of a model, each with its own seed.

    Args:
        program: a model without arguments.
        shapes: the shape of each site to record.
        size: N.
        seed: the seed.
        given: values (N, ...) of some sites.
    """

    def __init__(
        self, program: Any, shapes: Mapping[str, torch.Size], size: int, seed: int, given: Draws | None = None
    ) -> None:
        self.program, self.shapes, self.size, self.seed, self.given = program, shapes, size, seed, given

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Draws:
        seed = int(torch.randint(2**31, (), generator=generator(self.seed, i), device="cpu"))
        with all_seeded(seed):
            trace = traced(self.program, _row(self.given, i))
        found = {name: _value(trace, name).detach() for name in self.shapes}
        for name, shape in self.shapes.items():
            if found[name].shape != shape:
                raise ValueError(
                    f"Expected {name!r} of the same shape in every run of the model; got {tuple(shape)} and "
                    f"{tuple(found[name].shape)}."
                )
        return found


def _row(draws: Draws | None, i: int) -> Draws:
    return {name: value[i] for name, value in (draws or {}).items()}


def _one_by_one(runs: Runs, num_workers: int, progress: bool) -> Draws:
    size = len(runs)
    loader = DataLoader(runs, batch_size=None, num_workers=num_workers, generator=generator(runs.seed))
    rows = []
    with Progress(size, "run", progress) as bar:
        for i, row in enumerate(loader):
            rows.append(row)
            bar.report(i + 1, lambda: "simulated", i + 1 == size)
    return {name: torch.stack([row[name] for row in rows]) for name in runs.shapes}


def finite_rows(draws: Draws) -> Draws:
    """Returns the rows without NaN or infinity in any site; see :func:`kept_rows`."""
    kept = kept_rows({name: value.reshape(len(value), -1).isfinite().all(1) for name, value in draws.items()})
    return {name: value[kept.to(value.device)] for name, value in draws.items()}


def kept_rows(usable: Mapping[str, Tensor], stacklevel: int = 4) -> Tensor:
    """Returns which rows (N,) are usable at all sites, given those of each site; warns if there are others.

    A posterior given an observation without NaN does not depend on them.

    Raises:
        ValueError: if no row is left.
    """
    kept = torch.stack([rows.cpu() for rows in usable.values()]).all(0)
    size, bad = len(kept), [name for name, rows in usable.items() if not rows.all()]
    if not kept.any():
        raise ValueError(f"Expected some simulations without NaN or infinity; got {size} of {size} with, in {bad}.")
    if bad:
        warnings.warn(
            f"{size - int(kept.sum())} of {size} simulations with NaN or infinity in {bad} are left out. The posterior "
            "given an observation without them does not depend on these.",
            stacklevel=stacklevel,
        )
    return kept
