"""Mixtures, discretised logistics, heads for each site, models as heads."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn
from torch.distributions import MixtureSameFamily, biject_to, constraints

import pyro_genexact as gx
from pyro_genexact.base import DistributionModule, Head, bind
from pyro_genexact.distributions.cdf import cdf
from pyro_genexact.distributions.discretized_logistic import DiscretizedLogistic
from pyro_genexact.distributions.guard import anchor, contains, guarded_log_prob
from pyro_genexact.distributions.mixture import Mixture, UnionConstraint, same_constraint, union
from pyro_genexact.distributions.per_site import PerSite, PerSiteConstraint
from pyro_genexact.heads import composite
from pyro_genexact.heads import mixture as heads
from pyro_genexact.testing.heads import distribution_head

F64 = torch.float64


def sized(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def bounded(raw):
    return (10 * torch.tanh(raw / 10)).exp()


class Normal(Head):
    num_params = 2

    def forward(self, phi, first=0):
        loc, raw = phi.unbind(-1)
        return dist.Normal(loc, bounded(raw), validate_args=False)


class Gamma(Head):
    num_params = 2
    support = constraints.positive

    def forward(self, phi, first=0):
        a, b = bounded(phi).unbind(-1)
        return dist.Gamma(a, b, validate_args=False)


class Poisson(Head):
    num_params = 1
    support = constraints.nonnegative_integer

    def forward(self, phi, first=0):
        return dist.Poisson(bounded(phi.squeeze(-1)), validate_args=False)


class Categorical(Head):
    num_params = 3
    support = constraints.integer_interval(0, 2)

    def forward(self, phi, first=0):
        return dist.Categorical(logits=phi, validate_args=False)


class Angle(Head):
    """Whose family's own support, all reals, is wider than its mass."""

    num_params = 2
    support = constraints.interval(-torch.pi, torch.pi)

    def forward(self, phi, first=0):
        return dist.VonMises(phi[..., 0], bounded(phi[..., 1]), validate_args=False)


class Vector(Head):
    num_params = 4
    site_shape = (2,)
    support = constraints.real_vector

    def forward(self, phi, first=0):
        return dist.Normal(phi[..., :2], bounded(phi[..., 2:]), validate_args=False).to_event(1)


class Shares(Head):
    num_params = 2
    site_shape = (2,)
    support = constraints.simplex

    def forward(self, phi, first=0):
        return dist.Dirichlet(bounded(phi), validate_args=False)


def goodness(values, probs, enough=5):
    """The p-value of integer draws (n,) against probabilities (L,), cells of fewer than 5 expected joined."""
    counts = np.bincount(values.long().numpy(), minlength=len(probs)).astype(float)
    assert len(counts) == len(probs)
    expected = len(values) * probs.numpy()
    rare = expected < enough
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return scipy.stats.chisquare(observed[keep], expected[keep] * observed.sum() / expected.sum()).pvalue


# mixtures


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
    assert contains(c, anchor(c, y)).all()
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
        terms = torch.stack([guarded_log_prob(p, y, s) for p, s in zip(parts, supports, strict=True)], -1)
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


# discretised logistic


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_discretized_logistic_mass_and_direct_formula(levels):
    loc = torch.cat([sized(200), 3 * sized(20, seed=1), torch.tensor([0.0, 1e4, -1e4, 1e8, -1e8, 1.0], dtype=F64)])
    for scale in (1e-300, 1e-9, 1e-5, 1e-3, 0.03, 0.7, 40.0, 1e4, 1e9):
        d = DiscretizedLogistic(loc, torch.tensor(scale, dtype=F64), levels)
        y = d.enumerate_support()
        lp = d.log_prob(y)
        assert not lp.isnan().any()
        assert (lp.exp().sum(0) - 1).abs().max() < 1e-10
        assert torch.allclose(d.cdf(y), lp.exp().cumsum(0), atol=1e-10)
        assert torch.allclose(d.mean, (lp.exp() * y).sum(0), atol=1e-9)
    d = DiscretizedLogistic(loc[:200], sized(200, seed=5).exp() / 4, levels)
    x, half = y[:, :200] * 2 / (levels - 1) - 1, 1 / (levels - 1)
    above = torch.sigmoid((x + half - d.loc) / d.scale).masked_fill(y[:, :200] == levels - 1, 1.0)
    below = torch.sigmoid((x - half - d.loc) / d.scale).masked_fill(y[:, :200] == 0, 0.0)
    assert torch.allclose(d.log_prob(y[:, :200]).exp(), above - below, atol=1e-13)


def test_discretized_logistic_of_numbers():
    d = DiscretizedLogistic(0.0, 1.0, 4)
    assert d.batch_shape == () and d.loc.dtype == torch.get_default_dtype()
    same = DiscretizedLogistic(torch.tensor(0.0), torch.tensor(1.0), 4)
    assert torch.equal(d.log_prob(d.enumerate_support()), same.log_prob(same.enumerate_support()))
    for d in (DiscretizedLogistic(0.5, sized(3).exp(), 4), DiscretizedLogistic(sized(3), 2, 4)):
        assert d.batch_shape == (3,) and d.loc.dtype == d.scale.dtype == F64
        assert (d.log_prob(d.enumerate_support()).exp().sum(0) - 1).abs().max() < 1e-12
    assert DiscretizedLogistic(sized(3), sized(2, 1).exp(), 4).batch_shape == (2, 3)
    with pytest.raises(ValueError, match="scale"):
        DiscretizedLogistic(0.0, -1.0, 4)


def test_discretized_logistic_far_tails():
    for loc, scale, y in (
        (-1.0, 0.01, 200.0),
        (1.0, 0.004, 3.0),
        (0.3, 0.002, 255.0),
        (0.9, 1e-3, 0.0),
        (0.0, 5.0, 7.0),
    ):
        d = DiscretizedLogistic(torch.tensor(loc, dtype=F64), torch.tensor(scale, dtype=F64), 256)
        c, r = (loc + 1) * 127.5, scale * 127.5
        a, b = (y - 0.5 - c) / r, (y + 0.5 - c) / r
        if y == 255:
            truth = scipy.special.log_expit(-a)
        elif y == 0:
            truth = scipy.special.log_expit(b)
        elif a > 0:  # the mirror image, by survival functions in log space
            hi, lo = scipy.special.log_expit(-a), scipy.special.log_expit(-b)
            truth = hi + np.log1p(-np.exp(lo - hi))
        else:
            hi, lo = scipy.special.log_expit(b), scipy.special.log_expit(a)
            truth = hi + np.log1p(-np.exp(lo - hi))
        assert np.isclose(d.log_prob(torch.tensor(y)).item(), truth, rtol=1e-11), (loc, scale, y)


def test_discretized_logistic_of_cells_narrower_than_rounding():
    d = DiscretizedLogistic(torch.zeros((), dtype=F64), torch.tensor(1e12, dtype=F64), 256)
    assert np.isclose(d.log_prob(torch.tensor(100.0, dtype=F64)).item(), np.log(1 / (4 * 127.5e12)), rtol=1e-12)


def test_discretized_logistic_gradient_values_and_types():
    loc, scale, y = sized(30).requires_grad_(), sized(30, seed=1).exp().requires_grad_(), torch.arange(30) % 6
    assert torch.autograd.gradcheck(lambda m, s: DiscretizedLogistic(m, s, 6).log_prob(y), (loc, scale))
    d = DiscretizedLogistic(loc, scale, 6, validate_args=False)
    assert torch.equal(d.log_prob(y), d.log_prob(y.double()))
    for bad in (-1.0, 6.0, 2.5, float("nan"), float("inf"), -1e8):
        lp = d.log_prob(torch.tensor(bad, dtype=F64))
        assert (lp == -torch.inf).all()
        grads = torch.autograd.grad(lp.sum(), (loc, scale))
        assert all((g == 0).all() for g in grads)
        with pytest.raises(ValueError, match="support"):
            DiscretizedLogistic(loc, scale, 6, validate_args=True).log_prob(torch.tensor(bad, dtype=F64))
    with pytest.raises(ValueError, match="levels to be integers >= 2; got 1"):
        DiscretizedLogistic(loc, scale, 1)


def test_discretized_logistic_samples_quantiles_and_moments():
    torch.manual_seed(2)
    d = DiscretizedLogistic(torch.tensor([-0.9, 0.2], dtype=F64), torch.tensor([0.3, 0.1], dtype=F64), 16)
    y = d.expand([3, 2]).sample((5000,))
    probs = d.log_prob(d.enumerate_support()).exp()
    assert y.shape == (5000, 3, 2) and y.dtype == F64
    for i in range(2):
        assert goodness(y[..., i].flatten(), probs[:, i]) > 1e-3
    levels = d.enumerate_support()
    assert torch.equal(d.icdf(d.cdf(levels)[:15] - 1e-9), levels[:15])
    assert torch.equal(d.icdf(d.cdf(levels)[:15] + 1e-9), levels[1:])
    assert torch.equal(d.mode, probs.argmax(0).double()) and d.mode[0] == 0
    assert torch.allclose(d.variance, (probs * levels**2).sum(0) - d.mean**2, atol=1e-12)
    assert np.allclose(d.entropy(), scipy.stats.entropy(probs.numpy(), axis=0), atol=1e-12)


# heads


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
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), bind(head)[0]):
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
        ("K to be integers >= 1; got 0", (Normal(), 0)),
        (r"one site_shape; got \(\) and \(2,\)", ([Normal(), Vector()],)),
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
        with pytest.raises(TypeError, match="Expected a head of distributions; got Affine, which makes Affine"):
            heads.Mixture(*arguments)
    assert heads.Mixture(nn.ModuleList([Normal(), Gamma()])).num_params == 6
    for arguments in ((1,), (4, 0)):
        with pytest.raises(ValueError, match="integers >="):
            heads.DiscretizedLogistic(*arguments)


# another head for each site


def columns():
    n, c = Normal(), Categorical()
    return [n, c, n, Gamma(), c, Poisson(), n]


def test_per_site_equals_one_by_one():
    torch.manual_seed(6)
    each = columns()
    head, phi = composite.PerSite(each), sized(4, 7, 3)
    assert head.num_params == 3 and head.num_sites == 7 and len(head.heads) == 4
    d = head(phi)
    y = d.sample((2,))
    assert isinstance(d, PerSite) and d.batch_shape == (4, 7) and y.shape == (2, 4, 7) and y.dtype == F64
    for t, h in enumerate(each):
        one = h(phi[:, t : t + 1, : h.num_params])
        assert torch.allclose(d.log_prob(y)[..., t : t + 1], one.log_prob(y[..., t : t + 1]), atol=1e-13)
        alone = head(phi[:, t : t + 1], t)
        assert type(alone) is type(one) and torch.equal(
            alone.log_prob(y[0, :, t : t + 1]), one.log_prob(y[0, :, t : t + 1])
        )
        assert h.support.check(y[..., t]).all()
        if t not in (1, 4):
            assert torch.equal(d.mean[:, t : t + 1], one.mean) and torch.equal(d.variance[:, t : t + 1], one.variance)
    chunk = head(phi[:, 2:5], 2)
    assert torch.allclose(chunk.log_prob(y[..., 2:5]), d.log_prob(y)[..., 2:5], atol=1e-13)
    assert not d.has_rsample and not d.has_enumerate_support
    assert d.log_prob(y[0, 0]).shape == (4, 7)


def test_per_site_calls_equal_heads_once_also_when_bound():
    calls = []

    class Counting(Normal):
        def forward(self, phi, first=0):
            calls.append(tuple(phi.shape))
            return super().forward(phi, first)

    one, phi = Counting(), torch.zeros(3, 10, 2)
    head = composite.PerSite([one] * 10)
    assert len(calls) == 1
    calls.clear()
    d = head(phi)
    assert calls == [(3, 10, 2)] and type(d) is dist.Normal
    calls.clear()
    bound = bind(copy.deepcopy(composite.PerSite([one, Gamma()] * 5)))[0]
    calls.clear()
    bound(phi)
    assert calls == [(3, 5, 2)]


class Shifted(Head):
    """Whose setting does not show in its repr."""

    num_params = 1

    def __init__(self, shift, **more):
        super().__init__()
        self.shift = shift
        self.__dict__.update(more)

    def forward(self, phi, first=0):
        return dist.Normal(phi.squeeze(-1) + self.shift, 1.0, validate_args=False)


class Learned(Shifted):
    def __init__(self, kind):
        super().__init__(0.0)
        value = torch.zeros(())
        if kind == "parameter":
            self.shift = nn.Parameter(value)
        elif kind == "frozen":
            self.register_parameter("spare", nn.Parameter(value, requires_grad=False))
        elif kind == "buffer":
            self.register_buffer("spare", value)
        else:
            self.shift = value.requires_grad_()


class Prior(pyro.nn.PyroModule):
    context = 1

    def __init__(self):
        super().__init__()
        self.loc = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, context):
        return dist.Normal(self.loc + context.squeeze(-1), 1.0)


def test_per_site_groups_heads_made_alike():
    makers = [
        lambda: Shifted(1.0),
        lambda: Shifted(torch.tensor(1.0)),
        gx.heads.Poisson,
        lambda: gx.heads.Binomial(4),
        lambda: heads.Mixture(gx.heads.Normal(), 3),
        lambda: gx.heads.DiscretizedLogistic(5, 2),
    ]
    for make in makers:
        each = [make() for _ in range(3)]
        head = composite.PerSite(each)
        assert len(head.heads) == 1 and head.heads[0] is each[0] and len(head.supports) == 3
        phi = sized(4, 3, head.num_params)
        y = head(phi).sample()
        one_by_one = [h(phi[:, t : t + 1]).log_prob(y[:, t : t + 1]) for t, h in enumerate(each)]
        torch.testing.assert_close(head(phi).log_prob(y), torch.cat(one_by_one, 1))
    head = composite.PerSite([make() for _ in range(2) for make in makers])
    assert head._which == [*range(6)] * 2


@pytest.mark.parametrize(
    "pair",
    [
        lambda: (Shifted(1.0), Shifted(2.0)),
        lambda: (Shifted(torch.tensor(1.0)), Shifted(torch.tensor(2.0))),
        lambda: (Shifted(1.0), Shifted(1.0, extra=lambda: 0)),
        lambda: (Shifted(1.0, extra=lambda: 0), Shifted(1.0, extra=lambda: 0)),
        lambda: (Shifted(1.0), Shifted(1.0).eval()),
        lambda: (gx.heads.Binomial(4), gx.heads.Binomial(5)),
        lambda: (gx.heads.DiscretizedLogistic(4, 2), gx.heads.DiscretizedLogistic(5, 2)),
        *[lambda kind=kind: (Learned(kind), Learned(kind)) for kind in ("parameter", "frozen", "buffer", "plain")],
        lambda: (composite.ConditionalHead(Prior()), composite.ConditionalHead(Prior())),
    ],
)
def test_per_site_keeps_other_heads_apart(pair):
    one, other = pair()
    head = composite.PerSite([one, other, one])
    assert list(head.heads) == [one, other] and head._which == [0, 1, 0]


def test_per_site_permuted(monkeypatch):
    each, order = columns(), torch.tensor([3, 0, 6, 1, 2, 5, 4])
    head = composite.PerSite(each).eval()
    expected = composite.PerSite([each[t] for t in order.tolist()])
    phi, before = sized(4, 7, 3), list(head.supports)
    y = expected(phi).sample()
    y[0, 0], y[1, 2], y[2, 3] = -1.0, float("nan"), 0.5  # outside the supports
    with monkeypatch.context() as patch:  # nothing is built or compared again
        for target, name in ((composite.PerSite, "__init__"), (PerSiteConstraint, "__init__")):
            patch.setattr(target, name, lambda *_: pytest.fail("built anew"))
        got = head.permuted(order)
    assert not got.training and got.num_sites == 7 and all(a is b for a, b in zip(got.heads, head.heads, strict=True))
    free = [h(phi).expand((4, 7)) for h in (got, expected)]
    assert torch.equal(*[guarded_log_prob(d, y) for d in free])
    assert list(map(repr, got.supports)) == list(map(repr, expected.supports))
    assert torch.equal(got.support.check(y), expected.support.check(y)) and not got.support.check(y).all()
    assert torch.equal(anchor(got.support, y), anchor(expected.support, y))
    assert torch.equal(got.support.joint().check(y), expected.support.joint().check(y))
    for t in range(7):
        assert type(got(phi[:, t : t + 1], t)) is type(expected(phi[:, t : t + 1], t))
    assert head.supports == before and head.support.parts == before  # which stays as it is
    assert got.permuted(order.argsort())._which == head._which
    got.heads = nn.ModuleList()
    assert len(head.heads) == 4


def test_per_site_outside_supports_and_cdf():
    n, g = Normal(), Gamma()
    phi = sized(5, 4, 2).requires_grad_()
    d = composite.PerSite([g, n, n, g])(phi)
    y = torch.tensor([-1.0, -1.0, float("nan"), 0.5], dtype=F64)
    lp = d.log_prob(y)
    assert lp.isfinite().all(0).tolist() == [False, True, False, True] and not lp.isnan().any()
    (grad,) = torch.autograd.grad(lp[lp.isfinite()].sum(), phi)
    assert grad.isfinite().all() and (grad[:, [0, 2]] == 0).all() and (grad[:, [1, 3]] != 0).all()
    y = torch.tensor([1.0, -1.0, 0.5, -3.0], dtype=F64)
    cdf = d.cdf(y)
    normal = scipy.stats.norm(phi[:, 1:3, 0].detach(), bounded(phi[:, 1:3, 1]).detach())
    gamma = scipy.stats.gamma(bounded(phi[:, 0, 0]).detach(), scale=1 / bounded(phi[:, 0, 1]).detach())
    assert np.allclose(cdf[:, 1:3].detach(), normal.cdf(y[1:3]), atol=1e-12)
    assert np.allclose(cdf[:, 0].detach(), gamma.cdf(1.0), atol=1e-9) and (cdf[:, 3] == 0).all()


def test_per_site_moves_values_to_the_order_of_sites():
    loc = torch.tensor([[10.0, 20.0, 30.0]], dtype=F64)
    parts = [dist.Normal(loc[:, [2, 0]], 1e-3), dist.Normal(loc[:, [1]], 1e-3)]
    d = PerSite(parts, [[2, 0], [1]])
    assert d.sample((2,)).round().tolist() == [[[10.0, 20.0, 30.0]]] * 2 and torch.equal(d.mode, loc)
    assert d.rsample().shape == (1, 3) and d.has_rsample
    assert torch.allclose(d.icdf(torch.tensor(0.5, dtype=F64)), loc)
    assert torch.equal(PerSite([dist.Normal(loc, 1.0)], [[1, 2, 0]]).mean, loc[:, [2, 0, 1]])
    rolled = PerSite([dist.Normal(loc, 1.0)], [[1, 2, 0]])
    assert torch.allclose(rolled.log_prob(rolled.mean), dist.Normal(loc, 1.0).log_prob(loc))
    assert torch.allclose(d.entropy(), dist.Normal(loc, 1e-3).entropy())
    e = d.expand((4, 3))
    assert e.batch_shape == (4, 3) and d.batch_shape == (1, 3) and e.sample().shape == (4, 3)
    assert torch.equal(e.mean, loc.expand(4, 3))
    with pytest.raises(ValueError, match=r"batch_shape\[-1\] == 3"):
        d.expand((4, 5))


def test_per_site_enumerates_supports_of_one_size():
    bits = PerSite([dist.Bernoulli(logits=sized(4, 2)), dist.Categorical(logits=sized(4, 1, 2))], [[0, 2], [1]], F64)
    values = bits.enumerate_support()
    assert values.shape == (2, 4, 3) and bits.enumerate_support(expand=False).shape == (2, 1, 3)
    assert bits.log_prob(values).logsumexp(0).abs().max() < 1e-12
    with pytest.raises(ValueError, match=r"one size to enumerate them; got sizes \[2, 3\]"):
        PerSite(
            [dist.Bernoulli(sized(1).sigmoid()), dist.Categorical(sized(1, 3).exp())], [[0], [1]]
        ).enumerate_support()


def test_per_site_constraint():
    head = composite.PerSite(columns())
    c = head.support
    assert isinstance(c, PerSiteConstraint) and len(head.supports) == 7 and not c.is_discrete and c.event_dim == 0
    y = torch.tensor([[-1.0, 2.0, 0.0, 1.0, 0.0, 9.0, 3.0], [float("nan"), 3.0, 1.0, -1.0, 0.5, -1.0, float("inf")]])
    assert contains(c, y).tolist() == [[True] * 7, [False, False, True, False, False, False, False]]
    assert contains(c, anchor(c, y)).all() and anchor(c, y).shape == y.shape
    assert c.joint().check(y).tolist() == [True, False] and c.joint().event_dim == 1
    order = torch.tensor([3, 0, 1, 2, 4, 5, 6])
    assert c.joint(order).check(y[:, order.argsort()]).tolist() == [True, False]
    d = head(sized(2, 7, 3))
    guarded = guarded_log_prob(d, y.double(), c)
    assert torch.equal(guarded == -torch.inf, ~contains(c, y))
    free = PerSite(d.parts, d.sites, validate_args=True)
    assert torch.equal(free.support.check(y), c.check(y))
    with pytest.raises(ValueError, match="support"):
        free.log_prob(y.double())
    uniform = dist.Uniform(torch.zeros(1, 2), torch.tensor([[1.0, 5.0]]))
    mixed_bounds = PerSite([uniform, dist.Gamma(torch.ones(1, 1), 1.0)], [[2, 0], [1]]).support
    assert mixed_bounds.check(torch.tensor([[4.0, 1.0, 0.5], [4.0, -1.0, 4.0]])).tolist() == [
        [True] * 3,
        [True, False, False],
    ]
    with pytest.raises(ValueError, match="one event_dim"):
        PerSiteConstraint([constraints.real, constraints.simplex])
    with pytest.raises(ValueError, match=r"value.shape\[-1\] == 7"):
        c.check(torch.zeros(2, 6))


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_bijection_onto_the_joint_support(shape):
    parts = [constraints.real, constraints.positive, constraints.positive, constraints.interval(-1.0, 2.0)]
    support = PerSiteConstraint([constraints.independent(p, len(shape) - 1) for p in parts]).joint()
    t, x = biject_to(support), sized(5, *shape)
    y = t(x)
    assert support.event_dim == len(shape) and support.check(y).all() and torch.allclose(t.inv(y), x, atol=1e-9)
    assert not torch.allclose(y[:, 1], x[:, 1])
    jacobian = torch.stack([torch.autograd.functional.jacobian(t, row).reshape(row.numel(), -1) for row in x])
    assert torch.allclose(t.log_abs_det_jacobian(x, y), torch.linalg.slogdet(jacobian)[1], atol=1e-10)


def test_errors_of_per_site():
    head = composite.PerSite([Normal(), Gamma()])
    with pytest.raises(ValueError, match=r"sites 0 ... 1 \(PerSite of 2 heads\); got 0 ... 2"):
        head(torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match=r"got 2 ... 2"):
        head(torch.zeros(4, 1, 2), 2)
    for match, each in (
        ("one site_shape", [Normal(), Vector()]),
        ("at least one head", []),
        ("got a PerSite among them", [head, Normal()]),
    ):
        with pytest.raises(ValueError, match=match):
            composite.PerSite(each)
    with pytest.raises(TypeError, match="class Head; got type"):
        composite.PerSite([Normal])
    with pytest.raises(TypeError, match="heads to be a sequence of heads; got Normal"):
        composite.PerSite(Normal())
    with pytest.raises(TypeError, match="class Head; got list"):
        composite.PerSite([[Normal()]])
    with pytest.raises(TypeError, match="Expected a head of distributions; got Affine, which makes Affine"):
        composite.PerSite([Normal(), gx.heads.Affine()])
    normal = dist.Normal(torch.zeros(4, 2), 1.0)
    for match, parts, sites in (
        ("each of 0 ... 1 once", [normal], [[0, 2]]),
        (r"len\(parts\) == 2", [normal], [[0], [1]]),
        (r"batch_shape == \(4, 1\)", [normal, normal], [[0, 2], [1]]),
    ):
        with pytest.raises(ValueError, match=match):
            PerSite(parts, sites)


# a model as the conditional of one site


class Regression(DistributionModule):
    def __init__(self, context=3, shape=()):
        super().__init__()
        self.context, self.shape = context, shape
        self.net = nn.Linear(3, 2, dtype=F64)

    def forward(self, context=None):
        phi = self.net(context)
        loc, raw = phi.reshape(phi.shape[:-1] + (1,) * len(self.shape) + (2,)).unbind(-1)
        return dist.Normal(loc, raw.exp()).expand(phi.shape[:-1] + self.shape).to_event(len(self.shape))


def test_conditional_head():
    module = Regression()
    head = composite.ConditionalHead(module)
    assert head.num_params == 3 and head.site_shape == () and head.support is constraints.real
    phi, y = sized(4, 5, 3), sized(4, 5, seed=1)
    assert torch.equal(head(phi).log_prob(y), module(phi).log_prob(y)) and head(phi).batch_shape == (4, 5)
    head(phi).log_prob(y).sum().backward()
    assert len(list(head.parameters())) == 2 and all(p.grad.abs().sum() > 0 for p in head.parameters())
    assert composite.ConditionalHead(Regression(shape=(2,))).site_shape == (2,)
    mixture = heads.Mixture(head, 2)
    assert mixture(torch.zeros(4, 5, 8, dtype=F64)).sample().shape == (4, 5)


def test_building_heads_leaves_the_users_random_numbers():
    net = gx.conditioners.NADE(3, 1, hidden=4, context=2)
    ensemble = gx.OrderEnsemble(gx.Autoregressive(net, gx.heads.Bernoulli(), (3,)), 4)
    before = torch.get_rng_state()
    head = composite.ConditionalHead(ensemble)
    composite.PerSite([head, head]), heads.Mixture(head, 2)
    assert ensemble.training and torch.equal(torch.get_rng_state(), before)
    head(torch.zeros(1, 1, 2))  # which draws an order
    assert not torch.equal(torch.get_rng_state(), before)


def test_errors_of_conditional_head():
    for context in (0, gx.Steps(3) if hasattr(gx, "Steps") else "Steps(3)"):
        with pytest.raises(ValueError, match=r"module.context to be an integer >= 1; got"):
            composite.ConditionalHead(Regression(context))
    with pytest.raises(ValueError, match=r"event_shape \(\) or \(k,\); got \(\) and \(2, 2\)"):
        composite.ConditionalHead(Regression(shape=(2, 2)))
    with pytest.raises(TypeError, match="DistributionModule; got Linear"):
        composite.ConditionalHead(nn.Linear(3, 2))
