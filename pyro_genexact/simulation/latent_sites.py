"""The latent sites of a model, and the plate whose rows have latents of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from ..core.leaves import tensors_in
from .simulations import all_seeded, is_deterministic, traced

Site = dict[str, Any]
RUNS = 4  # of the model, in search of dependences


def latent_sites(
    program: Callable[[], Any], observed: Sequence[str], chosen: Sequence[str] | None = None
) -> tuple[Any, dict[str, Site], str | None]:
    """Returns a trace of a model, its latent sites by name, and the name of the row plate.

    The row plate is the leftmost plate that contains latents and observed sites; None if there is no such plate, or if its
    rows are not independent given the latents outside of it: because sites outside of it depend on its latents, or because
    latents outside of it are averaged over.

    Args:
        program: the model, called without arguments.
        observed: the names of the observed sites.
        chosen: the names of the latents; the others are averaged over. By default all.

    Raises:
        ValueError: if an observed site does not exist, if an observed site is not named, if latents or their supports differ
            between the runs, or if a plate is subsampled without amortised rows.
    """
    one, other = traced(program), traced(program)
    if missing := [name for name in observed if name not in one.nodes]:
        raise ValueError(f"Expected observed to be sites of the model, {list(one.nodes)}; got {missing}.")
    sites = {name: site for name, site in one.nodes.items() if _is_latent(site) and name not in observed}
    if unnamed := [name for name, site in sites.items() if site["infer"].get("was_observed")]:
        raise ValueError(
            f"Expected observed to name all observed sites of the model; got {observed} without {unnamed}."
        )
    if not sites:
        raise ValueError("Expected a model with latents; got only observed sites.")
    if chosen is not None and (unknown := [name for name in chosen if name not in sites]):
        raise ValueError(f"Expected latents to be among those of the model, {list(sites)}; got {unknown}.")
    every = sites
    again = {name for name, site in other.nodes.items() if _is_latent(site)} - {*observed}
    varying = again ^ set(every)
    if wrong := sorted(varying if chosen is None else varying & {*chosen}):
        raise ValueError(f"Expected the same latents in every run of the model; got {wrong} in some runs only.")
    sites = every if chosen is None else {name: every[name] for name in chosen}
    _check_supports((site, other.nodes[name]) for name, site in sites.items())
    plate = _row_plate(one, sites, observed)
    if plate is not None:
        averaged = any(dim_of(site, plate) is None for name, site in every.items() if name not in sites)
        if averaged or varying or _joined(program, one, plate, every, observed):
            plate = None
    _check_plates(one, sites, observed, plate)
    return one, sites, plate


def _is_latent(site: Any) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("is_auxiliary")
        and not is_deterministic(site)
    )


class OnlySites(Messenger):
    """Raises a ValueError if a run of a model has a factor, or latents that are not among the given sites.

    Simulations do not depend on a factor, so that their posterior is not that of the model.

    Args:
        names: the sites; None if all are allowed.
    """

    def __init__(self, names: Sequence[str] | None) -> None:
        super().__init__()
        self.names = None if names is None else {*names}

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], dist.Unit):
            raise ValueError(f"Expected a model without factors, which simulations ignore; got {msg['name']!r}.")
        if self.names is not None and _is_latent(msg) and msg["name"] not in self.names:
            raise ValueError(
                f"Expected the same latents in every run of the model; got {msg['name']!r} in some runs only."
            )


def _row_plate(trace: Any, sites: Mapping[str, Site], observed: Sequence[str]) -> str | None:
    of_data = {f.name for name in observed for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized}
    shared = [f for site in sites.values() for f in site["cond_indep_stack"] if f.name in of_data]
    return min(shared, key=lambda f: f.dim).name if shared else None


@torch.random.fork_rng([])
def _joined(
    program: Callable[[], Any], one: Any, plate: str, sites: Mapping[str, Site], observed: Sequence[str]
) -> bool:
    """Returns whether sites outside of a plate depend on latents in it, as tensors or a few runs show."""
    inside = {name for name, site in sites.items() if dim_of(site, plate) is not None}
    outside = [name for name in (*sites, *observed) if dim_of(one.nodes[name], plate) is None]
    if not outside:
        return False
    with suppress(Exception), pyro.validation_enabled(False):
        nodes = traced(TrackProvenance()(program)).nodes
        if any(get_provenance(t) & inside for name in outside for t in tensors_in(nodes[name]["fn"])):
            return True
    # code of numbers and arrays hides dependences, so runs with other values of these latents show them
    given = {name: one.nodes[name]["value"] for name in (*sites, *observed) if not is_deterministic(one.nodes[name])}
    found = []
    for i in range(RUNS):
        if i:
            other = traced(program).nodes
            given |= {name: other[name]["value"] for name in inside}
        with all_seeded(0):
            nodes = traced(program, given).nodes
        found.append([t for name in outside for t in tensors_in(nodes[name]["fn"])])
    pairs = ((a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    return any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def dim_of(site: Site, plate: str | None) -> int | None:
    """Returns the dim of a plate in the batch shape of a site; None if the site is not in it."""
    return next((f.dim for f in site["cond_indep_stack"] if f.name == plate), None)


def _check_plates(trace: Any, sites: Mapping[str, Site], observed: Sequence[str], plate: str | None) -> None:
    """Raises a ValueError if data or latents are subsampled, other than by rows that have all the latents."""
    has_globals = any(dim_of(site, plate) is None for site in sites.values())
    for site in (*sites.values(), *(trace.nodes[name] for name in observed)):
        for frame in site["cond_indep_stack"]:
            if frame.full_size in (None, frame.size) or (frame.name == plate and not has_globals):
                continue
            raise ValueError(
                f"Expected plates without subsampling, since the posterior of a latent outside of a plate depends on all of "
                f"its data; got {site['name']!r} in {frame.name!r} with {frame.size} of {frame.full_size} rows."
            )


def _check_supports(sites: Iterable[tuple[Site, Site]]) -> None:
    """Raises a ValueError if the bounds of a support differ between two runs of a model."""
    for one, other in sites:
        first, second = (tensors_in(site["fn"].support) for site in (one, other))
        if any(a.shape != b.shape or (a != b).any() for a, b in zip(first, second, strict=True)):
            raise ValueError(
                f"Expected latents whose supports are the same in every run; got bounds of {one['name']!r} that depend "
                f"on other latents, {one['fn'].support} and {other['fn'].support}. Sample it on a fixed support and "
                "rescale it."
            )
