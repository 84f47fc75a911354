"""Guides of global beside local latents, by flows, against exact evidence."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    Predictive,
    Trace_ELBO,
)
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule

import pyro_genexact as gx
from support.pyro_models import vectorised
from support.values import sized

DOUBLE = {"dtype": torch.float64}
# --- a flow of global latents beside amortised local ones

COUNT, B, SD = 12, torch.tensor([[1.0, 0.0], [0.7, 0.7], [-0.5, 1.0]], **DOUBLE), 1.5
DATA = 1.5 * sized(1, 2, seed=21) @ B.T + sized(COUNT, 2, seed=22) @ B.T + SD * sized(COUNT, 3, seed=23)
EYE = torch.eye(2, **DOUBLE)


def factors(y, size=None):
    """w ~ N(0, I), z_n ~ N(w, I), y_n ~ N(B z_n, SD^2 I)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, **DOUBLE), 1.0).to_event(1))
    with pyro.plate("data", len(y), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(w, 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ B.T, SD).to_event(1), obs=y[i])


def evidence_of_factors():
    one = B @ B.T + SD**2 * torch.eye(3, **DOUBLE)
    cov = torch.block_diag(*[one] * COUNT) + (B @ B.T).repeat(COUNT, COUNT)
    return dist.MultivariateNormal(torch.zeros(3 * COUNT, **DOUBLE), cov).log_prob(DATA.flatten()).item()


def posterior_of_w():
    one = torch.linalg.inv(B @ B.T + SD**2 * torch.eye(3, **DOUBLE))
    cov = torch.linalg.inv(EYE + COUNT * B.T @ one @ B)
    return cov @ B.T @ one @ DATA.sum(0), cov


def cost_of_independence():
    """What the best q(w) prod_n q(z_n) lacks: that of blocks of a Gaussian with precision J."""
    local = EYE + B.T @ B / SD**2
    one = EYE * (1 + COUNT) - COUNT * torch.linalg.inv(local)  # the precision of w, z summed out
    return 0.5 * (torch.logdet(EYE * (1 + COUNT)) - torch.logdet(one)).item()


class Guide(PyroModule):
    """w by a flow, z_n by a flow given y_n and w."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.local = gx.flows.iaf(2, context=5, transforms=1, hidden=()).double()

    def forward(self, y, size=None):
        w = (
            self.shared(y, size)["w"]
            if isinstance(self.shared, gx.guides.AutoFlow)
            else pyro.sample("w", self.shared())
        )
        with pyro.plate("data", len(y), subsample_size=size) as i:
            rows = torch.broadcast_shapes(w.shape[:-1], (len(i),))
            pyro.sample("z", self.local(torch.cat([y[i].expand(*rows, 3), w.expand(*rows, 2)], -1)))


def shared_flow(kind):
    if kind == "auto":
        options = {"hidden": (8,), "transforms": 1, "init_scale": 0.5}
        return gx.guides.AutoFlow(poutine.block(factors, expose=["w"]), **options)
    return gx.flows.iaf(2, transforms=2, hidden=(8,)).double()


@pytest.mark.parametrize("kind, size", [("auto", None), ("auto", 6), ("flow", None)])
def test_global_flow_beside_local_flows(kind, size):
    guide = Guide(shared_flow(kind))
    steps = 150 if size is None else 400  # rows add noise
    gx.fit_guide(factors, guide, DATA, size, steps=steps, lr=0.05, num_particles=16, progress=False)
    evidence = evidence_of_factors()
    with torch.no_grad():
        many = vectorised(Trace_ELBO, 2000)
        found = -many.loss(factors, guide, DATA)
        w = Predictive(factors, guide=guide, num_samples=4000, parallel=True)(DATA)["w"].reshape(-1, 2)
    near = 0.1 if size is None else 0.3
    assert evidence - near < found < evidence + 0.03
    assert found > evidence - cost_of_independence() + 0.3
    mean, cov = posterior_of_w()
    assert ((w.mean(0) - mean).abs() < 0.2 * cov.diagonal().sqrt()).all()
    assert (w.std(0) / cov.diagonal().sqrt() - 1).abs().max() < 0.15


def test_auto_guide_list_with_a_flow():
    """Its parts know nothing of each other: the best that they reach is the product's. They share the list's plates."""
    local = gx.flows.iaf(2, context=3, transforms=1, hidden=()).double()

    def rows(y, size=None):
        pyro.module("local", local)
        with guide.plates["data"] as i:
            return {"z": pyro.sample("z", local(y[i]))}

    guide = AutoGuideList(factors, create_plates=lambda y, size=None: pyro.plate("data", len(y), subsample_size=size))
    guide.append(shared_flow("auto"))
    guide.append(rows)
    gx.fit_guide(factors, guide, DATA, steps=150, lr=0.05, num_particles=16, progress=False)
    with torch.no_grad():
        found = -vectorised(Trace_ELBO, 2000).loss(factors, guide, DATA)
        half = torch.tensor([Trace_ELBO().loss(factors, guide, DATA, 6) for _ in range(100)])
    best = evidence_of_factors() - cost_of_independence()
    assert best - 0.15 < found < best + 0.05
    assert abs(half.mean() + found) < 5 * half.std() / 100**0.5
    assert set(guide.median()) == {"w"}
