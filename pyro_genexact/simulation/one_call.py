"""One call of an amortised guide in Pyro: its parameters, the observations, and the plates of its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .latent_space import Latent
from .simulations import is_deterministic


def register(name: str, network: nn.Module) -> None:
    """Registers the parameters in Pyro's store, in place of those of another guide of the same latents."""
    store: Any = pyro.get_param_store()
    for part, parameter in network.named_parameters():
        full = f"{name}$$${part}"
        if store._params.get(full, parameter) is not parameter:
            del store[full]
    pyro.module(name, network)


def run_of(program: Callable[[], Any]) -> Any:
    """Returns a trace of the model. Outer handlers see its subsamples, so that model and guide have the same rows."""
    with torch.no_grad(), poutine.block(hide_fn=lambda site: not site_is_subsample(site)):
        return poutine.trace(program).get_trace()


def observed_in(run: Any, observed: Sequence[str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the observations of a run; those of sites that it does not observe are the given ones.

    Raises:
        ValueError: if a site is neither observed nor given.
    """
    sites: Any = {name: run.nodes[name] for name in observed}
    missing = [n for n, site in sites.items() if not site["is_observed"] or is_deterministic(site)]
    if absent := [name for name in missing if name not in given]:
        raise ValueError(
            f"Expected values of the observed sites: pass observations={{name: value}}, or arguments with which the model "
            f"observes them; got none for {absent}."
        )
    return {name: given[name] if name in missing else site["value"] for name, site in sites.items()}


def check_whole(run: Any, observed: Sequence[str], row_plate: str | None) -> None:
    """Raises a ValueError if observed sites are in a subsampled plate other than that of the rows."""
    for name in observed:
        for frame in run.nodes[name]["cond_indep_stack"]:
            if frame.name != row_plate and frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"Expected plate {frame.name!r} without subsampling, since latents outside of it depend on all of its "
                    f"data; got {frame.size} of {frame.full_size} rows."
                )


def plates_of(
    latents: Sequence[Latent], row_plate: str | None, rows: int, run: Any, splits: bool
) -> tuple[dict[str, Any], float]:
    """Returns the plates of the latents by name, and the factor of the log density if the rows are a subsample.

    Args:
        latents: the latents.
        row_plate: the name of the row plate.
        rows: R, its number of rows in this call.
        run: a trace of the model in this call; None if no plate is subsampled.
        splits: whether the log density is a sum over rows.

    Raises:
        ValueError: if another plate has another size than in the first run, or if there is a subsample, but no sum over rows.
    """
    weight, plates = 1.0, {}
    for name, frame in {f.name: f for x in latents for f in x.frames}.items():
        size = rows if name == row_plate else frame.size
        if run is None:
            plates[name] = pyro.plate(name, size, dim=frame.dim)
            continue
        now = [f for x in latents for f in run.nodes[x.name]["cond_indep_stack"] if f.name == name]
        if any(f.size != size for f in now):
            raise ValueError(f"Expected plate {name!r} of size {size}, as in the first call; got {now[0].size}.")
        full = (now[0].full_size or size) if now else size
        if full != size and (name != row_plate or not splits):
            raise ValueError(
                f"Expected plate {name!r} without subsampling, because of latents outside of it or several flows; got "
                f"{size} of {full} rows."
            )
        weight *= full / size
        with poutine.block():  # outer handlers have seen the subsample of the run
            plates[name] = pyro.plate(name, full, subsample=run.nodes[name]["value"], dim=frame.dim)
    return plates, weight
