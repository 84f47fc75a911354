"""Heads for each site, and models as heads."""

from __future__ import annotations

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn
from torch.distributions import biject_to, constraints

import pyro_genexact as gx
from pyro_genexact.base import DistributionModule, Head
from pyro_genexact.core.binding import Bound
from pyro_genexact.families.in_support import contains, feasible_point, log_prob_everywhere
from pyro_genexact.families.per_site import PerSite, PerSiteConstraint
from pyro_genexact.heads import composite
from pyro_genexact.heads import mixture as heads
from support.small_heads import Categorical, Gamma, Normal, Poisson, Vector, bounded
from support.values import F64, sized


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
    bound = Bound(copy.deepcopy(composite.PerSite([one, Gamma()] * 5))).copy()
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
        assert head._which == [0, 0, 0] and list(head.heads) == each and len(head.supports) == 3
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
    assert torch.equal(*[log_prob_everywhere(d, y) for d in free])
    assert list(map(repr, got.supports)) == list(map(repr, expected.supports))
    assert torch.equal(got.support.check(y), expected.support.check(y)) and not got.support.check(y).all()
    assert torch.equal(feasible_point(got.support, y), feasible_point(expected.support, y))
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
    with pytest.raises(NotImplementedError, match=r"equal size for enumeration; got sizes \[2, 3\]"):
        PerSite(
            [dist.Bernoulli(sized(1).sigmoid()), dist.Categorical(sized(1, 3).exp())], [[0], [1]]
        ).enumerate_support()


def test_per_site_constraint():
    head = composite.PerSite(columns())
    c = head.support
    assert isinstance(c, PerSiteConstraint) and len(head.supports) == 7 and not c.is_discrete and c.event_dim == 0
    y = torch.tensor([[-1.0, 2.0, 0.0, 1.0, 0.0, 9.0, 3.0], [float("nan"), 3.0, 1.0, -1.0, 0.5, -1.0, float("inf")]])
    assert contains(c, y).tolist() == [[True] * 7, [False, False, True, False, False, False, False]]
    assert contains(c, feasible_point(c, y)).all() and feasible_point(c, y).shape == y.shape
    assert c.joint().check(y).tolist() == [True, False] and c.joint().event_dim == 1
    order = torch.tensor([3, 0, 1, 2, 4, 5, 6])
    assert c.joint(order).check(y[:, order.argsort()]).tolist() == [True, False]
    d = head(sized(2, 7, 3))
    with_support = log_prob_everywhere(d, y.double(), c)
    assert torch.equal(with_support == -torch.inf, ~contains(c, y))
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
    with pytest.raises(ValueError, match="of equal event_dim"):
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
        ("heads in heads with equal site_shape", [Normal(), Vector()]),
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
    with pytest.raises(TypeError, match="Expected a head of distributions; got Affine, which returns Affine"):
        composite.PerSite([Normal(), gx.heads.Affine()])
    normal = dist.Normal(torch.zeros(4, 2), 1.0)
    for match, parts, sites in (
        ("each of 0 ... 1 once", [normal], [[0, 2]]),
        (r"len\(parts\) == 2", [normal], [[0], [1]]),
        (r"batch_shape == \(4, 1\)", [normal, normal], [[0, 2], [1]]),
    ):
        with pytest.raises(ValueError, match=match):
            PerSite(parts, sites)


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
    for context in (0, gx.Covariates(3) if hasattr(gx, "Covariates") else "Covariates(3)"):
        with pytest.raises(ValueError, match=r"module.context to be an integer >= 1; got"):
            composite.ConditionalHead(Regression(context))
    with pytest.raises(ValueError, match=r"event_shape \(\) or \(k,\); got \(\) and \(2, 2\)"):
        composite.ConditionalHead(Regression(shape=(2, 2)))
    with pytest.raises(TypeError, match="DistributionModule; got Linear"):
        composite.ConditionalHead(nn.Linear(3, 2))


def test_ensembles_of_images_score_what_lies_outside_some_sites_support():
    h = gx.heads
    head = h.PerSite([h.LogNormal(), h.Normal(), h.Gamma(), h.Normal()])
    model = gx.Autoregressive(gx.conditioners.MADE(4, 2, hidden=(8,)), head, (2, 2)).double()
    d = gx.OrderEnsemble(model, torch.tensor([[0, 1, 2, 3], [2, 1, 0, 3]])).eval()()
    y = d.sample((3,))
    inside = d.support.check(y)
    expected = torch.stack([part.log_prob(y) for part in d.components]).logsumexp(0) - torch.tensor(2.0).log()
    assert inside.all()
    torch.testing.assert_close(d.log_prob(y), expected)
    with pyro.validation_enabled(False):
        assert (d.log_prob(-y.abs()) == -torch.inf).all()


def test_support_of_bounds_on_meta():
    half = torch.ones(1, device="meta") / 2
    parts = [dist.Binomial(n * torch.ones(1, device="meta"), half, validate_args=False) for n in (3, 4)]
    d = PerSite(parts, [[1], [0]], validate_args=False)
    assert d.support.check(torch.zeros(2, device="meta")).is_meta


def test_a_state_brings_other_fixed_parameters():
    """Sites that were alike are apart once their fixed parameters are."""
    alike, apart = (composite.PerSite([gx.heads.Binomial(n) for n in counts]) for counts in ((2, 2), (4, 7)))
    phi, y = sized(3, 2, 1), torch.tensor([4.0, 6.0], dtype=F64)
    for head, other in ((alike, apart), (apart, alike)):
        copied = copy.deepcopy(head)
        copied.load_state_dict(other.state_dict())
        assert head is apart or copied._which == [0, 1]
        for n in (4.0, 7.0):
            assert torch.equal(copied.support.check(n * torch.ones(2)), other.support.check(n * torch.ones(2)))
        torch.testing.assert_close(copied(phi).log_prob(y), other(phi).log_prob(y))
