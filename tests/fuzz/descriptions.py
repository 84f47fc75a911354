"""Descriptions of small models of every kind, and the models that they describe.

A description is code of a model and its head, what its call is given, a dtype and a seed; its repr makes it again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import conditioners, flows, heads


@dataclass(frozen=True)
class Case:
    """A model, what its call is given, and what is asked of it.

    Attributes:
        kind: which family of cases it belongs to, a key of ``KINDS``.
        model: code of a module; ``head`` and its number of parameters ``P`` are in scope.
        head: code of that head.
        context: shape of the context, () for none.
        lengths, source_lengths, prefix_lengths: nested lists of integers, or None.
        prefix: of how many sites.
        order: in which an autoregressive model visits its sites; it is part of ``model`` already.
        integers: dtype of the lengths.
        dtype: of the parameters.
        seed: of parameters and values.
    """

    kind: str
    model: str
    head: str = "None"
    context: tuple[int, ...] = ()
    lengths: Any = None
    source_lengths: Any = None
    prefix: int = 0
    prefix_lengths: Any = None
    order: list[int] | None = None
    integers: str = "int64"
    dtype: str = "float64"
    seed: int = 0

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Case({', '.join(f'{name}={value!r}' for name, value in given.items())})"


class Labels(gx.DistributionModule):
    """A linear-chain CRF with random potentials."""

    def __init__(self, batch, sites, labels, steps=None, initial=False, final=False):
        super().__init__()
        self.unary = nn.Parameter(torch.zeros(*batch, sites, labels))
        self.transition = nn.Parameter(torch.zeros(*(steps or ()), labels, labels))
        self.initial = nn.Parameter(torch.zeros(labels)) if initial else None
        self.final = nn.Parameter(torch.zeros(*batch, labels)) if final else None

    def forward(self, context=None, lengths=None):
        ends = {"initial": self.initial, "final": self.final}
        return gx.LinearChainCRF(self.unary, self.transition, **ends, lengths=lengths)


class States(gx.DistributionModule):
    """A hidden Markov model with random logits, whose observations the head makes of random numbers."""

    def __init__(self, batch, sites, states, head, steps=None):
        super().__init__()
        self.sites, self.head = sites, head
        self.initial = nn.Parameter(torch.zeros(*batch, states))
        self.transition = nn.Parameter(torch.zeros(*(steps or ()), states, states))
        self.phi = nn.Parameter(torch.zeros(*batch, sites if steps else 1, states, head.num_params))

    def forward(self, context=None, lengths=None):
        return gx.HiddenMarkov(self.initial, self.transition, self.head(self.phi), lengths, duration=self.sites)


MODELS = (
    gx.Autoregressive,
    gx.Sequence,
    gx.Conditional,
    gx.OrderEnsemble,
    gx.CRF,
    gx.Covariates,
    gx.Source,
    Labels,
    States,
)
NAMES = {
    **{name: getattr(module, name) for module in (conditioners, heads) for name in module.__all__},
    **{part.__name__: part for part in MODELS},
    **{name: getattr(flows, name) for name in flows.__all__},
    **{"flows": flows, "partial": partial, "dist": dist, "constraints": constraints, "torch": torch, "nn": nn},
}


def build(case: Case, redrawn: bool = True) -> Any:
    """The module, with parameters by the case's seed, or as the constructor leaves them."""
    torch.manual_seed(case.seed + redrawn)
    head = eval(case.head, NAMES)
    module = eval(case.model, {**NAMES, "head": head, "P": getattr(head, "num_params", None)}).double().eval()
    spread = 0.6 if case.kind == "flow" else 1.2
    with torch.no_grad():
        for p in module.parameters() if redrawn else ():
            p.normal_().mul_(0.3 if p.dim() < 2 else spread / prod(p.shape[1:]) ** 0.5)
    return module.to(getattr(torch, case.dtype))
