"""The chain rule: masses, factors, orders, prefixes, lengths, counting, and Rosenblatt's transform."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro.infer.reparam import AutoReparam, LocScaleReparam
from registry import PAIRED, built, paired, sized
from torch import nn

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.distributions import AutoregressiveDistribution

ORDER = torch.tensor([3, 1, 0, 2, 5, 4])
CONTEXT = sized(3, 2, seed=4)


def binary(order=None, event_shape=(6,), context=2, **options):
    return built(
        gx.Autoregressive(
            conditioners.MADE(6, 1, context=context, hidden=(16,), **options), heads.Bernoulli(), event_shape, order
        )
    )


def real(order=None, sites=4, head=None, net=None, context=0):
    head = head or heads.Normal()
    net = net or conditioners.MADE(sites, head.num_params, hidden=(16,), activation=torch.tanh, context=context)
    return built(gx.Autoregressive(net, head, (sites, *head.site_shape), order))


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
    model = built(gx.Autoregressive(kind(*sizes, context=gx.Steps(3), **options), heads.Normal(), (4,)))
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
    net = built(conditioners.Recurrent((), 2, hidden=6, context=gx.Steps(2)))
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


@pytest.mark.parametrize("net", ["made", "recurrent", "nade"])
def test_gradients_through_the_whole_history(net):
    head = heads.Normal()
    kinds = {
        "made": lambda: conditioners.MADE(4, 2, hidden=(8,), context=2, activation=torch.tanh),
        "recurrent": lambda: conditioners.Recurrent((), 2, hidden=5, context=2),
        "nade": lambda: conditioners.NADE(4, 2, hidden=5, context=2),
    }
    model = real(net=kinds[net](), head=head)
    names = [name for name, _ in model.named_parameters()]

    def f(context, *weights):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (context,)).rsample((2,))

    inputs = (CONTEXT.clone().requires_grad_(), *model.parameters())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def ancestors(node):
    """The names of all functions that a tensor came from."""
    names, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and type(node).__name__.removesuffix("Backward") not in names:
            names.add(type(node).__name__.removesuffix("Backward"))
            todo += [parent for parent, _ in node.next_functions]
    return names


class Scaled(gx.Head):
    """A head with a parameter of its own."""

    num_params = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, phi, first=0):
        return pyro.distributions.Normal(phi[..., 0], self.scale.exp() * phi[..., 1].exp(), validate_args=False)


@pytest.mark.parametrize("order", [None, torch.tensor([2, 0, 1, 3])])
def test_the_sweep_agrees_with_a_graph_of_all_steps(monkeypatch, order):
    model = real(order, head=Scaled(), context=2)
    found = []
    for sweeps in (True, False):
        monkeypatch.setattr("pyro_genexact.autoregressive.distribution.can_sweep", lambda _, sweeps=sweeps: sweeps)
        torch.manual_seed(0)
        context = CONTEXT.clone().requires_grad_()
        d = model(context)
        y = d.rsample((5,))
        assert ("_Sweep" in ancestors(y.grad_fn)) == sweeps
        found.append(
            [y.detach(), *torch.autograd.grad(y.sin().sum() + d.log_prob(y).sum(), [context, *model.parameters()])]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_parameter_changed_before_backward_is_found():
    model = real()
    y = model().rsample()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_rsample_needs_a_reparameterised_family():
    with pytest.raises(NotImplementedError, match=r"family is reparameterised; got Bernoulli"):
        binary()(CONTEXT).rsample()


CONTINUOUS = {
    "Normal": heads.Normal,
    "StudentT": heads.StudentT,
    "Student with fixed df": lambda: heads.StudentT(df=4.0),
    "Laplace": heads.Laplace,
    "Gamma": heads.Gamma,
}


@pytest.mark.parametrize("family", CONTINUOUS)
def test_rosenblatt_of_continuous_heads(family):
    d = real(torch.tensor([2, 0, 1, 3]), head=CONTINUOUS[family]())()
    torch.manual_seed(0)
    y = d.sample((2000,))
    u = d.to_uniform(y)
    assert uniform(u)
    torch.testing.assert_close(d.from_uniform(u), y, rtol=1e-6, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(d.to_uniform, y[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], d.log_prob(y[0]), rtol=1e-6, atol=1e-6)


def uniform(u):
    """Kolmogorov-Smirnov for each site, and no rank correlation between them."""
    n = len(u)
    grid = (torch.arange(n, dtype=u.dtype) + 0.5) / n
    statistic = (u.sort(0)[0] - grid[:, None]).abs().max() * n**0.5
    correlation = torch.corrcoef(u.T) - torch.eye(u.shape[1], dtype=u.dtype)
    return statistic < 2.2 and correlation.abs().max() < 5 / n**0.5


@pytest.mark.parametrize("head", [heads.Bernoulli, heads.Poisson, lambda: heads.DiscretizedLogistic(7, 2)])
def test_rosenblatt_of_discrete_heads(head):
    d = real(head=head())()
    torch.manual_seed(1)
    y = d.sample((2000,))
    u = d.to_uniform(y)
    assert uniform(u)
    assert torch.equal(d.from_uniform(u).to(y.dtype), y)


def test_rosenblatt_of_a_prefix_and_of_padding():
    d = real()(lengths=torch.tensor([4, 2]))
    y = d.sample()
    u = d.to_uniform(y)
    assert u[0].isfinite().all() and u[1, 2:].isnan().all() and u[1, :2].isfinite().all()
    full = real()()
    rest = full.conditional_on_prefix(y[0, :2])
    torch.testing.assert_close(rest.to_uniform(y[0, 2:]), u[0, 2:])
    torch.testing.assert_close(rest.from_uniform(u[0, 2:]), y[0, 2:])


def test_rosenblatt_names_the_family_that_has_none():
    d = real(sites=2, head=heads.MultivariateNormal(2), net=conditioners.MADE(2, 5, site=(2,)))()
    with pytest.raises(NotImplementedError, match=r"cdf; got MultivariateNormal"):
        d.to_uniform(d.sample())
    with pytest.raises(NotImplementedError, match=r"cdf; got MultivariateNormal"):
        d.from_uniform(torch.rand(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="between 0 and 1"):
        real()().from_uniform(torch.full((4,), 1.5, dtype=torch.float64))


def test_order_ensemble_is_the_mixture_over_orders():
    orders = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]])
    for net in (conditioners.MADE(6, 1, hidden=(16,), context=2), conditioners.NADE(6, 1, hidden=8, context=2)):
        model = built(gx.Autoregressive(net, heads.Bernoulli(), (6,)))
        ensemble = gx.OrderEnsemble(model, orders).eval()
        d = ensemble(CONTEXT)
        support = d.enumerate_support(expand=False)
        parts = []
        for order in orders:
            under = AutoregressiveDistribution(net.permuted(order), heads.Bernoulli(), (6,), CONTEXT, order=order)
            parts.append(under.log_prob(support))
        parts = torch.stack(parts)
        assert (parts[0] - parts[1]).abs().max() > 0.01
        torch.testing.assert_close(d.log_prob(support), parts.logsumexp(0) - math.log(3))
        torch.testing.assert_close(d.log_prob(support).logsumexp(0), torch.zeros(3, dtype=torch.float64))
        p = d.log_prob(support).exp()
        torch.testing.assert_close(d.entropy(), -(p * p.log()).sum(0))
        torch.testing.assert_close(d.mean, (p[..., None] * support).sum(0))
        assert torch.equal(d.mode, support[p.argmax(0), 0])
        torch.manual_seed(0)
        y = d.sample((4000,))
        p = d.log_prob(support).exp()
        frequencies = (y[:, None] == support).all(-1).double().mean(0)
        assert ((frequencies - p).abs() < 5 * (p / 4000).sqrt() + 1e-3).all()
        ensemble.train()
        seen = {round(ensemble(CONTEXT).log_prob(support[7])[0].item(), 9) for _ in range(40)}
        assert seen == {round(lp.item(), 9) for lp in parts[:, 7, 0]}


def test_order_ensemble_of_columns():
    """Each column keeps its head wherever an order puts it."""
    head = heads.PerSite([heads.Bernoulli(), heads.Normal(), heads.Gamma()])
    model = built(gx.Autoregressive(conditioners.MADE(3, head.num_params, hidden=(9,)), head, (3,)))
    orders = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    ensemble = gx.OrderEnsemble(model, orders).eval()
    y = torch.tensor([[1.0, -0.5, 2.0], [0.0, 1.5, 0.3]], dtype=torch.float64)
    total = 0.0
    for order in orders:
        net, visited = model.conditioner.permuted(order), y[:, order]
        phi = net(visited)
        for i, variable in enumerate(order.tolist()):
            one = head.heads[variable]
            total = total + one(phi[:, i : i + 1, : one.num_params]).log_prob(visited[:, i : i + 1])[:, 0]
    d = ensemble()
    parts = torch.stack([c.log_prob(y) for c in d.components])
    torch.testing.assert_close(parts.sum(0), total)
    torch.testing.assert_close(d.log_prob(y), parts.logsumexp(0) - math.log(3))
    assert d.support.check(d.sample((50,))).all()


def test_an_ensemble_in_use_follows_its_weights():
    """Like other distributions here: all weights as they are now, gradients in the mode of the use, as often as wanted."""
    ensemble = gx.OrderEnsemble(binary(context=0), torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])).eval()
    y = torch.ones(6, dtype=torch.float64)
    with torch.no_grad():
        d = ensemble()
        before = d.log_prob(y)
        for p in ensemble.parameters():
            p.add_(0.5)
    for _ in range(2):
        torch.testing.assert_close(d.log_prob(y), ensemble().log_prob(y))
        d.log_prob(y).backward()
    assert (d.log_prob(y) - before).abs() > 0.01 and all(p.grad is not None for p in ensemble.parameters())


def test_validation_is_scored_under_the_first_orders():
    orders = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]])
    model = binary(context=0)
    ensemble = gx.OrderEnsemble(model, orders, validation=2)
    x = torch.bernoulli(torch.full((64, 6), 0.3, dtype=torch.float64))
    result = gx.fit(ensemble, x, validation=x, epochs=2, progress=False)
    first = gx.OrderEnsemble(model, orders[:2]).eval()().log_prob(x).mean()
    assert result.best_epoch == 1 and result.validation[-1] == pytest.approx(first.item(), abs=1e-9)
    assert len(ensemble.eval()().components) == 3 and len(ensemble.for_validation().eval()().components) == 2


def test_the_number_of_sites_at_the_call():
    net, head = conditioners.Recurrent((2,), 4, hidden=5, context=gx.Steps(3)), heads.Normal((2,))
    model = built(gx.Autoregressive(net, head, (6, 2)))
    context = torch.randn(5, 4, 3, dtype=torch.float64)
    d = model(context, lengths=torch.tensor([4, 2, 0, 1, 3]), num_sites=4)
    y = d.sample()
    other = gx.Autoregressive(net, head, (4, 2))(context, lengths=torch.tensor([4, 2, 0, 1, 3]))
    assert d.event_shape == (4, 2) and torch.equal(d.log_prob(y), other.log_prob(y))
    assert model.condition(context, num_sites=4).event_shape == (4, 2)
    for wrong, number, message in (
        (model, 0, "num_sites to be"),
        (binary(ORDER), 4, "num_sites=None for a model with an order; got 4"),
        (binary(), 4, "event_shape of 6 sites"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong(context if wrong is model else CONTEXT, num_sites=number)


def test_order_ensemble_refuses():
    model = gx.Autoregressive(conditioners.Recurrent((), 1), heads.Bernoulli(), (6,))
    with pytest.raises(ValueError, match=r"weights belong to variables; got Recurrent"):
        gx.OrderEnsemble(model, 2)
    with pytest.raises(ValueError, match=r"autoregressive\.order == None"):
        gx.OrderEnsemble(binary(ORDER), 2)
    with pytest.raises(ValueError, match=r"permutation of 0 ... 5"):
        gx.OrderEnsemble(binary(), torch.zeros(2, 6, dtype=torch.long))


def test_nested_chain_rules():
    inner = gx.Autoregressive(conditioners.NADE(3, 1, context=4, hidden=6), heads.Bernoulli(), (3,))
    head = heads.ConditionalHead(inner)
    outer = built(gx.Autoregressive(conditioners.Recurrent((3,), 4, hidden=5), head, (2, 3)))
    d = outer()
    support = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6).reshape(64, 2, 3)
    torch.testing.assert_close(d.log_prob(support).logsumexp(0), torch.zeros((), dtype=torch.float64))
    phi = outer.conditioner(support)
    expected = sum(inner(phi[:, t]).log_prob(support[:, t]) for t in range(2))
    torch.testing.assert_close(d.log_prob(support), expected)
    assert torch.equal(d.enumerate_support(), support)
    assert all(p.grad is not None for p in outer.parameters() if [d.log_prob(support).sum().backward()])


def test_conditional_gaussian_by_hand():
    head = heads.MultivariateNormal(2)
    model = built(gx.Conditional(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, head.num_params)), head))
    x, y = sized(5, 3), sized(5, 2, seed=1)
    d = model(x)
    phi = model.network(x)
    inner = head(phi)
    expected = torch.distributions.MultivariateNormal(inner.loc, scale_tril=inner.scale_tril).log_prob(y)
    torch.testing.assert_close(d.log_prob(y), expected)
    assert d.batch_shape == (5,) and model.context == 3 and model(x[0]).batch_shape == ()


def test_conditional_refuses():
    with pytest.raises(ValueError, match=r"outputs \(\*batch, 2\) \(num_params of the head\); got \(5, 4\)"):
        gx.Conditional(nn.Linear(3, 4), heads.Normal())(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="does not begin with a linear layer"):
        gx.Conditional(nn.Tanh(), heads.Normal())
    with pytest.raises(ValueError, match=r"context.shape\[-1\] == 3"):
        gx.Conditional(nn.Linear(3, 2), heads.Normal())(torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("head", "outside"), [(heads.VonMises, 7.0), (heads.Gamma, -1.0), (heads.Poisson, 0.5), (heads.Exponential, -1.0)]
)
def test_conditional_outside_the_support(head, outside):
    head = head()
    d = built(gx.Conditional(nn.Linear(3, head.num_params), head))(sized(5, 3))
    y = torch.tensor(outside, dtype=torch.float64)
    with pytest.raises(ValueError, match="support"):
        d.log_prob(y)
    with pyro.validation_enabled(False):
        assert (d.log_prob(y) == -math.inf).all()
        assert d.log_prob(d.sample((7,))).isfinite().all()


def test_conditional_is_of_its_family():
    head = heads.Normal(shape=(2,))
    d = built(gx.Conditional(nn.Linear(3, head.num_params), head))(sized(5, 3))
    plain = head(built(gx.Conditional(nn.Linear(3, head.num_params), head)).network(sized(5, 3)))
    assert isinstance(d, pyro.distributions.Independent)
    other = pyro.distributions.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    torch.testing.assert_close(
        torch.distributions.kl_divergence(d, other), torch.distributions.kl_divergence(plain, other)
    )
    wide, y = d.expand((4, 5)), sized(4, 5, 2)
    assert wide.batch_shape == (4, 5) and type(wide) is type(d)
    torch.testing.assert_close(wide.log_prob(y), plain.expand((4, 5)).log_prob(y))
    with torch.no_grad():
        d = built(gx.Conditional(nn.Linear(3, head.num_params), head))(sized(5, 3))
    for same in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        torch.testing.assert_close(same.log_prob(y), d.log_prob(y))


@pytest.mark.parametrize("head", [heads.Normal, heads.StudentT])
def test_conditional_with_reparam(head):
    """Pyro's strategies make another distribution of the family from its parameters."""
    head = head()
    model = built(gx.Conditional(nn.Linear(3, head.num_params), head))
    x = sized(3)

    def site():
        return pyro.sample("z", model(x))

    for config in (LocScaleReparam(0.5), AutoReparam()):
        wrapped = pyro.poutine.reparam(site, config={"z": config} if isinstance(config, LocScaleReparam) else config)
        trace = pyro.poutine.trace(wrapped).get_trace()
        assert trace.nodes["z"]["value"].isfinite() and any("decentered" in name for name in trace.nodes)


@pytest.mark.parametrize("net", PAIRED)
@pytest.mark.parametrize("head", ["Bernoulli", "Categorical", "Normal", "Mixture"])
def test_the_same_seed_gives_what_running_the_network_again_gives(head, net):
    model = paired(head, net)
    torch.manual_seed(5)
    y = model().sample((6,))
    torch.manual_seed(5)
    again = torch.zeros_like(y)
    with torch.no_grad():
        for t in range(4):
            again[:, t : t + 1] = model.head(model.conditioner(again)[:, t : t + 1], t).sample()
    assert torch.equal(y, again) or torch.allclose(y, again, rtol=1e-12, atol=0)


def test_copies_on_a_graph():
    """A head that has weights makes tensors of a graph, which are not kept."""
    inner = gx.Conditional(nn.Linear(3, 2), heads.Normal())
    d = real(head=heads.ConditionalHead(inner), sites=2)()
    y = d.rsample((3,))
    assert torch.equal(copy.deepcopy(d).log_prob(y), d.log_prob(y))


def test_prefixes_under_vmap():
    model, y = binary(context=0), torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double()
    rest = torch.ones(4, dtype=torch.float64)
    rows = torch.func.vmap(lambda prefix: model().conditional_on_prefix(prefix).log_prob(rest))(y)
    torch.testing.assert_close(rows, model().conditional_on_prefix(y).log_prob(rest))


@pytest.mark.parametrize(
    "net", [conditioners.MADE(5, 2, hidden=()), conditioners.Markov((), 2, order=1, hidden=())], ids=["sweep", "graph"]
)
@pytest.mark.parametrize("growth", [3.0, 300.0])
def test_gradients_of_draws_beside_padding_that_would_grow(net, growth):
    """A site is about the exponential of so many times those before: the third or second is beyond all numbers."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()[::2] = growth if p.dim() == 2 else 0.0
    d = gx.Autoregressive(net, heads.LogNormal(), (5,))(lengths=torch.tensor([1, 0]))
    torch.manual_seed(0)
    y = d.rsample((20,))
    assert (y[..., 1:] == 0).all() and (y[:, 0, 0] > 0).all()
    for grad in torch.autograd.grad(y.log1p().sum(), list(net.parameters())):
        assert grad.isfinite().all()
