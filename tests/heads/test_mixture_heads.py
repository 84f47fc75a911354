"""Heads of mixtures and of discretised logistics."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.base import Head
from pyro_genexact.core.binding import Bound
from pyro_genexact.families.discretized_logistic import DiscretizedLogistic
from pyro_genexact.families.in_support import contains
from pyro_genexact.families.mixture import Mixture
from pyro_genexact.heads import composite
from pyro_genexact.heads import mixture as heads
from pyro_genexact.testing.heads import distribution_head
from support.checks import goodness
from support.small_heads import Angle, Categorical, Gamma, Normal, Poisson, Shares, Vector
from support.values import F64, sized

HEADS = {
    "mixture of normals": lambda: heads.Mixture(Normal(), 3),
    "mixture of families": lambda: heads.Mixture([Normal(), Gamma(), Normal()]),
    "mixture of counts": lambda: heads.Mixture(Poisson(), 2),
    "mixture of angles": lambda: heads.Mixture(Angle(), 2),
    "mixture of vectors": lambda: heads.Mixture(Vector(), 2),
    "mixture of mixtures": lambda: heads.Mixture(heads.Mixture([Gamma(), Normal()]), 2),
    "logistic": lambda: heads.DiscretizedLogistic(8),
    "logistics": lambda: heads.DiscretizedLogistic(256, K=3),
    "per site": lambda: composite.PerSite([Normal(), Gamma(), Poisson(), heads.Mixture(Categorical(), 2)]),
    "per site, one head": lambda: composite.PerSite([Poisson()] * 4),
    "per site, vectors": lambda: composite.PerSite([Vector(), Shares(), Vector(), Vector()]),
    "flow": lambda: composite.ConditionalHead(gx.flows.maf(features=2, transforms=1, hidden=(8,), context=3)),
}


@pytest.mark.parametrize("name", HEADS)
def test_law_of_heads(name):
    torch.manual_seed(3)
    head = HEADS[name]().double()
    if name == "flow":
        gx.testing.redraw(head)
        phi = sized(8, 4, 3)
        d = head(phi)
        y = d.sample()
        alone = [head(phi[:, t : t + 1], t).log_prob(y[:, t : t + 1]) for t in range(4)]
        assert torch.allclose(torch.cat(alone, 1), d.log_prob(y), atol=1e-12)
        assert torch.allclose(d.log_prob(y), head.module(phi).log_prob(y))
        return
    distribution_head(head)


@pytest.mark.parametrize("name", HEADS)
def test_heads_in_copies_and_float32(name):
    torch.manual_seed(4)
    head = HEADS[name]().double()
    phi = sized(2, 4, head.num_params)
    y = head(phi).sample()
    lp = head(phi).log_prob(y)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), Bound(head).copy()):
        assert torch.equal(other(phi).log_prob(y), lp)
        assert contains(other.support, y).all()
    d = head(phi)
    if name != "flow":
        assert torch.equal(pickle.loads(pickle.dumps(d)).log_prob(y), lp)
    single = copy.deepcopy(head).float()(phi.float())
    assert single.log_prob(y.float()).dtype == torch.float32
    assert torch.allclose(single.log_prob(y.float()).double(), lp, rtol=1e-3, atol=1e-3)
    assert not any(key.endswith("offsets") for key in head.state_dict())


@pytest.mark.parametrize("far", [1e4, -1e4, 1e8, -1e8])
def test_every_value_at_extreme_parameters(far):
    for head, y in (
        (heads.DiscretizedLogistic(256, 3), torch.arange(256.0, dtype=F64)),
        (heads.DiscretizedLogistic(256), torch.arange(256.0, dtype=F64)),
        (heads.Mixture([Normal(), Gamma()]), torch.tensor([-1e8, -1.0, 1e-3, 1e8], dtype=F64)),
    ):
        for sign in (torch.ones(head.num_params, dtype=F64), sized(head.num_params, seed=6).sign()):
            phi = (far * sign).requires_grad_()
            lp = head.double()(phi.unsqueeze(0)).log_prob(y)
            (grad,) = torch.autograd.grad(lp.sum(), phi)
            assert lp.isfinite().all() and grad.isfinite().all()


def test_mixture_head_is_the_hand_sum_and_starts_apart():
    head, phi, y = heads.Mixture(Normal(), 4).double(), sized(5, 2, 12), sized(5, 2, seed=1)
    assert head.num_params == 4 + 4 * 2 and head.support is constraints.real
    parts = (phi[..., 4:].unflatten(-1, (4, 2)) + head.offsets).unbind(-2)
    terms = torch.stack([Normal()(p).log_prob(y) for p in parts], -1) + phi[..., :4].log_softmax(-1)
    assert torch.allclose(head(phi).log_prob(y), terms.logsumexp(-1), atol=1e-12)
    assert head.offsets[:, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert not torch.equal(head.offsets[:, 1].argsort(), head.offsets[:, 0].argsort())
    assert (heads.Mixture(Normal(), 1).offsets == 0).all()
    zero = torch.zeros(1, 12, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(head(zero).log_prob(torch.tensor([0.3], dtype=F64)).sum(), zero)
    assert grad[0, 4::2].unique().numel() == 4
    several = heads.Mixture([Normal(), Gamma()])
    assert several.num_params == 2 + 4 and several.offsets is None


def test_mixture_head_calls_its_head_once():
    calls = []

    class Counting(Normal):
        def forward(self, phi, first=0):
            calls.append((phi.shape, first))
            return super().forward(phi, first)

    head = heads.Mixture(Counting(), 7)
    calls.clear()
    head(torch.zeros(3, 5, 21), 2)
    assert calls == [((7, 3, 5, 2), 2)]


@pytest.mark.parametrize("K", [2, 3, 255, 600, 3000])
def test_no_two_components_start_alike(K):
    offsets = heads.Mixture(Normal(), K).offsets
    assert offsets.dtype == torch.float32 and offsets.abs().max() <= 1
    assert all(column.unique().numel() == K for column in offsets.T)


class Trend(Head):
    """Which depends on where the site is."""

    num_params = 1

    def forward(self, phi, first=0):
        step = torch.arange(first, first + phi.shape[-2], dtype=phi.dtype)
        return dist.Normal(phi.squeeze(-1) + step, 1.0, validate_args=False)


@pytest.mark.parametrize("arguments", [(Trend(), 2), ([Trend(), Normal()],)])
def test_mixture_head_tells_its_heads_where_they_are(arguments):
    head, y = heads.Mixture(*arguments).double(), sized(3, 6, seed=1)
    phi = sized(3, 6, head.num_params)
    torch.testing.assert_close(head(phi[:, 2:], 2).log_prob(y[:, 2:]), head(phi).log_prob(y)[:, 2:])
    assert not torch.allclose(head(phi[:, 2:]).log_prob(y[:, 2:]), head(phi).log_prob(y)[:, 2:])


def test_a_family_whose_support_is_wider_than_its_mass():
    head = heads.Mixture([Angle(), Normal()])
    x = np.linspace(-30, 30, 200_001)
    phi = torch.tensor([[0.4, 0.1, 2.0, 1.0, 0.5, 0.3]], dtype=F64)
    mass = np.trapezoid(head(phi).log_prob(torch.as_tensor(x).unsqueeze(-1)).exp().squeeze(), x)
    assert abs(mass - 1) < 1e-4  # a jump at ±pi
    stacked, outside = heads.Mixture(Angle(), 2).double(), torch.tensor([3.2], dtype=F64)
    assert (stacked(phi).log_prob(outside) == -torch.inf).all() and stacked(phi).log_prob(outside - 1).isfinite().all()


def test_mixture_of_logistics_is_a_mixture_and_has_mass_one():
    head = heads.DiscretizedLogistic(16, 4).double()
    assert head.num_params == 12 and heads.DiscretizedLogistic(16).num_params == 2
    d = head(2 * sized(50, 12))
    assert isinstance(d, Mixture) and isinstance(d.components, DiscretizedLogistic)
    assert (d.log_prob(d.enumerate_support()).exp().sum(0) - 1).abs().max() < 1e-10
    torch.manual_seed(5)
    y = d.sample((2000,))
    p = d.log_prob(d.enumerate_support()).exp()
    assert min(goodness(y[:, i], p[:, i]) for i in range(10)) > 1e-4
    start = heads.DiscretizedLogistic(256)(torch.zeros(1, 2, dtype=F64))
    assert 0.01 < start.log_prob(torch.tensor(0.0)).exp() < 0.1


def test_mass_of_a_mixture_of_counts():
    counts = torch.arange(200, dtype=F64).unsqueeze(-1)
    d = heads.Mixture(Poisson(), 2).double()(sized(6, 4))
    assert (d.log_prob(counts).exp().sum(0) - 1).abs().max() < 1e-10


def test_an_enumerated_site_of_pyro():
    head, phi, x = heads.DiscretizedLogistic(5, 2).double(), sized(4, 6), sized(4, seed=1)
    on = torch.tensor([True, True, False, True])

    def model():
        with pyro.plate("rows", 4), pyro.poutine.mask(mask=on):
            z = pyro.sample("z", head(phi), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    d = head(phi)
    z = d.enumerate_support()
    truth = (d.log_prob(z) + dist.Normal(z, 1.0).log_prob(x)).logsumexp(0)[on].sum()
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    assert abs(loss + truth.item()) < 1e-9


def test_errors_of_mixture_heads():
    for match, arguments in (
        ("Expected K with one head", (Normal(),)),
        ("no K with a list", ([Normal(), Gamma()], 2)),
        ("K to be an integer >= 1; got 0", (Normal(), 0)),
        (r"equal site_shape; got \(\) and \(2,\)", ([Normal(), Vector()],)),
        ("all discrete or all continuous", ([Normal(), Poisson()],)),
        ("at least one head; got none", ([],)),
    ):
        with pytest.raises(ValueError, match=match):
            heads.Mixture(*arguments)
    with pytest.raises(TypeError, match="class Head; got Linear"):
        heads.Mixture([nn.Linear(1, 1)])
    for bad in (5, nn.Linear(1, 1), None):
        with pytest.raises(TypeError, match=f"head to be a sequence of heads; got {type(bad).__name__}"):
            heads.Mixture(bad)
    for arguments in ((gx.heads.Affine(), 2), ([Normal(), gx.heads.Affine()],)):
        with pytest.raises(TypeError, match="Expected a head of distributions; got Affine, which returns Affine"):
            heads.Mixture(*arguments)
    assert heads.Mixture(nn.ModuleList([Normal(), Gamma()])).num_params == 6
    for arguments in ((1,), (4, 0)):
        with pytest.raises(ValueError, match="an integer >="):
            heads.DiscretizedLogistic(*arguments)
