"""Simulations as training rows of an amortised guide, after checks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contexts import unpadded
from .observations import mapped
from .simulations import kept_rows


def rows_of(guide: Any, draws: Mapping[str, Any], names: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """Returns simulations (N, ...) by site as packed latents (N, P) and observations, without unusable rows.

    Args:
        guide: an ``Amortized`` with networks.
        draws: the simulations.
        names: the sites.
    """
    if not isinstance(draws, Mapping) or (missing := [name for name in names if name not in draws]):
        got = type(draws).__name__ if not isinstance(draws, Mapping) else f"none of {missing}"
        raise ValueError(f"Expected simulations to be a dict with the sites {names}; got {got}.")
    observations = {name: draws[name] for name in guide.observed}
    found = {x.name: torch.as_tensor(draws[x.name]) for x in guide.latents}
    sizes = {name: tuple(unpadded(value)[0].shape) for name, value in {**found, **observations}.items()}
    counts = {shape[:1] for shape in sizes.values()}
    if len(counts) > 1 or counts & {(), (0,)}:
        raise ValueError(f"Expected simulations (N, ...) of the same number N >= 1 of draws; got shapes {sizes}.")
    for x in guide.latents:
        if found[x.name].dim() != 1 + len(x.shape):
            raise ValueError(
                f"Expected simulations[{x.name!r}] of shape (N, *{tuple(x.shape)}); got {tuple(found[x.name].shape)}."
            )
    observations = guide.checked(observations, finite=False)
    usable = {site.name: site.usable(observations[site.name]) for site in guide.sites()}
    usable |= {name: value.reshape(len(value), -1).isfinite().all(1) for name, value in found.items()}
    kept = kept_rows(usable)
    observations = {name: mapped(lambda t: t[kept.to(t.device)], value) for name, value in observations.items()}
    found = {name: value[kept.to(value.device)] for name, value in found.items()}
    rows = next((unpadded(observations[s.name])[0].shape[1] for s in guide.sites() if s.axis is not None), 1)
    packed = guide.packed(found, rows)
    return _inside(guide, packed, observations, rows)


def _inside(guide: Any, packed: Tensor, observations: dict[str, Any], rows: int) -> tuple[Tensor, dict[str, Any]]:
    """Returns the rows in the interior of the supports; draws on the boundary come from rounding, and have probability 0."""
    network = guide.made()
    inside = torch.ones(len(packed), dtype=torch.bool, device=packed.device)
    for group, part in zip(network.groups, network.split(packed, rows), strict=True):
        if group.real_size:
            ladj = group.to_real(part[..., group.d :])[1]
            inside &= ladj.reshape(len(packed), -1).isfinite().all(1)
    share = 1 - inside.double().mean().item()
    if share > 0.001:
        raise ValueError(
            f"Expected simulated latents inside their supports; got {share:.1%} outside or on the boundary. The support of a "
            "latent must not depend on others."
        )
    if inside.all():
        return packed, observations
    warnings.warn(
        f"{int((~inside).sum())} simulations with latents on the boundary of their supports are left out.", stacklevel=4
    )
    return packed[inside], {name: mapped(lambda t: t[inside], value) for name, value in observations.items()}
