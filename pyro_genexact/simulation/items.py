"""Simulations of a model as rows: one item of an observed site and the values of its inputs per row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Size, Tensor

from .simulations import Draws, is_deterministic

SUBSET = 2000  # simulations for the checks
LARGEST_Z = 6.0  # of the comparisons between rows; chance exceeds it with probability 2e-9
TIES = 0.05  # the largest share of one value in a site with a density


@dataclass(frozen=True)
class Layout:
    """How the value of a site in one run of a model divides into rows and items.

    Attributes:
        name: the name of the site.
        rows: the shape of the dims of the plates of the observed site.
        item: the shape of one item.
        gap: the number of dims of size 1 between both.
    """

    name: str
    rows: Size
    item: Size
    gap: int

    @classmethod
    def of(cls, site: Any, plates: Mapping[str, int]) -> Layout:
        """Returns the layout of a site; ``plates`` are the dims of the plates of the observed site by name."""
        shape, name = site["value"].shape, site["name"]
        batch = shape[: len(shape) - event_dim(site)]
        mine = {f.dim for f in site["cond_indep_stack"] if f.name in plates}
        if not mine:
            return cls(name, Size(), shape, 0)
        right = -1 - max(plates.values())  # the number of dims to the right of the plates
        outer, inner = batch[: len(batch) - right], batch[len(batch) - right :]
        if any(n > 1 and i - len(batch) not in mine for i, n in enumerate(outer)):
            raise ValueError(
                f"Expected dims of {name!r} to the left of the plates {list(plates)} to belong to these plates; got shape "
                f"{tuple(shape)}. Declare them as event dims."
            )
        item = shape[len(batch) :]
        return cls(name, outer, item, right) if prod(inner) == 1 else cls(name, outer, Size((*inner, *item)), 0)

    def items(self, value: Tensor, rows: Size | None = None) -> Tensor:
        """Returns N draws (N, *rows, *gap, *item) as (N, *rows, *item), expanded to the rows of the observed site."""
        events = len(self.item)
        own = value.shape[1 : value.dim() - events - self.gap]
        item = value.shape[value.dim() - events :]
        if len(own) != len(self.rows) or item != self.item or not len(value):
            raise ValueError(
                f"Expected simulations of {self.name!r} of shape (N, *{(*self.rows, *[1] * self.gap, *self.item)}), N >= 1; got "
                f"{tuple(value.shape)}."
            )
        rows = own if rows is None else rows
        value = value.reshape(len(value), *[1] * (len(rows) - len(own)), *own, *item)
        return value.expand(len(value), *rows, *item)


def event_dim(site: Any) -> int:
    """Returns the number of event dims; ``pyro.deterministic`` counts the dims of plates among them by default."""
    dims, shape = site["fn"].event_dim, site["value"].shape
    plates = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    depth = -min(plates, default=0)
    if is_deterministic(site) and dims == len(shape) and depth <= len(shape):
        batch = shape[:depth]
        if all(batch[d] == n for d, n in plates.items()):
            return len(shape) - depth
    return int(dims)


def plates_of(site: Any) -> dict[str, int]:
    """Returns the dims of the vectorised plates of a site by name.

    Raises:
        ValueError: if the site is in another plate, or in one with subsampling.
    """
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized or frame.full_size not in (None, frame.size):
            raise ValueError(
                f"Expected observed site in vectorised plates without subsampling; got {site['name']!r} in {frame.name!r}."
            )
    return {f.name: f.dim for f in site["cond_indep_stack"]}


def tables(nodes: Any, names: Sequence[str], observed: str, simulations: Any) -> tuple[Tensor, Draws, bool]:
    """Returns the observed values and the inputs by name, (N, R, *item), and whether all rows of a simulation share the inputs.

    Args:
        nodes: the sites of one run.
        names: the inputs.
        observed: the observed site.
        simulations: draws (N, ...) by name.
    """
    plates = plates_of(nodes[observed])
    layouts = {name: Layout.of(nodes[name], plates) for name in (observed, *names)}
    found = {name: torch.as_tensor(simulations[name]) for name in layouts}
    if len({len(value) if value.dim() else 0 for value in found.values()}) > 1:
        raise ValueError(
            f"Expected simulations (N, ...) of the same number of draws; got shapes { {n: tuple(v.shape) for n, v in found.items()} }."
        )
    y = layouts[observed].items(found[observed])
    rows = y.shape[1 : y.dim() - len(layouts[observed].item)]
    shared = all(prod(layouts[name].rows) == 1 for name in names)

    def flat(name: str) -> Tensor:
        value = layouts[name].items(found[name], rows)
        return value.reshape(len(value), -1, *layouts[name].item)

    return flat(observed), {name: flat(name) for name in names}, shared


def finite(values: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns which rows (N, R) have no NaN or infinity, given values (N, R, ...); warns if there are others."""
    kept = torch.stack([value.reshape(*value.shape[:2], -1).isfinite().all(-1) for value in values.values()]).all(0)
    if not kept.any():
        raise ValueError(f"Expected some simulations without NaN or infinity; got none in {list(values)}.")
    if missing := int((~kept).sum()):
        warnings.warn(
            f"{missing} of {kept.numel()} simulated values of {name!r} with NaN or infinity are left out. The likelihood is then "
            "that given success. If the probability of success depends on the latents, it is a factor of the likelihood: record "
            "success as a Boolean site of the model, learn its likelihood too, and observe it.",
            stacklevel=4,
        )
    return kept


def check_density(y: Tensor, name: str, places: Sequence[int]) -> None:
    """Raises a ValueError if an entry of a continuous site (N, *item) has one value in many rows."""
    flat = y[: 10 * SUBSET].reshape(min(len(y), 10 * SUBSET), -1)
    for i in places:
        values, counts = flat[:, i].unique(return_counts=True)
        share = counts.max().item() / len(flat)
        if share > TIES and len(flat) >= 2 / TIES:
            raise ValueError(
                f"Expected {name!r} with a density; got the value {values[counts.argmax()].item():.6g} in {share:.0%} of the "
                f"simulations (entry {i}). Pass support= for discrete values, and leave out constants."
            )


def check_alike(y: Tensor, z: Tensor, name: str) -> None:
    """Raises a ValueError if rows of a plate are not identically distributed given the inputs.

    It compares means of the items and of their squares, alone and weighted by the inputs, between rows.

    Args:
        y: items (N, R, D).
        z: inputs (N, F) that all rows share.
        name: the name of the site.
    """
    y, z = y[:SUBSET, :100].double(), z[:SUBSET].double().tanh()
    if len(y) < SUBSET // 10:
        return
    y = ((y - y.flatten(0, 1).median(0).values) / (y.flatten(0, 1).std(0) + 1e-300)).tanh()
    y = torch.cat([y, y.square()], -1)
    rest = y - y.mean(1, keepdim=True)
    z = torch.cat([z, z.new_ones(len(z), 1)], -1)
    mean = torch.einsum("nrd,nf->rdf", rest, z) / len(y)
    sd = (torch.einsum("nrd,nf->rdf", rest.square(), z.square()) / len(y)).sqrt()
    worst = (mean.abs() / (sd + 1e-12)).max().item() * len(y) ** 0.5
    if worst > LARGEST_Z:
        raise ValueError(
            f"Expected identically distributed rows of {name!r} in its plates, given the inputs; got rows that differ by "
            f"{worst:.1f} standard errors. Make covariates of the rows sites of the model and name them in given, or declare the "
            "dims of the plate as event dims."
        )
