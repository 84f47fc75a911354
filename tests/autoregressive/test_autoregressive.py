"""The chain rule: masses, factors, orders, prefixes, lengths, counting."""

import math

import pyro
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.distributions import AutoregressiveDistribution
from support.small_models import CONTEXT, ORDER, binary, real
from support.values import built, sized


def by_hand(module, y, context=None):
    """log p of each site, in visiting order, one call of the network a site."""
    net, head = module.conditioner, module.head
    total = []
    for t in range(y.shape[1]):
        probe = torch.where(torch.arange(y.shape[1]).reshape(1, -1, *[1] * (y.dim() - 2)) < t, y, torch.zeros_like(y))
        total.append(head(net(probe, context)[:, t : t + 1], t).log_prob(y[:, t : t + 1])[:, 0])
    return torch.stack(total, 1)


@pytest.mark.parametrize("order", [None, ORDER])
def test_mass_factors_and_mean_by_enumeration(order):
    model = binary(order, (2, 3))
    d = model(CONTEXT)
    support = d.enumerate_support()
    assert support.shape == (64, 3, 2, 3) and len(support[:, 0].unique(dim=0)) == 64
    p = d.log_prob(support).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(d.mean, (p[..., None, None] * support).sum(0))
    torch.testing.assert_close(d.entropy(), -(p * p.log()).sum(0))
    best = p.argmax(0)
    assert torch.equal(d.mode, support[best, torch.arange(3)])
    rows = support[::7, 0].flatten(1)
    visited = rows if order is None else rows[:, order]
    expected = by_hand(model, visited, CONTEXT[:1].expand(len(rows), -1))
    got = model(CONTEXT[:1]).log_prob_sites(support[::7, 0].unsqueeze(1)).reshape(len(rows), 6)
    if order is not None:
        got = got[:, order]
    torch.testing.assert_close(got, expected)


def test_limit():
    model = gx.Autoregressive(conditioners.MADE(20, 1), heads.Bernoulli(), (20,), limit=1000)
    for use in (lambda d: d.enumerate_support(), lambda d: d.entropy(), lambda d: d.mean, lambda d: d.mode):
        with pytest.raises(ValueError, match=r"at most 1000 values \(limit\); got 1024 or more"):
            use(model())
    with pytest.raises(NotImplementedError, match=r"enumerates a finite support, and no lengths; got Normal"):
        real()().enumerate_support()
    with pytest.raises(NotImplementedError, match=r"and no lengths; got Poisson"):
        real(head=heads.Poisson())().entropy()


def test_no_support_at_all():
    """Where a distribution puts no mass, entropy counts nothing."""
    model = binary(context=0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.conditioner.layers[-1].bias[:3] = torch.tensor([1e4, -1e4, 0.0])
    torch.testing.assert_close(model().entropy(), torch.tensor(4 * math.log(2), dtype=torch.float64))


class Counting(gx.Conditioner):
    """Counts the sites that a conditioner is asked to read."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.read, self.starts, self.passes = inner, [], [], []
        for name in ("num_params", "num_sites", "site", "context"):
            setattr(self, name, getattr(inner, name))

    def start(self, context, batch_size):
        self.starts.append(batch_size)
        return self.inner.start(context, batch_size)

    def extend(self, y, state):
        self.read.append(tuple(y.shape[:2]))
        return self.inner.extend(y, state)

    def reorder(self, state, index):
        return self.inner.reorder(state, index)

    def forward(self, y, context=None):
        self.passes.append(len(y))
        return self.inner(y, context)


def test_sampling_runs_no_history_twice():
    net = Counting(built(conditioners.MADE(6, 1, context=2, hidden=(16,))))
    model = gx.Autoregressive(net, heads.Bernoulli(), (6,))
    model(CONTEXT).sample((5,))
    assert (net.starts, net.read, net.passes) == ([3], [(15, 1)] * 5, [])
    net.starts.clear(), net.read.clear()
    model(CONTEXT).conditional_on_prefix(torch.ones(2, dtype=torch.float64)).sample((5,))
    assert (net.starts, net.read, net.passes) == ([3], [(3, 2)] + [(15, 1)] * 3, [])
    model(CONTEXT).log_prob(torch.ones(6, dtype=torch.float64))
    assert net.passes == [3]


@pytest.mark.parametrize("order", [None, ORDER])
def test_completions_are_the_exact_conditional(order):
    d = binary(order)(CONTEXT)
    support = d.enumerate_support()
    joint = d.log_prob(support)
    visited = support[:, 0] if order is None else support[:, 0][:, order]
    for k in (1, 3, 5):
        prefix = visited[37, :k]
        matches = (visited[:, :k] == prefix).all(1)
        rest = d.conditional_on_prefix(prefix)
        assert rest.event_shape == (6 - k,) and rest.batch_shape == (3,)
        got = rest.log_prob(visited[matches][:, None, k:].expand(-1, 3, -1))
        torch.testing.assert_close(got, joint[matches] - joint[matches].logsumexp(0))
    twice = d.conditional_on_prefix(visited[37, :1]).conditional_on_prefix(visited[37, 1:3])
    torch.testing.assert_close(
        twice.log_prob(visited[:9, None, 3:]), d.conditional_on_prefix(visited[37, :3]).log_prob(visited[:9, None, 3:])
    )


def test_prefix_with_a_batch_of_its_own():
    d = binary(context=0)()
    prefixes = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    many = d.conditional_on_prefix(prefixes)
    assert many.batch_shape == (3,) and many.sample((2,)).shape == (2, 3, 4)
    pyro.set_rng_seed(0)
    y = many.sample((4000,))
    for i, prefix in enumerate(prefixes):
        one = d.conditional_on_prefix(prefix)
        torch.testing.assert_close(many.log_prob(y[:5])[:, i], one.log_prob(y[:5, i]))
        error = (one.mean * (1 - one.mean) / 4000).sqrt()
        assert ((y[:, i].mean(0) - one.mean).abs() < 5 * error).all()
    real_rows = real()().sample((3,))
    assert real()().conditional_on_prefix(real_rows[:, :2]).sample((5,)).shape == (5, 3, 2)


def test_padding_changes_nothing_and_gets_no_gradient():
    for net in (conditioners.Recurrent((), 2, hidden=8, context=2), conditioners.MADE(6, 2, hidden=(12,), context=2)):
        model = built(gx.Autoregressive(net, heads.Normal(), (6,)))
        y, lengths = sized(3, 6), torch.tensor([0, 4, 6])
        junk = y.clone()
        for row, length in enumerate(lengths):
            junk[row, length:] = torch.tensor([math.nan, math.inf, 1e30, -4.0, 7.0, 0.0], dtype=torch.float64)[length:]
        grads = []
        for value in (y, junk):
            value = value.clone().requires_grad_()
            lp = model(CONTEXT, lengths=lengths).log_prob(value)
            grads.append([lp.detach(), *torch.autograd.grad(lp.sum(), [value, *model.parameters()])])
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)
        factors = model(CONTEXT).log_prob_sites(y)
        expected = torch.stack([factors[row, :length].sum() for row, length in enumerate(lengths)])
        torch.testing.assert_close(grads[0][0], expected)
        for row, length in enumerate(lengths):
            assert (grads[1][1][row, length:] == 0).all() and (length == 0 or (grads[1][1][row, :length] != 0).any())
        d = model(CONTEXT, lengths=lengths)
        x = d.sample((4,))
        assert (x[:, 0] == 0).all() and (x[:, 1, 4:] == 0).all() and (x[:, 2] != 0).all()
        assert d.support.check(junk).all() and not d.support.check(torch.full_like(y, math.nan))[1:].any()
        assert d.log_prob_sites(junk)[1, 4:].abs().max() == 0


def test_scalar_lengths_and_a_round_trip_with_padding():
    d = real()(lengths=torch.tensor(2))
    y = d.sample((5,))
    assert y.shape == (5, 4) and (y[:, 2:] == 0).all() and d.log_prob(y).shape == (5,)
    torch.testing.assert_close(d.log_prob(y), real()().log_prob_sites(y)[:, :2].sum(1))
    torch.testing.assert_close(d.from_uniform(d.to_uniform(y)), y)


@pytest.mark.parametrize("kind", [conditioners.Recurrent, conditioners.Markov, conditioners.Independent])
def test_covariates_of_padding_do_not_matter(kind):
    sizes = {conditioners.Recurrent: ((), 2), conditioners.Markov: ((), 2), conditioners.Independent: (4, 2)}[kind]
    options = {conditioners.Markov: {"order": 2}}.get(kind, {})
    model = built(gx.Autoregressive(kind(*sizes, context=gx.Covariates(3), **options), heads.Normal(), (4,)))
    context, lengths = sized(2, 4, 3), torch.tensor([2, 4])
    junk = context.clone()
    junk[0, 2:] = math.nan
    found = []
    for covariates in (context, junk):
        lp = model(covariates, lengths).log_prob(sized(2, 4, seed=1))
        found.append([lp.detach(), *torch.autograd.grad(lp.sum(), list(model.parameters()))])
        assert model(covariates, lengths).sample((3,)).isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_covariates_go_with_their_sites():
    """With an order, and with a prefix: against a model whose sites and covariates were permuted by hand."""
    order = torch.tensor([2, 0, 3, 1])
    net = built(conditioners.Recurrent((), 2, hidden=6, context=gx.Covariates(2)))
    context, y = sized(3, 4, 2), sized(3, 4, seed=1)
    by_hand = gx.Autoregressive(net, heads.Normal(), (4,))(context[:, order]).log_prob_sites(y[:, order])
    d = gx.Autoregressive(net, heads.Normal(), (4,), order)(context)
    torch.testing.assert_close(d.log_prob_sites(y)[:, order], by_hand)
    rest = d.conditional_on_prefix(y[:, order[:2]])
    torch.testing.assert_close(rest.log_prob_sites(y[:, order[2:]]), by_hand[:, 2:])
    direct = AutoregressiveDistribution(
        net,
        heads.Normal(),
        (2,),
        torch.cat([context[:, order[:2]], context[:, [1, 3]]], 1),
        order=[1, 0],
        prefix=y[:, order[:2]],
    )
    torch.testing.assert_close(direct.log_prob(y[:, [1, 3]]), by_hand[:, 2:].sum(1))


def test_no_rows():
    model = real(context=2)
    y = model(sized(0, 2)).rsample()
    y.sum().backward()
    assert y.shape == (0, 4) and model(sized(0, 2)).log_prob(y).shape == (0,)
    assert all((p.grad == 0).all() for p in model.parameters())


def test_supports_for_biject_to():
    head = heads.PerSite([heads.Normal(), heads.LogNormal(), heads.Beta()])
    model = real(torch.tensor([1, 2, 0]), sites=3, head=head)
    whole, rest = model(), model().conditional_on_prefix(torch.tensor([0.3], dtype=torch.float64))
    for d, inside in ((whole, [0.5, 0.3, -2.0]), (rest, [2.0, 0.5])):
        t = torch.distributions.biject_to(d.support)
        x = t.inv(torch.tensor(inside, dtype=torch.float64).abs() if d is rest else d.sample())
        torch.testing.assert_close(t.inv(t(x)), x)
        assert d.support.check(t(sized(7, len(inside)))).all()


def test_lengths_are_in_visiting_order_and_take_a_prefix():
    d = binary(ORDER)(CONTEXT, lengths=torch.tensor([2, 3, 6]))
    y = d.sample((8,))
    assert (y[:, 0][:, ORDER[2:]] == 0).all() and (y[:, 1][:, ORDER[3:]] == 0).all()
    rest = d.conditional_on_prefix(torch.ones(2, dtype=torch.float64))
    z = rest.sample((8,))
    assert (z[:, 0] == 0).all() and (rest.log_prob(z)[:, 0] == 0).all() and (z[:, 1, 1:] == 0).all()
    full = binary(ORDER)(CONTEXT).conditional_on_prefix(torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(rest.log_prob(z)[:, 1], full.log_prob_sites(z)[:, 1, 0])


def test_outside_the_support_without_validation():
    model = binary()
    with pyro.validation_enabled(False):
        d = model(CONTEXT)
        y = torch.ones(6, dtype=torch.float64)
        y[2] = 0.5
        assert (d.log_prob(y) == -math.inf).all()
        sites = d.log_prob_sites(y)
    torch.testing.assert_close(sites[:, :2], model(CONTEXT).log_prob_sites(torch.ones(6, dtype=torch.float64))[:, :2])
    assert (sites[:, 2:] == -math.inf).all()


def test_values_of_other_dtypes():
    d = binary()(CONTEXT)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    for dtype in (torch.uint8, torch.bool, torch.int64):
        assert torch.equal(d.log_prob(y.to(dtype)), d.log_prob(y.double()))
    with pytest.raises(ValueError, match=r"value.dtype == torch.float64"):
        d.log_prob(y.float())
    model = built(gx.Autoregressive(conditioners.MADE(4, 3, site=3), heads.Categorical(3), (4,)))
    labels = torch.tensor([0, 2, 1, 2])
    assert torch.equal(model().log_prob(labels), model().log_prob(labels.float()))


def test_the_number_of_sites_at_the_call():
    net, head = conditioners.Recurrent((2,), 4, hidden=5, context=gx.Covariates(3)), heads.Normal((2,))
    model = built(gx.Autoregressive(net, head, (6, 2)))
    context = torch.randn(5, 4, 3, dtype=torch.float64)
    d = model(context, lengths=torch.tensor([4, 2, 0, 1, 3]), num_sites=4)
    y = d.sample()
    other = gx.Autoregressive(net, head, (4, 2))(context, lengths=torch.tensor([4, 2, 0, 1, 3]))
    assert d.event_shape == (4, 2) and torch.equal(d.log_prob(y), other.log_prob(y))
    assert model.condition(context, num_sites=4).event_shape == (4, 2)
    for wrong, number, message in (
        (model, 0, "num_sites to be"),
        (binary(ORDER), 4, r"num_sites=None \(the model has an order of its sites\); got 4\."),
        (binary(), 4, "event_shape of 6 sites"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong(context if wrong is model else CONTEXT, num_sites=number)


def test_prefixes_under_vmap():
    model, y = binary(context=0), torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double()
    rest = torch.ones(4, dtype=torch.float64)
    rows = torch.func.vmap(lambda prefix: model().conditional_on_prefix(prefix).log_prob(rest))(y)
    torch.testing.assert_close(rows, model().conditional_on_prefix(y).log_prob(rest))
