"""A factory for every public class: built in float64, parameters re-drawn far from the identity. Every law runs on all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import pyro_genexact as gx
from support.registry import chains, conditioners, encoders, flows, heads, models, sequences, transforms
from support.registry.conditioners import CONDITIONERS, MUST_READ, READS, REAL_SITES
from support.registry.encoders import ENCODERS, JOINTS, SETS
from support.registry.heads import DISTRIBUTION_HEADS, HEADS, PAIRED
from support.registry.sequences import FILTERED
from support.registry.transforms import TRANSFORMS, TRIANGULAR

__all__ = [
    "CHAINS",
    "CONDITIONERS",
    "DISTRIBUTIONS",
    "DISTRIBUTION_HEADS",
    "ENCODERS",
    "FILTERED",
    "HEADS",
    "INERT",
    "JOINTS",
    "LARGE",
    "MODULES",
    "MUST_READ",
    "OUTSIDE",
    "PAIRED",
    "READS",
    "REAL_SITES",
    "SEQUENCES",
    "SETS",
    "SOLVED_BY_ZUKO",
    "TRANSFORMS",
    "TRIANGULAR",
    "UNLISTED",
    "move",
]

KINDS = (models, flows, chains, sequences)  # of distributions
MODULES = (conditioners, encoders, heads, transforms, *KINDS)
DISTRIBUTIONS = {name: make for kind in KINDS for name, make in kind.DISTRIBUTIONS.items()}
OUTSIDE = {name: values for kind in KINDS for name, values in kind.OUTSIDE.items()}
INERT = {name: weights for kind in (models, flows, chains) for name, weights in kind.INERT.items()}
SEQUENCES = list(sequences.DISTRIBUTIONS)
CHAINS = [name for name in DISTRIBUTIONS if "CRF" in name]
LARGE, SOLVED_BY_ZUKO = flows.LARGE, flows.SOLVED_BY_ZUKO
# supports that are infinite, or differ by row
UNLISTED = ("Autoregressive counts", "HiddenMarkov ragged", "LinearChainCRF ragged")


def move(value: Any, device: str) -> Any:
    """Modules, transforms and tensors of a factory on a device."""
    if isinstance(value, tuple):
        return tuple(move(part, device) for part in value)
    if isinstance(value, (nn.Module, Tensor)):
        return value.to(device)
    return value if value is None else gx.Constant(value).to(device)()
