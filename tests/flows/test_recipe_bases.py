"""Bases of the recipes of flows: learned ones, heavy tails, and those over less than the reals."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import flows, heads
from pyro_genexact.conditioners import MADE, Independent
from pyro_genexact.testing import redraw
from support.checks import close
from support.recipes import make
from support.values import F64, normal_log_prob

# Bases


def mixture_base(features, context=0):
    head = heads.Mixture(heads.Normal(), 3)
    net = MADE(features, head.num_params, context=context, hidden=(6,), activation=torch.tanh)
    return gx.Autoregressive(net, head, (features,))


def student_base(features, context=0):
    return gx.Autoregressive(Independent(features, 3, context=context, hidden=(6,)), heads.StudentT(), (features,))


BASES = {"mixture": mixture_base, "student": student_base}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["maf", "iaf", "nsf", "bnaf", "realnvp"])
@pytest.mark.parametrize("context", [0, 2])
def test_learned_bases(base, name, context):
    """log p(y) = log p_base(x(y)) + log|dx/dy|, with gradients to the base, onto a support too."""
    flow = make(name, 2, context=context, base=BASES[base](2, context), support=constraints.positive)
    c = torch.randn(4, 2, dtype=F64) if context else None
    d, y = flow(c) if context else flow(), torch.randn(4, 2, dtype=F64).exp()
    x = d.transforms[0].inv(y)
    base_dist = flow.base(c) if context else flow.base()
    plain = make(name, 2, context=context, support=constraints.positive)
    plain.transforms.load_state_dict(flow.transforms.state_dict())
    normal = plain(c) if context else plain()
    close(d.log_prob(y), base_dist.log_prob(x) + normal.log_prob(y) - normal_log_prob(x), 1e-9)
    grads = torch.autograd.grad(d.log_prob(y).sum(), [*flow.base.parameters()])
    assert all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
    draws = d.sample((50,))
    assert draws.shape == (50, *d.batch_shape, 2) and (draws > 0).all()
    assert d.has_rsample == (base == "student")
    if d.has_rsample:
        grads = torch.autograd.grad(d.rsample((5,)).log().sum(), [*flow.base.parameters()])
        assert all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)


def test_a_student_base_keeps_heavy_tails():
    """Far out log p falls as -(df + 1) log|y|, since the tails of affine flows and splines are straight."""
    for recipe in (flows.maf, flows.nsf):
        flow = redraw(recipe(1, base=student_base(1), hidden=(6,)).double())
        d = flow()
        df = heads.StudentT().double()(flow.base.conditioner(torch.zeros(1, 1, dtype=F64))).df.item()
        y = torch.tensor([[1e6], [1e7]], dtype=F64)
        fall = d.log_prob(y).diff() / math.log(10)
        assert fall.item() == pytest.approx(-(df + 1), rel=1e-3)


def test_a_mixture_base_fits_what_one_transform_can_not():
    """Two far clusters: a normal base under one affine transform stays unimodal (the MAF-MoG's own point)."""
    sign = torch.randint(2, (1500, 1)) * 2.0 - 1
    y = 0.3 * torch.randn(1500, 2) + sign * torch.tensor([2.0, -2.0])
    scores = {}
    for name, base in (("normal", None), ("mixture", mixture_base(2))):
        flow = flows.maf(2, base=base, transforms=1, hidden=(16,), activation=torch.tanh)
        gx.fit(flow, y[:1000], epochs=30, batch_size=100, lr=1e-2, progress=False)
        scores[name] = flow().log_prob(y[1000:]).mean().item()
    best = 2 * dist.Normal(0.0, 0.3).entropy().item() + math.log(2)
    assert scores["mixture"] > -best - 0.1
    assert scores["normal"] < scores["mixture"] - 0.3


# Errors


def test_bases_over_less_than_the_reals():
    for base, support in (
        (dist.Uniform(torch.zeros(3), torch.ones(3)).to_event(1), "Interval"),
        (dist.Exponential(torch.ones(3)).to_event(1), "GreaterThanEq"),
        (dist.Poisson(torch.ones(3)).to_event(1), "IntegerGreaterThan"),
    ):
        for recipe in (flows.maf, flows.realnvp, flows.bnaf):
            with pytest.raises(ValueError, match=rf"Expected base\.support to be all real vectors; got .*{support}"):
                recipe(3, base=base)
    flows.maf(3, base=dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))  # vectors as they are
    flows.maf(3, base=flows.maf(3)())
