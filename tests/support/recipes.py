"""Every recipe of flows in a small size, and the mass of a density on an axis."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import flows, heads
from pyro_genexact.conditioners.encoding import Dense
from pyro_genexact.testing import redraw
from support.values import normal_log_prob

RECIPES = {
    "maf": flows.maf,
    "iaf": flows.iaf,
    "nsf": partial(flows.nsf, bins=3),
    "naf": partial(flows.naf, units=4),
    "naf deep": partial(flows.naf, units=3, layers=2),
    "umnn": partial(flows.umnn, signal=3, network=(6,)),
    "sospf": partial(flows.sospf, polynomials=2, degree=2),
    "bpf": partial(flows.bpf, degree=6),
    "bnaf": partial(flows.bnaf, hidden=(4,)),
    "realnvp": flows.realnvp,
    "nice": flows.nice,
    "glow_vector": flows.glow_vector,
    "coupling_nsf": partial(flows.coupling_nsf, bins=3),
    "autoregressive": partial(flows.autoregressive, partial(heads.MonotoneNetwork, 3, hidden=(6,))),
    "coupling": partial(flows.coupling, partial(heads.LogisticMixtureCDF, 3)),
}
COUPLINGS = ("realnvp", "nice", "glow_vector", "coupling_nsf", "coupling")
BOTH = [(name, inverse) for name in RECIPES if name != "iaf" for inverse in (False, True)]
maf_and_iaf = pytest.mark.parametrize("recipe", [flows.maf, flows.iaf])
recipes = pytest.mark.parametrize("name", RECIPES)
both = pytest.mark.parametrize("name, inverse", BOTH)
couplings = pytest.mark.parametrize("name", COUPLINGS)


def make(name, features, context=0, spread=0.5, **options):
    """A small smooth flow in float64, far from the identity but without spikes."""
    options = {"transforms": 2, **({} if name == "bnaf" else {"hidden": (6,), "activation": torch.tanh}), **options}
    flow = redraw(RECIPES[name](features, context, **options).double(), spread=spread)
    with torch.no_grad():
        for part in flow.modules():
            if isinstance(part, Dense) and not isinstance(part, gx.Conditioner):
                for p in part.last.parameters():
                    p.mul_(0.6 * spread)
    return flow


def by_jacobian(d, y):
    """log N(x(y)) + log|det dx/dy| of rows y (N, D), by autograd."""
    chain = d.transforms[0]
    jacobian = torch.stack([torch.autograd.functional.jacobian(chain.inv, row) for row in y])
    return normal_log_prob(chain.inv(y)) + torch.linalg.slogdet(jacobian)[1]


def masses(density, ends, order=10, tol=1e-10, levels=40):
    """The integrals between neighbouring ends: Gauss-Legendre, halved where that matters."""
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(order))
    middles, halves = (ends[1:] + ends[:-1]) / 2, ends.diff() / 2
    total, piece = torch.zeros_like(middles), torch.arange(len(middles))

    def integrals(middles, halves):
        return halves * (density(middles.unsqueeze(-1) + halves.unsqueeze(-1) * nodes) * weights).sum(-1)

    coarse = integrals(middles, halves)
    for _ in range(levels):
        halves = halves / 2
        middles = torch.stack([middles - halves, middles + halves], -1)
        fine = integrals(middles, halves.unsqueeze(-1).expand_as(middles))
        rough = (fine.sum(-1) - coarse).abs() > tol
        total.index_add_(0, piece[~rough], fine[~rough].sum(-1))
        coarse, middles, halves, piece = (
            t.flatten() for t in (fine[rough], middles[rough], *(v[rough, None].expand(-1, 2) for v in (halves, piece)))
        )
        if not len(piece):
            break
    return total.index_add(0, piece, coarse)
