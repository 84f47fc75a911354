"""Mixtures of distributions: densities, supports, samples, cdfs."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import MixtureSameFamily, constraints

import pyro_genexact as gx
from pyro_genexact.families.cdf import cdf
from pyro_genexact.families.discretized_logistic import DiscretizedLogistic
from pyro_genexact.families.in_support import contains, feasible_point, log_prob_everywhere
from pyro_genexact.families.mixture import Mixture, UnionConstraint, same_constraint, union
from pyro_genexact.families.per_site import PerSite
from support.values import F64, sized


def test_mixture_equals_torchs_and_a_hand_sum():
    logits, loc, scale = sized(5, 3), sized(3, 5, seed=1), sized(3, 5, seed=2).exp()
    y = sized(7, 5, seed=3)
    stacked = Mixture(logits, dist.Normal(loc, scale))
    listed = Mixture(logits, [dist.Normal(m, s) for m, s in zip(loc, scale, strict=True)])
    other = MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc.T, scale.T))
    hand = (logits.softmax(-1).T * dist.Normal(loc, scale).log_prob(y.unsqueeze(1)).exp()).sum(1).log()
    for d in (stacked, listed):
        assert d.batch_shape == (5,) and d.event_shape == ()
        assert torch.allclose(d.log_prob(y), hand, atol=1e-12)
        assert torch.allclose(d.log_prob(y), other.log_prob(y), atol=1e-12)
        assert torch.allclose(d.log_prob(y[0, 0]), other.log_prob(y[0, 0].expand(5)), atol=1e-12)
        one = Mixture(logits[0], d.components.expand((3, 5)) if d is stacked else d.components)
        assert one.batch_shape == (5,) and one.sample().shape == (5,)
        assert torch.allclose(d.cdf(y), other.cdf(y), atol=1e-12)
        assert torch.allclose(d.mean, other.mean, atol=1e-12)
        assert torch.allclose(d.variance, other.variance, atol=1e-12)
        assert d.support is constraints.real and not d.has_rsample


@pytest.mark.parametrize("stacked", [True, False])
def test_mixture_without_batch(stacked):
    parts = dist.Normal(sized(3), 1.0) if stacked else [dist.Normal(m, 1.0) for m in sized(3)]
    d, y = Mixture(sized(3, seed=1), parts), torch.tensor(0.4, dtype=F64)
    truth = (torch.softmax(d.logits, 0) * dist.Normal(sized(3), 1.0).log_prob(y).exp()).sum().log()
    assert torch.allclose(d.log_prob(y), truth, atol=1e-13) and d.log_prob(y).shape == d.sample().shape == ()
    assert d.sample((4,)).shape == (4,) and d.expand((2,)).log_prob(y).shape == (2,)


def test_mixture_gradient_is_that_of_the_plain_formula():
    inputs = [sized(4, 3), sized(3, 4, seed=1), sized(3, 4, seed=2), sized(4, seed=3)]
    ours, plain = ([v.clone().requires_grad_() for v in inputs] for _ in range(2))
    a = Mixture(ours[0], dist.Normal(ours[1], ours[2].exp())).log_prob(ours[3])
    w, m, s, y = plain
    density = torch.exp(-0.5 * ((y - m) / s.exp()) ** 2 - s) / (2 * torch.pi) ** 0.5
    b = (w.softmax(-1) * density.T).sum(-1).log()
    for g, h in zip(torch.autograd.grad(a.sum(), ours), torch.autograd.grad(b.sum(), plain), strict=True):
        assert torch.allclose(g, h, atol=1e-11)


def mixed(logits=None):
    logits = torch.tensor([0.3, -0.2], dtype=F64) if logits is None else logits
    one = torch.ones((), dtype=F64)
    return Mixture(logits, [dist.Normal(0.5 * one, one), dist.Gamma(2 * one, 1.5 * one)], validate_args=False)


def test_mixed_supports_outside_of_one():
    logits = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    d = mixed(logits)
    w = torch.softmax(logits.detach(), -1).numpy()
    y = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    normal, gamma = scipy.stats.norm(0.5, 1), scipy.stats.gamma(2, scale=1 / 1.5)
    truth = np.log(w[0] * normal.pdf(y) + w[1] * gamma.pdf(y))
    assert np.allclose(d.log_prob(y).detach(), truth, atol=1e-12)
    assert np.allclose(d.cdf(y).detach(), w[0] * normal.cdf(y) + w[1] * gamma.cdf(y), atol=1e-12)
    (grad,) = torch.autograd.grad(d.log_prob(y[0]), logits)
    assert np.allclose(grad, np.array([1.0, 0.0]) - w, atol=1e-12)
    x = np.linspace(-8, 30, 400_001)
    assert abs(np.trapezoid(d.log_prob(torch.as_tensor(x)).exp().detach(), x) - 1) < 1e-6
    assert d.support is constraints.real


def test_outside_every_support_is_impossible_with_gradient_zero():
    raw = sized(3, seed=4).requires_grad_()
    d = Mixture(raw, [dist.Gamma(raw[0].exp(), 1.0), dist.LogNormal(raw[1], 1.0), dist.Exponential(raw[2].exp())])
    for y in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="support"):
            d.log_prob(torch.tensor(-1.0, dtype=F64))
        free = Mixture(d.logits, d.components, validate_args=False)
        lp = free.log_prob(torch.tensor([y, 1.0], dtype=F64))
        assert lp[0] == -torch.inf and lp[1].isfinite()
        (grad,) = torch.autograd.grad(lp[0], raw, retain_graph=True)
        assert (grad == 0).all()


def test_union_of_supports():
    low, high = constraints.less_than(0.0), constraints.interval(1.0, 2.0)
    c = union([low, high, constraints.less_than(0.0)])
    assert isinstance(c, UnionConstraint) and len(c.parts) == 2 and not c.is_discrete
    y = torch.tensor([-1.0, 0.5, 1.5, 3.0, float("nan")], dtype=F64)
    assert c.check(y).tolist() == [True, False, True, False, False]
    assert contains(c, feasible_point(c, y)).all()
    assert union([constraints.positive, constraints.real]) is constraints.real
    assert union([constraints.simplex, constraints.simplex]) is constraints.simplex
    assert same_constraint(constraints.interval(0.0, torch.ones(2)), constraints.interval(0.0, torch.ones(2)))
    assert not same_constraint(constraints.interval(0.0, torch.ones(2)), constraints.interval(0.0, torch.zeros(2)))
    halves = dist.Uniform(torch.tensor([[0.0], [2.0]], dtype=F64), torch.tensor([[1.0], [3.0]], dtype=F64))
    d = Mixture(torch.zeros(1, 2, dtype=F64), halves)
    assert d.support.check(torch.tensor([[0.5], [1.5], [2.5]])).flatten().tolist() == [True, False, True]
    assert torch.allclose(d.log_prob(torch.tensor([[0.5], [2.5]], dtype=F64)).exp(), torch.tensor(0.5, dtype=F64))
    same = dist.Binomial(5, logits=sized(2, 4))
    assert type(Mixture(torch.zeros(4, 2, dtype=F64), same).support) is type(constraints.integer_interval(0, 5))


def test_guarded_cdf_beyond_the_ends():
    y = torch.tensor([-2.0, 0.0, 0.5, 1.0, 7.0, float("nan")], dtype=F64)
    got = cdf(dist.Uniform(torch.zeros((), dtype=F64), 1.0, validate_args=False), y)
    assert got[:-1].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0] and got[-1].isnan()
    d = dist.Geometric(torch.tensor(0.25, dtype=F64))
    logistic = DiscretizedLogistic(torch.tensor(0.1, dtype=F64), torch.tensor(0.4, dtype=F64), 4, validate_args=False)
    levels = torch.tensor([-0.5, 0.0, 1.7, 3.0, 99.0], dtype=F64)
    sums = logistic.log_prob(logistic.enumerate_support()).exp().cumsum(0)
    truth = torch.stack([torch.zeros((), dtype=F64), sums[0], sums[1], sums[3], sums[3]])
    assert torch.allclose(cdf(logistic, levels), truth, atol=1e-12)
    assert d.support.is_discrete


@pytest.mark.parametrize("stacked", [True, False])
def test_samples_of_mixtures(stacked):
    torch.manual_seed(0)
    logits, loc, scale = sized(2, 3), 2 * sized(3, 2, seed=1), sized(3, 2, seed=2).exp()
    parts = dist.Normal(loc, scale)
    d = Mixture(logits, parts if stacked else [dist.Normal(m, s) for m, s in zip(loc, scale, strict=True)])
    y = d.expand((3, 2)).sample((4000,))
    assert y.shape == (4000, 3, 2)
    assert np.corrcoef(y[:, :, 0].T)[np.triu_indices(3, 1)].max() < 0.05
    for i in range(2):
        u = d.cdf(y)[..., i].flatten().numpy()
        assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3


def test_expand_adds_and_widens_dims():
    for d in (
        Mixture(sized(1, 3), dist.Normal(sized(3, 1, seed=1), 1.0)),
        Mixture(sized(1, 3), [dist.Normal(sized(1, seed=k), 1.0) for k in range(3)]),
    ):
        y, before = sized(2, 4, 5, seed=2), d.batch_shape
        for shape in ((4, 5), [4, 5], torch.Size((4, 5))):
            e = d.expand(shape)
            assert e.batch_shape == (4, 5) and d.batch_shape == before and e.sample((2,)).shape == (2, 4, 5)
            assert torch.allclose(e.log_prob(y), d.log_prob(y), atol=1e-13)
            assert e.mean.shape == (4, 5) and torch.allclose(e.variance, d.variance.expand(4, 5))
            assert e.sample().unique().numel() == 20
        assert d.expand((4, 5)).expand((2, 4, 5)).log_prob(y).shape == (2, 4, 5)
    wide = Mixture(sized(4, 5, 3), dist.Normal(sized(3, 5, seed=1), 1.0))
    assert wide.sample().shape == (4, 5) == wide.log_prob(torch.zeros((), dtype=F64)).shape


def test_vector_components_and_whole_chains():
    torch.manual_seed(1)
    made = lambda: gx.flows.maf(features=2, transforms=1, hidden=(8,)).double()  # noqa: E731
    for components, batch in (
        ([dist.Normal(sized(4, 2), 1.0).to_event(1), dist.Dirichlet(sized(4, 2, seed=1).exp())], (4,)),
        (dist.MultivariateNormal(sized(2, 4, 2), torch.eye(2, dtype=F64)), (4,)),
        ([made()(), made()()], ()),
    ):
        d = Mixture(sized(*batch, 2), components, validate_args=False)
        y = d.sample((3,))
        assert y.shape == (3, *batch, 2) and d.event_shape == (2,)
        parts = (
            components
            if isinstance(components, list)
            else [dist.MultivariateNormal(m, torch.eye(2, dtype=F64)) for m in components.loc]
        )
        supports = [p.support for p in parts]
        terms = torch.stack([log_prob_everywhere(p, y, s) for p, s in zip(parts, supports, strict=True)], -1)
        assert torch.allclose(d.log_prob(y), (terms + d.logits.log_softmax(-1)).logsumexp(-1), atol=1e-12)
        if batch:
            means = torch.stack([p.mean for p in parts], -1)
            assert torch.allclose(d.mean, (means * d.logits.softmax(-1).unsqueeze(-2)).sum(-1))
        assert d.expand((6, *batch)).sample().shape == (6, *batch, 2)


def test_enumerate_support_of_mixtures():
    a = dist.Bernoulli(logits=sized(4))
    b = dist.Categorical(logits=sized(4, 3))
    d = Mixture(sized(4, 2), [a, b])
    values = d.enumerate_support()
    assert values.tolist() == [[0.0] * 4, [1.0] * 4, [2.0] * 4] and d.has_enumerate_support
    assert d.enumerate_support(expand=False).shape == (3, 1)
    mass = Mixture(d.logits, [a, b], validate_args=False).log_prob(values).logsumexp(0)
    assert mass.abs().max() < 1e-10
    assert Mixture(sized(2), dist.OneHotCategorical(logits=sized(2, 3))).enumerate_support().shape == (3, 3)
    assert not mixed().has_enumerate_support


def test_cdfs_take_any_value():
    """Validation is of values that are scored: a cdf is defined between and beyond those of the support."""
    gamma = dist.Gamma(torch.tensor([2.0, 3.0], dtype=F64), 1.0)
    beyond = torch.tensor([[-1.0, -3.0], [1.0, 2.0]], dtype=F64)
    truth = scipy.stats.gamma([2.0, 3.0]).cdf(beyond)
    d = Mixture(torch.zeros(2, 1, dtype=F64), [gamma], validate_args=True)
    assert np.allclose(d.cdf(beyond), truth, atol=1e-12)
    assert np.allclose(PerSite([gamma], [[0, 1]], validate_args=True).cdf(beyond), truth, atol=1e-12)
    levels = DiscretizedLogistic(torch.tensor(0.1, dtype=F64), torch.tensor(0.5, dtype=F64), 4, validate_args=True)
    mass = levels.log_prob(levels.enumerate_support()).exp().cumsum(0)
    for value, expected in ((1.5, mass[1]), (-0.5, 0.0), (-1e9, 0.0), (2.999, mass[2]), (3.5, 1.0), (1e9, 1.0)):
        assert abs(levels.cdf(torch.tensor(value, dtype=F64)) - expected) < 1e-12
    assert levels.cdf(torch.tensor(float("nan"))).isnan()
    for d in (Mixture(torch.zeros(2, 1, dtype=F64), [gamma], validate_args=True), levels):
        with pytest.raises(ValueError, match="support"):
            d.log_prob(torch.tensor(-1.5, dtype=F64))


def test_errors_of_mixtures():
    normal = dist.Normal(torch.zeros(2), 1.0)
    for match, logits, components in (
        (r"len\(components\) == 3", torch.zeros(3), [normal]),
        (r"components.batch_shape\[0\] == 3", torch.zeros(3), normal),
        ("one event_shape", torch.zeros(2), [normal, dist.Dirichlet(torch.ones(2, 2))]),
        (r"logits of shape", torch.zeros(()), [normal]),
        ("all discrete or all continuous", torch.zeros(2), [normal, dist.Poisson(torch.ones(2))]),
    ):
        with pytest.raises(ValueError, match=match):
            Mixture(logits, components, validate_args=True)
    with pytest.raises(TypeError, match="components to be distributions; got int"):
        Mixture(torch.zeros(1), [3])
