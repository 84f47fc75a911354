"""Autoregressive models at ``pyro.sample`` sites, against hand enumeration, quadrature and plain Pyro models."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
    infer_discrete,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from registry import built, sized
from test_pyro import close, params_of
from torch import nn
from torch.func import functional_call

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.distributions import AutoregressiveDistribution

T, C, ROWS = 3, 2, 4
NETS = {
    "made": lambda params, context=C: conditioners.MADE(
        T, params, context=context, hidden=(8, 6), activation=torch.tanh
    ),
    "nade": lambda params, context=C: conditioners.NADE(T, params, context=context, hidden=5),
    "recurrent": lambda params, context=C: conditioners.Recurrent((), params, context=context, hidden=5),
}
HEADS = {"Bernoulli": heads.Bernoulli, "Normal": heads.Normal, "LogNormal": heads.LogNormal}
X = sized(ROWS, C, seed=1)
nets = pytest.mark.parametrize("net", NETS)


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def build(net, head="Bernoulli", context=C, seed=0):
    torch.manual_seed(seed)
    head = HEADS[head]()
    return built(gx.Autoregressive(NETS[net](head.num_params, context), head, (T,)))


def call(model, x=X):
    return model(x) if model.context else model()


def phi_by_hand(model, w, y, x=None):
    """(*batch, T, P) from values (*batch, T): the network in plain tensor operations; no code of the package runs."""
    net, sites = model.conditioner, model.conditioner.num_sites or T
    w = {name.removeprefix("conditioner."): value for name, value in w.items()}
    if isinstance(net, conditioners.MADE):
        h = y
        for i, layer in enumerate(net.layers):
            h = h @ (w[f"layers.{i}.weight"] * layer.mask).T + w[f"layers.{i}.bias"]
            h = h if x is None else h + x @ w[f"layers.{i}.context_weight"].T
            h = h.tanh() if i + 1 < len(net.layers) else h
        return h.unflatten(-1, (sites, -1))
    phis = []
    if isinstance(net, conditioners.NADE):
        total = w["hidden_bias"] if x is None else w["hidden_bias"] + x @ w["hidden_context"].T
        for t in range(T):
            phi = torch.sigmoid(total) @ w["readout"][t] + w["bias"][t]
            phis.append(phi if x is None else phi + x @ w["readout_context"][t])
            total = total + y[..., t, None] * w["weight"][t]
    else:
        h, read = y.new_zeros(*y.shape[:-1], net.hidden), w["begin"].expand(*y.shape[:-1], 1)
        for t in range(T):
            if x is not None:
                now = x[..., t, :] if isinstance(net.context, gx.Steps) else x
                read = torch.cat([read, now.expand(*read.shape[:-1], C)], -1)
            a = (read @ w["rnn.weight_ih_l0"].T + w["rnn.bias_ih_l0"]).chunk(3, -1)
            b = (h @ w["rnn.weight_hh_l0"].T + w["rnn.bias_hh_l0"]).chunk(3, -1)
            r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
            h = (1 - z) * torch.tanh(a[2] + r * b[2]) + z * h
            phis.append(h @ w["last.weight"].T + w["last.bias"])
            read = y[..., t, None]
    return torch.stack(torch.broadcast_tensors(*phis), -2)


def family_by_hand(model, phi):
    name = model.head.name
    if name == "Bernoulli":
        return dist.Bernoulli(logits=phi[..., 0])
    return getattr(dist, name)(phi[..., 0], scale_of(phi[..., 1], name))


def scale_of(raw, name):
    bound = 4 if name == "LogNormal" else 10
    return (bound * torch.tanh(raw / bound)).exp()


def sites_by_hand(model, y, x=None, w=None):
    """log p of each site, (*batch, T)."""
    x = x if model.context else None
    dims = 2 if isinstance(model.context, gx.Steps) else 1
    shape = torch.broadcast_shapes(y.shape[:-1], () if x is None else x.shape[:-dims])
    y = y.expand(*shape, T)
    return family_by_hand(model, phi_by_hand(model, params_of(model) if w is None else w, y, x)).log_prob(y)


def by_hand(model, y, x=None, w=None):
    return sites_by_hand(model, y, x, w).sum(-1)


ORDERS = torch.tensor([[0, 1, 2], [2, 0, 1]])


def ensemble_by_hand(model, y, x):
    """The mixture over ORDERS of a NADE, whose weights go with their variables."""
    parts = []
    for order in ORDERS:
        w = {k: v[order] if "hidden" not in k else v for k, v in params_of(model).items()}
        parts.append(by_hand(model, y[..., order], x, w))
    return torch.stack(parts).logsumexp(0) - math.log(len(ORDERS))


def binaries(n=T):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * n)


def normal(loc, scale=1.0):
    return dist.Normal(loc, torch.tensor(scale, dtype=torch.float64))


def has_frequencies(y, values, p):
    """Draws y (n, *batch, T) take the values (N, *batch, T) as often as their probabilities (N, *batch) say."""
    n = len(y)
    frequencies = (y[:, None] == values).all(-1).double().mean(0)
    assert ((frequencies - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def draws(model, rows=ROWS, seed=3):
    torch.manual_seed(seed)
    return call(model).sample() if model.context else model().sample((rows,))


def same_loss_and_gradient(objective, model, guide, truth, params, tol=1e-9):
    """loss_and_grads of an objective against a loss by hand."""
    for p in params:
        p.grad = None
    assert objective.loss(model, guide) == pytest.approx(truth.item(), abs=tol)
    assert objective.loss_and_grads(model, guide) == pytest.approx(truth.item(), abs=tol)
    expected = torch.autograd.grad(truth, params, allow_unused=True, materialize_grads=True)
    assert sum(g.abs().sum() for g in expected) > 0
    for p, g in zip(params, expected, strict=True):
        close(torch.zeros_like(p) if p.grad is None else p.grad, g, tol)


# The densities by hand, which all that follows rests on.


@nets
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("context", [0, C])
def test_log_density_by_hand(net, head, context):
    model = build(net, head, context)
    y = call(model).sample((30,))
    sites = sites_by_hand(model, y, X)
    close(call(model).log_prob(y), sites.sum(-1))
    close(call(model).log_prob_sites(y), sites)
    assert sites.std(0).min() > 1e-2  # far from a constant


# Enumeration.

Y = sized(ROWS, seed=2)
W = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def mixture_model(model, enumerate_=None):
    """z_n ~ model(x_n), y_n ~ N(w z_n + b, 1/2)."""

    def f():
        pyro.module("net", model)
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", call(model), infer={"enumerate": enumerate_} if enumerate_ else {})
            pyro.sample("y", normal(z @ W, 0.5), obs=Y)

    return f


def mixture_by_hand(model, theta=0.0):
    z = binaries()[:, None]
    return (by_hand(model, z, X) + normal(z @ W + theta, 0.5).log_prob(Y)).logsumexp(0).sum()


def nothing():
    pass


@nets
@pytest.mark.parametrize("context", [0, C])
def test_parallel_enumeration_is_the_exact_marginal(net, context):
    model = build(net, context=context)
    params, truth = list(model.parameters()), -mixture_by_hand(model)
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    same_loss_and_gradient(objective, mixture_model(model, "parallel"), nothing, truth, params)
    configured = config_enumerate(mixture_model(model), default="parallel")
    same_loss_and_gradient(objective, configured, nothing, -mixture_by_hand(model), params)


def test_enumeration_equals_that_of_the_sites_one_by_one_in_plain_pyro():
    """The vector site of 8 values, and three Bernoulli sites in a chain."""
    model = build("nade")
    w = params_of(model)

    def plain():
        with pyro.plate("data", ROWS):
            y = [torch.zeros((), dtype=torch.float64)] * T
            for t in range(T):
                shape = torch.broadcast_shapes(*[v.shape for v in y], (ROWS,))
                history = torch.stack([v.expand(shape) for v in y], -1)
                logits = phi_by_hand(model, w, history, X)[..., t, 0]
                y[t] = pyro.sample(f"z{t}", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
            z = torch.stack(torch.broadcast_tensors(*y), -1)
            pyro.sample("y", normal(z @ W, 0.5), obs=Y)

    objective = TraceEnum_ELBO(max_plate_nesting=1)
    truth = objective.differentiable_loss(plain, nothing)
    same_loss_and_gradient(objective, mixture_model(model, "parallel"), nothing, truth, list(model.parameters()))


def test_enumeration_beside_a_guide_of_another_variable():
    model = build("made")

    def f():
        pyro.module("net", model)
        theta = pyro.sample("theta", normal(torch.zeros((), dtype=torch.float64)))
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", model(X), infer={"enumerate": "parallel"})
            pyro.sample("y", normal(z @ W + theta, 0.5), obs=Y)

    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def guide():
        pyro.sample("theta", normal(loc, 0.2))

    torch.manual_seed(5)
    theta = loc + 0.2 * torch.randn((), dtype=torch.float64)
    elbo = mixture_by_hand(model, theta) + normal(0.0).log_prob(theta) - normal(loc, 0.2).log_prob(theta)
    params = [loc, *model.parameters()]
    expected = torch.autograd.grad(-elbo, params)
    torch.manual_seed(5)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(f, guide)
    assert loss == pytest.approx(-elbo.item(), abs=1e-9)
    for p, g in zip(params, expected, strict=True):
        close(p.grad, g, 1e-9)
    # an automatic guide leaves the enumerated site out by itself
    auto = AutoDelta(poutine.block(f, hide=["z"]), init_loc_fn=init_to_value(values={"theta": theta.detach()}))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(f, auto)
    joint = mixture_by_hand(model, theta) + normal(0.0).log_prob(theta)
    assert loss == pytest.approx(-joint.item(), abs=1e-9)


def chain_of_two(a, b):
    """u_n ~ a(x_n) of 3 binary sites, v_n ~ b(u_n) of 2 sites in {0, 1, 2}, y_n ~ N(w u_n + v_1 - v_2, 1/2)."""

    def f():
        pyro.module("a", a), pyro.module("b", b)
        with pyro.plate("data", ROWS):
            u = pyro.sample("u", a(X), infer={"enumerate": "parallel"})
            v = pyro.sample("v", b(u), infer={"enumerate": "parallel"})
            pyro.sample("y", normal(u @ W + v[..., 0] - v[..., 1], 0.5), obs=Y)

    return f


def test_two_dependent_enumerated_sites():
    a = build("made")
    torch.manual_seed(2)
    b = built(gx.Autoregressive(conditioners.MADE(2, 3, site=3, context=T, hidden=(7,)), heads.Categorical(3), (2,)))
    total = []
    for u in binaries():
        for v in torch.cartesian_prod(torch.arange(3), torch.arange(3)):
            # two sites of one network by hand: the second reads the first one-hot
            (one, two), one_hot = b.conditioner.layers, nn.functional.one_hot(v, 3).double().flatten()
            h = (u @ one.context_weight.T + one.bias + one_hot @ (one.weight * one.mask).T).relu()
            logits = (h @ (two.weight * two.mask).T + u @ two.context_weight.T + two.bias).unflatten(-1, (2, 3))
            log_v = logits.log_softmax(-1)[torch.arange(2), v].sum()
            total.append(by_hand(a, u, X) + log_v + normal(u @ W + v[0] - v[1], 0.5).log_prob(Y))
    truth = -torch.stack(total).logsumexp(0).sum()
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    same_loss_and_gradient(objective, chain_of_two(a, b), nothing, truth, [*a.parameters(), *b.parameters()])


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_an_enumerated_guide_gives_the_exact_elbo(how):
    prior, q = build("nade", context=0), build("made", seed=4)
    rows = ROWS if how == "parallel" else 1  # in sequence, all 8^rows joint values are visited

    def f():
        pyro.module("prior", prior)
        with pyro.plate("data", rows):
            z = pyro.sample("z", prior())
            pyro.sample("y", normal(z @ W, 0.5), obs=Y[:rows])

    def guide():
        pyro.module("q", q)
        with pyro.plate("data", rows):
            pyro.sample("z", q(X[:rows]), infer={"enumerate": how})

    z = binaries()[:, None]
    log_q, log_p = by_hand(q, z, X[:rows]), by_hand(prior, z) + normal(z @ W, 0.5).log_prob(Y[:rows])
    truth = (log_q.exp() * (log_q - log_p)).sum()
    params = [*prior.parameters(), *q.parameters()]
    same_loss_and_gradient(TraceEnum_ELBO(max_plate_nesting=1), f, guide, truth, params)


@pytest.mark.parametrize("kind", ["ensemble", "conditional", "categorical"])
def test_other_modules_are_enumerated_too(kind):
    torch.manual_seed(1)
    if kind == "ensemble":
        model = gx.OrderEnsemble(build("nade"), ORDERS).eval()
        values = binaries()
    elif kind == "conditional":
        model = built(gx.Conditional(nn.Linear(C, 4), heads.Categorical(4)))
        values = torch.arange(4)
    else:
        net = conditioners.Recurrent(3, 3, hidden=4, context=C)
        model = built(gx.Autoregressive(net, heads.Categorical(3), (2,)))
        values = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    read = (lambda z: z.double()) if kind == "conditional" else (lambda z: z.double() @ W[: values.shape[-1]])

    def f():
        pyro.module("net", model)
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", model(X), infer={"enumerate": "parallel"})
            pyro.sample("y", normal(read(z), 0.5), obs=Y)

    if kind == "conditional":
        log_p = (X @ model.network.weight.T + model.network.bias).log_softmax(-1).T
    elif kind == "ensemble":
        log_p = ensemble_by_hand(model.autoregressive, values[:, None], X)
    else:  # one row and value at a time, by the conditioner's parameters
        log_p = torch.stack(
            [
                torch.stack(
                    [model.conditioner(v[None], x[None])[0].log_softmax(-1)[torch.arange(2), v].sum() for x in X]
                )
                for v in values
            ]
        )
    close(log_p.logsumexp(0), torch.zeros(ROWS, dtype=torch.float64))
    mean = torch.stack([read(v) for v in values])[:, None]
    truth = -(log_p + normal(mean, 0.5).log_prob(Y)).logsumexp(0).sum()
    same_loss_and_gradient(TraceEnum_ELBO(max_plate_nesting=1), f, nothing, truth, list(model.parameters()))


def test_particles_of_a_continuous_guide_beside_enumeration():
    model = build("nade")

    def f():
        theta = pyro.sample("theta", normal(torch.zeros((), dtype=torch.float64)))
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", model(X), infer={"enumerate": "parallel"})
            pyro.sample("y", normal(z @ W + theta, 0.5), obs=Y)

    def guide():
        pyro.sample("theta", normal(torch.tensor(0.3, dtype=torch.float64), 0.2))

    torch.manual_seed(5)
    loss = TraceEnum_ELBO(4, vectorize_particles=True, max_plate_nesting=1).loss(f, guide)
    torch.manual_seed(5)
    theta = 0.3 + 0.2 * torch.randn(4, 1, dtype=torch.float64)
    elbos = [
        mixture_by_hand(model, t) + normal(0.0).log_prob(t) - normal(0.3, 0.2).log_prob(t) for t in theta.flatten()
    ]
    assert loss == pytest.approx(-torch.stack(elbos).mean().item(), abs=1e-9)


def test_nuts_sums_over_enumerated_sites():
    """The potential of theta, with z summed out."""
    model = build("made").requires_grad_(False)

    def f():
        theta = pyro.sample("theta", normal(torch.zeros((), dtype=torch.float64)))
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", model(X), infer={"enumerate": "parallel"})
            pyro.sample("y", normal(z @ W + theta, 0.5), obs=Y)

    kernel = NUTS(f, max_plate_nesting=1)
    kernel.setup(1)
    assert set(kernel.initial_params) == {"theta"}
    for value in (-1.0, 0.4):
        theta = torch.tensor(value, dtype=torch.float64)
        truth = mixture_by_hand(model, theta) + normal(0.0).log_prob(theta)
        assert kernel.potential_fn({"theta": theta}).item() == pytest.approx(-truth.item(), abs=1e-9)


def by_index(model):
    """The same model with the index of z as its site: Pyro's ``infer_discrete`` and marginals take scalar sites only."""

    def f():
        with pyro.plate("data", ROWS):
            d = model(X)
            support = d.enumerate_support(expand=False)
            k = pyro.sample("k", dist.Categorical(logits=d.log_prob(support).T), infer={"enumerate": "parallel"})
            z = support.squeeze(1)[k]
            pyro.sample("y", normal(z @ W, 0.5), obs=Y)
            return z

    return f


def posterior_of_z(model):
    z = binaries()[:, None]
    return (by_hand(model, z, X) + normal(z @ W, 0.5).log_prob(Y)).softmax(0)  # (8, ROWS)


@pytest.mark.parametrize("temperature", [0, 1])
def test_infer_discrete_of_the_index(temperature):
    model = build("nade").requires_grad_(False)
    f, p = by_index(model), posterior_of_z(model)
    decoded = infer_discrete(f, first_available_dim=-2, temperature=temperature)
    if temperature == 0:
        assert torch.equal(decoded(), binaries()[p.argmax(0)])
        return
    z = torch.stack([decoded() for _ in range(400)])
    has_frequencies(z, binaries()[:, None], p)
    marginal = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(f, nothing)["k"]
    close(marginal.probs.T, p)


# NUTS: posterior moments against Gauss-Legendre quadrature of the density by hand.


def legendre(n, low, high):
    """Nodes and weights of n-point Gauss-Legendre quadrature, by the eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))
    return low + (nodes + 1) / 2 * (high - low), vectors[0] ** 2 * (high - low)


def grid(*axes):
    """All points (N, D) of a product of rules, and their weights (N,)."""
    points = torch.cartesian_prod(*[nodes for nodes, _ in axes])
    weights = torch.cartesian_prod(*[weights for _, weights in axes]).prod(-1)
    return points, weights


def moments(values, log_density, weights):
    """Mean and covariance (D, D) of values (N, D) under an unnormalised density."""
    p = (log_density.exp() * weights).detach()
    p = p / p.sum()
    mean = p @ values
    return mean, (p[:, None] * (values - mean)).T @ (values - mean)


def nuts(model, samples=40, warmup=25):
    """Draws of z by a short chain, whose posteriors have much the same scale in every coordinate."""
    kernel = NUTS(model, step_size=0.3, adapt_mass_matrix=False, max_tree_depth=3)
    mcmc = MCMC(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()["z"]


def agrees(z, mean, cov):
    """Draws (..., D) whose law has this mean and covariance: whitened, within Monte Carlo error."""
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (z - mean).flatten(0, -2).T, upper=False)
    n = white.shape[1]
    assert white.mean(1).abs().max() < 5 / n**0.5
    assert (torch.cov(white) - torch.eye(len(cov), dtype=torch.float64)).abs().max() < 8 / n**0.5


REPLICATES = 25  # independent rows of one plate with the same data: as many chains in one


def observe(d, mean, y, scale):
    """z_n ~ d, y ~ N(mean(z_n), scale) in a plate of replicates."""

    def f():
        with pyro.plate("replicates", REPLICATES):
            z = pyro.sample("z", d() if callable(d) else d)
            pyro.sample("y", normal(mean(z), scale).to_event(1), obs=y.expand(REPLICATES, -1))

    return f


def smooth(model):
    """Smaller weights: a density that few nodes integrate well, and short chains explore."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.6)
    return model.requires_grad_(False)


def converged(make, tol=2e-3):
    """The moments of make(n) with n nodes an axis, which agree with those of fewer."""
    fine, coarse = make(28), make(22)
    for a, b in zip(fine, coarse, strict=True):
        torch.testing.assert_close(a, b, atol=tol, rtol=0)
    return fine


@pytest.mark.parametrize("net, head", [("made", "Normal"), ("recurrent", "LogNormal"), ("nade", "Normal")])
def test_nuts_over_continuous_sites(net, head):
    model = smooth(build(net, head, context=0))
    y = torch.tensor([0.4, -0.6, 0.8], dtype=torch.float64)
    positive = head == "LogNormal"
    z = nuts(observe(model, torch.log if positive else (lambda z: z), y, 0.5))
    assert z.shape == (40, REPLICATES, T)

    def truth(n):
        points, weights = grid(*[legendre(n, v - 2.8, v + 2.8) for v in y.tolist()])
        values = points.exp() if positive else points
        log_density = by_hand(model, values) + normal(points, 0.5).log_prob(y).sum(-1)
        return moments(points, log_density + points.sum(-1) * positive, weights)  # dz = z d(log z)

    agrees(z.log() if positive else z, *converged(truth))


@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_nuts_over_sites_of_several_supports(order):
    """A real, a positive and a unit-interval site, through the joint constraint, visited in any order."""
    torch.manual_seed(1)
    head = heads.PerSite([heads.Normal(), heads.LogNormal(), heads.Beta()])
    net = conditioners.MADE(T, 2, hidden=(8,), activation=torch.tanh)
    model = smooth(built(gx.Autoregressive(net, head, (T,), order)))
    where = torch.tensor(order or [0, 1, 2])
    y = torch.tensor([0.5, 0.2, 0.6], dtype=torch.float64)  # of the visited sites

    def log_prior(v):  # in visiting order
        phi = phi_by_hand(model, params_of(model), v)
        a, b = phi[..., 0], (10 * torch.tanh(phi[..., 1] / 10)).exp()
        beta = dist.Beta((10 * torch.tanh(a[..., 2] / 10)).exp(), b[..., 2]).log_prob(v[..., 2])
        return (
            dist.Normal(a[..., 0], b[..., 0]).log_prob(v[..., 0])
            + dist.LogNormal(a[..., 1], scale_of(phi[..., 1, 1], "LogNormal")).log_prob(v[..., 1])
            + beta
        )

    def mean(z):  # positive site by its logarithm, the unit interval by its logit
        v = z[..., where]
        return torch.stack([v[..., 0], v[..., 1].log(), v[..., 2].logit()], -1)

    d = model()
    value = torch.empty(4, T, dtype=torch.float64)
    value[:, where] = torch.tensor([[-1.0, 0.3, 0.2]], dtype=torch.float64) + sized(4, T).abs() / 10
    close(d.log_prob(value), log_prior(value[:, where]))
    z = nuts(observe(model, mean, y, 0.5))
    assert d.support.check(z).all()

    def truth(n):
        u, weights = grid(*[legendre(n, v - 2.8, v + 2.8) for v in y.tolist()])
        v = torch.stack([u[:, 0], u[:, 1].exp(), u[:, 2].sigmoid()], -1)
        jacobian = u[:, 1] + v[:, 2].log() + (1 - v[:, 2]).log()
        return moments(u, log_prior(v) + jacobian + normal(u, 0.5).log_prob(y).sum(-1), weights)

    agrees(mean(z), *converged(truth))


def test_nuts_over_points_of_a_simplex():
    """Two sites of three shares each: four free coordinates."""
    torch.manual_seed(1)
    net = conditioners.MADE(2, 3, site=(3,), hidden=(8,), activation=torch.tanh)
    model = smooth(built(gx.Autoregressive(net, heads.ContinuousCategorical(3), (2, 3))))
    y = torch.tensor([0.2, 0.5, 0.3, 0.6, 0.3, 0.1], dtype=torch.float64)

    def log_prior(z):  # (N, 2, 3); the normaliser as a divided difference of exp
        eta = phi_by_hand(model, params_of(model), z.flatten(-2))
        gaps = eta.unsqueeze(-1) - eta.unsqueeze(-2) + torch.eye(3, dtype=torch.float64)
        return ((eta * z).sum(-1) - (eta.exp() / gaps.prod(-1)).sum(-1).log()).sum(-1)

    close(model().log_prob(y.reshape(2, 3)), log_prior(y.reshape(1, 2, 3))[0])
    z = nuts(observe(model, lambda z: z.flatten(-2), y, 0.3))
    assert z.shape == (40, REPLICATES, 2, 3) and model().support.check(z).all()

    def truth(n):
        u, weights = grid(*[legendre(n // 2, 0.0, 1.0)] * 4)
        first, second = u[:, 0::2], (1 - u[:, 0::2]) * u[:, 1::2]  # Duffy's map of a square to a triangle
        p = torch.stack([first, second, 1 - first - second], -1)
        log_density = log_prior(p) + normal(p.flatten(1), 0.3).log_prob(y).sum(-1) + (1 - first).log().sum(-1)
        return moments(p[..., :2].flatten(1), log_density, weights)

    agrees(z[..., :2].flatten(-2), *converged(truth))


@pytest.mark.parametrize(
    "strategy", [init_to_feasible, init_to_mean, init_to_median, init_to_sample, init_to_uniform, "value"]
)
@pytest.mark.parametrize("head", ["LogNormal", "PerSite", "ContinuousCategorical"])
def test_initial_values_of_chains(strategy, head):
    torch.manual_seed(1)
    made = {
        "LogNormal": lambda: build("made", "LogNormal", context=0),
        "PerSite": lambda: built(
            gx.Autoregressive(conditioners.MADE(2, 2), heads.PerSite([heads.Normal(), heads.Beta()]), (2,), [1, 0])
        ),
        "ContinuousCategorical": lambda: built(
            gx.Autoregressive(conditioners.MADE(2, 3, site=(3,)), heads.ContinuousCategorical(3), (2, 3))
        ),
    }
    model = made[head]().requires_grad_(False)
    value = model().sample()
    chosen = init_to_value(values={"z": value}) if strategy == "value" else strategy
    kernel = NUTS(lambda: pyro.sample("z", model()), init_strategy=chosen)
    kernel.setup(warmup_steps=1)
    u = kernel.initial_params["z"]
    to_support = kernel.transforms["z"].inv
    z = to_support(u)
    assert model().support.check(z).all()
    if strategy == "value":
        close(z, value, 1e-7)
    log_joint = model().log_prob(z) + to_support.log_abs_det_jacobian(u, z).sum()
    assert kernel.potential_fn({"z": u}).item() == pytest.approx(-log_joint.item(), abs=1e-9)


# Weights with priors.


def with_priors(net, head="Normal", context=C):
    """A model whose every parameter is a PyroSample, and the plain copy that names and shapes are read from."""
    model, template = build(net, head, context), build(net, head, context)
    to_pyro_module_(model)
    for module in list(model.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(normal(torch.zeros_like(value.detach()), 0.5).to_event(value.dim())))
    return model, template


class Rows(PyroModule):
    """y_n ~ net(x_n), the weights drawn outside the plate."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, y=None):
        d = call(self.net)
        with pyro.plate("data", ROWS):
            return pyro.sample("y", d, obs=y)


def weights_of(trace, template, prefix="net."):
    return {name: trace.nodes[prefix + name]["value"] for name in params_of(template)}


def prior_by_hand(weights):
    return sum(normal(0.0, 0.5).log_prob(w).sum() for w in weights.values())


@nets
@pytest.mark.parametrize("head", ["Bernoulli", "Normal"])
@pytest.mark.parametrize("context", [0, C])
def test_weights_with_priors(net, head, context):
    model, template = with_priors(net, head, context)
    assert not list(model.parameters())
    y = draws(template)
    trace = poutine.trace(Rows(model)).get_trace(y)
    drawn = {name for name, site in trace.nodes.items() if site["type"] == "sample"} - {"y", "data"}
    assert drawn == {f"net.{name}" for name in params_of(template)}
    weights = weights_of(trace, template)
    close(trace.log_prob_sum(), prior_by_hand(weights) + by_hand(template, y, X, weights).sum())

    # the module's call is over, and the distribution keeps the weights of the trace
    d = trace.nodes["y"]["fn"]
    with poutine.trace() as later:
        close(d.log_prob(y), by_hand(template, y, X, weights))
        torch.manual_seed(1)
        a = d.sample((50,))
    assert not later.trace.nodes
    torch.manual_seed(1)
    b = functional_call(template, weights, (X,) if context else ()).expand((ROWS,)).sample((50,))
    assert torch.equal(a, b)
    # and draws have their law: the mean of the first site's sufficient statistic
    first = family_by_hand(template, phi_by_hand(template, weights, y, X if context else None))
    z = (d.sample((2000,)) - first.mean)[..., 0] / first.variance[..., 0].sqrt()
    assert z.mean(0).abs().max() < 5 / 2000**0.5


@nets
def test_weights_with_priors_conditioned_and_their_gradient(net):
    """The potential that NUTS over the weights sees."""
    model, template = with_priors(net)
    y = draws(template)
    u = {f"net.{k}": v.detach().clone().requires_grad_() for k, v in params_of(template).items()}
    f = Rows(model)
    joint = poutine.trace(poutine.condition(f, data=u)).get_trace(y).log_prob_sum()
    kernel = NUTS(f)
    kernel.setup(1, y)
    assert set(kernel.initial_params) == set(u)
    potential = kernel.potential_fn(u)
    plain = {k.removeprefix("net."): v for k, v in u.items()}
    truth = prior_by_hand(plain) + by_hand(template, y, X, plain).sum()
    close(joint, truth)
    close(potential, -truth)
    for a, b in zip(torch.autograd.grad(potential, u.values()), torch.autograd.grad(-truth, u.values()), strict=True):
        close(a, b)


@nets
def test_svi_and_predictive_over_weights(net):
    model, template = with_priors(net)
    f, y = Rows(model), draws(template) + 2
    guide = AutoNormal(f, init_scale=0.05)
    guide(y)  # makes its parameters
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(f, guide, y)
    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace(y)
    weights = weights_of(trace, template)
    store = pyro.get_param_store()
    log_q = sum(
        dist.Normal(store[f"AutoNormal.locs.net.{k}"], store[f"AutoNormal.scales.net.{k}"]).log_prob(w).sum()
        for k, w in weights.items()
    )
    truth = log_q - prior_by_hand(weights) - by_hand(template, y, X, weights).sum()
    assert loss == pytest.approx(truth.item(), abs=1e-9)

    svi = SVI(f, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(y) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 10 * 5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())
    out = Predictive(f, guide=guide, num_samples=30)()
    assert out["y"].shape == (30, ROWS, T)
    # each draw under its own weights: standard normal noise comes back
    noise = []
    for i, y in enumerate(out["y"]):
        w = {k: out[f"net.{k}"][i].reshape(v.shape) for k, v in params_of(template).items()}
        d = family_by_hand(template, phi_by_hand(template, w, y, X))
        noise.append((y - d.loc) / d.scale)
    noise = torch.stack(noise).flatten()
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5 and abs(noise.var() - 1) < 7 / len(noise) ** 0.5


@pytest.mark.parametrize("net", ["made", "nade"])
def test_log_density_of_many_weights_at_once(net):
    """``torch.func.vmap`` over draws of the weights, where ``Predictive(parallel=True)`` would need matrices of matrices."""
    template = build(net, "Normal")
    y = draws(template)
    many = {name: torch.stack([v, 0.5 * v, v + 0.1]).detach() for name, v in params_of(template).items()}
    with pyro.validation_enabled(False):
        got = torch.func.vmap(lambda w: functional_call(template, w, (X,)).log_prob(y))(many)
    expected = torch.stack([by_hand(template, y, X, {k: v[i] for k, v in many.items()}) for i in range(3)])
    close(got, expected.detach())


# Missing entries.

SEEN = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)  # the missing entries last
HOLES = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)


def factored(model, y, seen, d=None):
    def f():
        pyro.module("net", model)
        factors = (d or call(model)).log_prob_sites(torch.where(seen, y, 0.0))
        with pyro.plate("rows", ROWS, dim=-2), pyro.plate("sites", T, dim=-1), poutine.mask(mask=seen):
            pyro.factor("y", factors)

    return f


def marginal_by_hand(model, y, seen):
    """log p of the seen entries, by enumeration of the others, (ROWS,)."""
    z = binaries()[:, None]
    possible = ((z == y) | ~seen).all(-1)
    return torch.where(possible, by_hand(model, z, X), -torch.inf).logsumexp(0)


@nets
@pytest.mark.parametrize("seen", [SEEN, HOLES])
def test_masked_factors(net, seen):
    model = build(net)
    y = draws(model)
    trace = poutine.trace(factored(model, y, seen)).get_trace()
    trace.compute_log_prob()
    factors = sites_by_hand(model, torch.where(seen, y, 0.0), X)
    close(trace.nodes["y"]["log_prob"], factors * seen)
    exact = marginal_by_hand(model, y, seen).sum()
    if seen is HOLES:  # a hole before a seen entry would have to be summed over: factors alone are not the marginal
        assert (trace.log_prob_sum() - exact).abs() > 1e-3
        return
    close(trace.log_prob_sum(), exact)
    same_loss_and_gradient(Trace_ELBO(), factored(model, y, seen), nothing, -exact, list(model.parameters()))


def test_masked_factors_in_another_order():
    """In visiting order 2, 0, 1, an entry of site 1 that is missing is the last."""
    order = torch.tensor([2, 0, 1])
    model = build("made")
    d = AutoregressiveDistribution(model.conditioner, model.head, (T,), X, order=order)
    y = draws(model)
    seen = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    got = poutine.trace(factored(model, y, seen, d)).get_trace().log_prob_sum()
    close(got, marginal_by_hand(model, y[:, order], seen[:, order]).sum())


def test_holes_as_enumerated_sites():
    """Any pattern of missing entries, exactly: they are sites of their own, and the completed event is observed."""
    model = build("nade")
    y = draws(model)

    def f():
        pyro.module("net", model)
        with pyro.plate("rows", ROWS):
            parts = []
            for t in range(T):
                fair = dist.Bernoulli(torch.full((ROWS,), 0.5, dtype=torch.float64))
                z = pyro.sample(f"z{t}", fair, infer={"enumerate": "parallel"})
                # seen entries must be what they are; and the fair coin's factor is taken back
                pyro.factor(
                    f"seen{t}", math.log(2) + torch.where(HOLES[:, t] & (z != y[:, t]), -torch.inf, 0.0).double()
                )
                parts.append(z)
            pyro.sample("y", model(X), obs=torch.stack(torch.broadcast_tensors(*parts), -1))

    truth = -marginal_by_hand(model, y, HOLES).sum()
    same_loss_and_gradient(TraceEnum_ELBO(max_plate_nesting=1), f, nothing, truth, list(model.parameters()))


@nets
def test_completions_are_drawn_from_the_exact_conditional(net):
    model = build(net).requires_grad_(False)
    prefix = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)

    def f():
        with pyro.plate("rows", ROWS):
            rest = pyro.sample("rest", model(X).conditional_on_prefix(prefix))
        return torch.cat([prefix.expand(*rest.shape[:-1], 1), rest], -1)

    y = Predictive(f, num_samples=4000, parallel=True, return_sites=["rest", "_RETURN"])()["_RETURN"]
    assert y.shape == (4000, ROWS, T)
    z = binaries()[:, None]
    joint = torch.where((z[..., :1] == prefix).all(-1), by_hand(model, z, X), -torch.inf)
    p = joint.softmax(0)
    has_frequencies(y, z, p)


@pytest.mark.parametrize("net", ["made", "recurrent"])
def test_a_completion_enumerated_within_a_model(net):
    """y_2, y_3 are missing and a measurement depends on the whole row: seen factors, the rest enumerated."""
    model = build(net)
    prefix = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)

    def f():
        pyro.module("net", model)
        d = model(X)
        padded = nn.functional.pad(prefix, (0, T - 1))
        with pyro.plate("rows", ROWS):
            pyro.factor("seen", d.log_prob_sites(padded)[:, 0])
            rest = pyro.sample("rest", d.conditional_on_prefix(prefix), infer={"enumerate": "parallel"})
            row = torch.cat([prefix.expand(*rest.shape[:-2], ROWS, 1), rest.expand(*rest.shape[:-2], ROWS, 2)], -1)
            pyro.sample("y", normal(row @ W, 0.5), obs=Y)

    z = binaries()[:, None]
    joint = by_hand(model, z, X) + normal(z @ W, 0.5).log_prob(Y)
    truth = -torch.where(z[..., 0] == prefix[:, 0], joint, -torch.inf).logsumexp(0).sum()
    same_loss_and_gradient(TraceEnum_ELBO(max_plate_nesting=1), f, nothing, truth, list(model.parameters()))


# Handlers, plates, guides.

STEPS = sized(ROWS, T, C, seed=6)
LENGTHS = torch.tensor([3, 0, 2, 1])


def with_steps(head="Bernoulli"):
    torch.manual_seed(0)
    head = HEADS[head]()
    net = conditioners.Recurrent((), head.num_params, context=gx.Steps(C), hidden=5)
    return built(gx.Autoregressive(net, head, (T,)))


def lasting(y):
    return torch.arange(T) < LENGTHS[:, None]


CASES = {  # the distribution, and its log density by hand
    "context": lambda m: (lambda i: m(X[i]), lambda i, y: by_hand(m, y, X[i])),
    "none": lambda m: (lambda i: m(), lambda i, y: by_hand(m, y)),
    "lengths": lambda m: (
        lambda i: m(X[i], lengths=LENGTHS[i]),
        lambda i, y: (sites_by_hand(m, y, X[i]) * (torch.arange(T) < LENGTHS[i, None])).sum(-1),
    ),
    "steps": lambda m: (lambda i: m(STEPS[i]), lambda i, y: by_hand(m, y, STEPS[i])),
    "prefix": lambda m: (
        lambda i: m(X[i]).conditional_on_prefix(Y.sign().clamp(min=0)[i, None]),
        lambda i, y: sites_by_hand(
            m, torch.cat([Y.sign().clamp(min=0)[i, None].expand(*y.shape[:-1], 1), y], -1), X[i]
        )[..., 1:].sum(-1),
    ),
    "ensemble": lambda m: (
        lambda i: gx.OrderEnsemble(m, ORDERS).eval()(X[i]),
        lambda i, y: ensemble_by_hand(m, y, X[i]),
    ),
}


def case(name, head="Bernoulli"):
    """The module, its distribution of the rows i, and their log density by hand."""
    model = with_steps(head) if name == "steps" else build("nade", head, context=0 if name == "none" else C)
    return model, *CASES[name](model)


ALL = torch.arange(ROWS)
cases = pytest.mark.parametrize("name", CASES)


@cases
def test_subsampled_plate(name):
    model, make, truth = case(name)
    y, seen = make(ALL).expand((ROWS,)).sample(), []
    obs = torch.where(lasting(y), y, math.nan) if name == "lengths" else y  # padding is never looked at

    def f():
        pyro.module("net", model)
        with pyro.plate("data", ROWS, subsample_size=3) as index:
            seen.append(index)
            pyro.sample("y", make(index), obs=obs[index])

    loss = Trace_ELBO().loss_and_grads(f, nothing)
    expected = -truth(seen[-1], y[seen[-1]]).sum() * ROWS / 3
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    params = list(model.parameters())
    for p, g in zip(params, torch.autograd.grad(expected, params), strict=True):
        close(p.grad, g, 1e-9)
    # and the mean over subsamples is the whole
    whole = truth(ALL, y).sum()
    scaled = [poutine.trace(f).get_trace().log_prob_sum().item() for _ in range(100)]
    values = torch.tensor(scaled, dtype=torch.float64)
    assert abs(values.mean() - whole) < 5 * values.std() / 100**0.5 + 1e-9


@cases
def test_scale_mask_condition_block_replay(name):
    _, make, truth = case(name)
    d = make(ALL)
    y = d.expand((ROWS,)).sample()
    log_prob, keep = truth(ALL, y), torch.tensor([True, False, True, True])

    def f():
        with pyro.plate("data", ROWS):
            return pyro.sample("y", make(ALL))

    conditioned = poutine.condition(f, {"y": y})
    close(poutine.trace(conditioned).get_trace().log_prob_sum(), log_prob.sum())
    close(poutine.trace(poutine.scale(conditioned, 0.25)).get_trace().log_prob_sum(), 0.25 * log_prob.sum())
    close(poutine.trace(poutine.mask(conditioned, keep)).get_trace().log_prob_sum(), log_prob[keep].sum())
    assert "y" not in poutine.trace(poutine.block(f, hide=["y"])).get_trace().nodes
    drawn = poutine.trace(f).get_trace()
    replayed = poutine.trace(poutine.replay(f, drawn)).get_trace()
    assert replayed.nodes["y"]["value"] is drawn.nodes["y"]["value"]
    close(replayed.log_prob_sum(), truth(ALL, drawn.nodes["y"]["value"]).sum())
    # Pyro's distribution methods
    close(d.mask(keep).log_prob(y), log_prob * keep)
    close(d.to_event(0).log_prob(y), log_prob)
    rows = d.expand((ROWS,))
    for joint in (rows.to_event(1), torch.distributions.Independent(rows, 1)):
        close(joint.log_prob(y), log_prob.sum())
        assert joint.batch_shape == () and joint.sample().shape == y.shape
    close(dist.ExpandedDistribution(rows, (2, ROWS)).log_prob(y), log_prob.expand(2, ROWS))
    many = rows.expand_by((5,))
    assert many.batch_shape == (5, ROWS) and many.shape() == (5, *y.shape) == many.sample().shape
    assert d.shape((7,)) == d.sample((7,)).shape and d.shape() == d().shape and d.event_dim == 1
    torch.manual_seed(2)
    a = d()
    torch.manual_seed(2)
    assert torch.equal(a, d.sample())


@cases
def test_rows_of_an_outer_plate_are_drawn_afresh(name):
    """Frequencies over an outer plate against the density by hand."""
    _, make, truth = case(name)

    def f():
        with pyro.plate("outer", 3000, dim=-2), pyro.plate("data", ROWS, dim=-1):
            return pyro.sample("y", make(ALL))

    trace = poutine.trace(f).get_trace()
    trace.compute_log_prob()
    y = trace.nodes["y"]["value"]
    close(trace.nodes["y"]["log_prob"], truth(ALL, y))
    z = binaries(y.shape[-1])[:, None].expand(-1, ROWS, -1)
    p = truth(ALL, z).exp()
    if name == "lengths":  # padding is zeros: other values there are no outcomes
        p = p * ((z == 0) | lasting(z)).all(-1)
    close(p.sum(0), torch.ones_like(p[0]))
    has_frequencies(y, z, p)
    # the same by Predictive in parallel
    inner = Predictive(lambda: _plate(make), num_samples=3000, parallel=True)()["y"]
    has_frequencies(inner, z, p)
    assert Predictive(lambda: _plate(make), num_samples=2)()["y"].shape == (2, *y.shape[1:])


def _plate(make):
    with pyro.plate("data", ROWS):
        return pyro.sample("y", make(ALL))


def test_predictive_with_posterior_samples_in_the_context():
    model, w = build("made"), sized(2000, C)

    def f():
        x = pyro.sample("w", normal(torch.zeros(C, dtype=torch.float64)).to_event(1))
        with pyro.plate("data", 2):
            pyro.sample("y", model(x))

    out = Predictive(f, {"w": w[:, None]}, parallel=True)()["y"]
    assert out.shape == (2000, 2, T)
    p = by_hand(model, binaries()[:, None], w).exp().mean(1)
    has_frequencies(out.flatten(0, 1), binaries(), p)


@cases
def test_render_model_and_shapes(name):
    _, make, _ = case(name)
    source = pyro.render_model(lambda: _plate(make), render_distributions=True).source
    kind = "Mixture" if name == "ensemble" else "AutoregressiveDistribution"
    assert f"y ~ {kind}" in source
    trace = poutine.trace(lambda: _plate(make)).get_trace()
    trace.compute_log_prob()
    lines = {line.split()[0]: line.split()[1:] for line in trace.format_shapes().splitlines() if line.split()}
    assert lines["value"] == [str(ROWS), "|", str(T - (name == "prefix"))] and lines["log_prob"] == [str(ROWS), "|"]


@cases
def test_copies_of_the_distribution(name):
    _, make, truth = case(name)
    with torch.no_grad():  # tensors of a graph can't be copied, here as in other distributions
        d = make(ALL)
        y = d.expand((ROWS,)).sample()
        for other in (copy.copy(d), copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            close(other.log_prob(y), truth(ALL, y))
            torch.manual_seed(0)
            a = other.sample((3,))
            torch.manual_seed(0)
            assert torch.equal(a, d.sample((3,))) and other.support.check(a).all()


def test_which_are_enumerable():
    yes = {"context": True, "none": True, "lengths": False, "steps": True, "prefix": True, "ensemble": True}
    for name, expected in yes.items():
        d = case(name)[1](ALL)
        assert d.has_enumerate_support is expected and d.mask(True).has_enumerate_support is expected, name
        if expected:
            n = 4 if name == "prefix" else 8
            flat, full = d.enumerate_support(expand=False), d.expand((2, ROWS)).enumerate_support()
            assert flat.shape == (n, *[1] * len(d.batch_shape), *d.event_shape) and full.shape[:3] == (n, 2, ROWS)
    assert not build("made", "Normal")(X).has_enumerate_support
    configured = config_enumerate(lambda: _plate(case("lengths")[1]))
    assert "enumerate" not in poutine.trace(configured).get_trace().nodes["y"]["infer"]


@nets
def test_rows_that_are_missing_as_a_whole(net):
    """``obs_mask``: seen rows are scored, the others drawn."""
    model = build(net)
    y, seen = draws(model), torch.tensor([True, False, True, False])

    def f():
        with pyro.plate("data", ROWS):
            return pyro.sample("y", call(model), obs=torch.where(seen[:, None], y, 0.0), obs_mask=seen)

    trace = poutine.trace(f).get_trace()
    trace.compute_log_prob()
    close(trace.nodes["y_observed"]["log_prob"], by_hand(model, y, X) * seen)
    drawn = torch.stack([f() for _ in range(300)])
    assert (drawn[:, seen] == y[seen]).all()
    p = by_hand(model, binaries()[:, None], X).exp()[:, ~seen]
    has_frequencies(drawn[:, ~seen], binaries()[:, None], p)


def test_conditional_as_prior_likelihood_and_guide():
    """A predicted multivariate Gaussian, and the same model by plain Pyro with the same numbers."""
    head = heads.MultivariateNormal(2)
    torch.manual_seed(0)
    a, b = (built(gx.Conditional(nn.Linear(C, head.num_params), head)) for _ in range(2))
    y = sized(ROWS, 2)

    def plain(model, x):
        phi = x @ model.network.weight.T + model.network.bias
        zero, (s, t) = torch.zeros_like(phi[..., 0]), (10 * torch.tanh(phi[..., 2:4] / 10)).exp().unbind(-1)
        rows = [torch.stack([s, zero], -1), torch.stack([phi[..., 4], t], -1)]
        return dist.MultivariateNormal(phi[..., :2], scale_tril=torch.stack(rows, -2))

    def pair(make):
        def f():
            with pyro.plate("data", ROWS, subsample_size=3, subsample=torch.tensor([3, 0, 2])) as i:
                z = pyro.sample("z", make(a, X[i]))
                pyro.sample("y", make(a, z), obs=y[i])

        def guide():
            with pyro.plate("data", ROWS, subsample_size=3, subsample=torch.tensor([3, 0, 2])) as i:
                pyro.sample("z", make(b, X[i]))

        return f, guide

    params = [*a.parameters(), *b.parameters()]
    found = []
    for make in (lambda m, x: m(x), plain):
        torch.manual_seed(2)
        loss = Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1).differentiable_loss(*pair(make))
        found.append([loss.detach(), *torch.autograd.grad(loss, params)])
    for got, expected in zip(*found, strict=True):
        assert expected.abs().sum() > 0
        close(got, expected)


# Guides.


def noise_of(model, y, x):
    """The standard normal noise that was drawn to make y."""
    d = family_by_hand(model, phi_by_hand(model, params_of(model), y, x))
    base, v = (d.base_dist, y.log()) if model.head.name == "LogNormal" else (d, y)
    return ((v - base.loc) / base.scale).detach()


def push_by_hand(model, noise, x):
    """The value made of standard normal noise, with gradients."""
    y = [torch.zeros(noise.shape[:-1], dtype=noise.dtype)] * T
    for t in range(T):
        phi = phi_by_hand(model, params_of(model), torch.stack(y, -1), x)[..., t, :]
        y[t] = phi[..., 0] + scale_of(phi[..., 1], model.head.name) * noise[..., t]
        y[t] = y[t].exp() if model.head.name == "LogNormal" else y[t]
    return torch.stack(y, -1)


@nets
@pytest.mark.parametrize("head", ["Normal", "LogNormal"])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("particles", [1, 5])
def test_reparameterised_guide(net, head, elbo, particles):
    prior, q = smooth(build("nade", head, context=0)).requires_grad_(), build(net, head, seed=4)

    def f():
        pyro.module("prior", prior)
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", prior())
            pyro.sample("y", normal(z @ W), obs=Y)

    def guide():
        pyro.module("q", q)
        with pyro.plate("data", ROWS):
            pyro.sample("z", q(X))

    objective = elbo(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(5)
    loss = objective.loss_and_grads(f, guide)
    torch.manual_seed(5)
    with pyro.plate("particles", particles, dim=-2):
        drawn = poutine.trace(guide).get_trace().nodes["z"]["value"].detach()
    z = push_by_hand(q, noise_of(q, drawn, X), X)
    close(z.detach(), drawn)
    truth = (by_hand(q, z, X) - by_hand(prior, z) - normal(z @ W).log_prob(Y)).sum() / particles
    assert loss == pytest.approx(truth.item(), rel=1e-9)
    params = [*prior.parameters(), *q.parameters()]
    for p, g in zip(params, torch.autograd.grad(truth, params), strict=True):
        assert g.abs().sum() > 0
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_score_function_gradient_of_a_discrete_guide(elbo):
    """Its mean over many draws is the gradient of the ELBO, which enumeration gives exactly."""
    prior, q = build("nade", context=0), build("made", seed=4)
    z = binaries()[:, None]
    log_q, log_p = by_hand(q, z, X), by_hand(prior, z) + normal(z @ W, 0.5).log_prob(Y)
    truth = (log_q.exp() * (log_q - log_p)).sum()
    params = [*prior.parameters(), *q.parameters()]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(truth, params)])

    def guide():
        pyro.module("q", q)
        with pyro.plate("data", ROWS):
            pyro.sample("z", q(X))

    objective = elbo(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
    losses, grads = [], []
    for _ in range(40):
        for p in params:
            p.grad = None
        losses.append(objective.loss_and_grads(mixture_model(prior), guide))
        grads.append(torch.cat([p.grad.flatten() for p in params]))
    losses, grads = torch.tensor(losses, dtype=torch.float64), torch.stack(grads)
    assert abs(losses.mean() - truth) < 5 * losses.std() / 40**0.5
    error = grads.std(0) / 40**0.5
    assert ((grads.mean(0) - expected).abs() < 6 * error + 1e-9).all()
    assert (expected.abs() > 6 * error).sum() > 20  # errors small enough to tell


def test_fit_takes_the_step_of_svi():
    """One step of gradient descent by ``gx.fit`` and by SVI, and by hand."""
    start = build("made", "Normal")
    y = draws(start)
    truth = -by_hand(start, y, X).mean()
    expected = [
        p - 0.1 * g for p, g in zip(start.parameters(), torch.autograd.grad(truth, start.parameters()), strict=True)
    ]

    fitted = copy.deepcopy(start)
    gx.fit(
        fitted,
        y,
        X,
        epochs=1,
        batch_size=ROWS,
        max_grad_norm=math.inf,
        progress=False,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    )
    stepped = copy.deepcopy(start)

    def f():
        pyro.module("net", stepped)
        with pyro.plate("data", ROWS):
            pyro.sample("y", stepped(X), obs=y)

    SVI(f, nothing, pyro.optim.SGD({"lr": 0.1 / ROWS}), Trace_ELBO()).step()
    for model in (fitted, stepped):
        for p, e in zip(model.parameters(), expected, strict=True):
            close(p, e)


def gaussian():
    """A linear MADE with constant scales: noise = (y - b - M y) / s, so that y ~ N(mean, cov)."""
    torch.manual_seed(3)
    net = built(conditioners.MADE(T, 2, hidden=()))
    m, b, log_s = sized(T, T, seed=7).tril(-1), sized(T, seed=8), 0.3 * sized(T, seed=9)
    with torch.no_grad():
        (layer,) = net.layers
        layer.weight.zero_()[0::2] = m[:, : layer.weight.shape[1]]
        layer.bias[0::2], layer.bias[1::2] = b, 10 * torch.atanh(log_s / 10)
    inverse = torch.linalg.inv(torch.eye(T, dtype=torch.float64) - m)
    factor = inverse * log_s.exp()
    return gx.Autoregressive(net, heads.Normal(), (T,)).requires_grad_(False), inverse @ b, factor @ factor.T


def test_linear_model_is_that_gaussian():
    model, mean, cov = gaussian()
    y = sized(5, T)
    close(model().log_prob(y), dist.MultivariateNormal(mean, cov).log_prob(y))


def test_the_exact_posterior_as_an_automatic_guide():
    """With the posterior's moments every draw of AutoMultivariateNormal has the ELBO log p(y)."""
    model, mean, cov = gaussian()
    y = torch.tensor([0.4, -0.6, 0.8], dtype=torch.float64)

    def f():
        z = pyro.sample("z", model())
        pyro.sample("y", normal(z, 0.7).to_event(1), obs=y)

    guide = AutoMultivariateNormal(f)
    guide()
    total = cov + 0.49 * torch.eye(T, dtype=torch.float64)
    gain = cov @ torch.linalg.inv(total)
    factor = torch.linalg.cholesky(cov - gain @ cov)
    guide.loc = nn.Parameter(mean + gain @ (y - mean))
    guide.scale, guide.scale_tril = factor.diagonal(), factor / factor.diagonal()[:, None]
    evidence = dist.MultivariateNormal(mean, total).log_prob(y).item()
    for _ in range(3):
        assert Trace_ELBO().loss(f, guide) == pytest.approx(-evidence, abs=1e-6)


@pytest.mark.parametrize("head", ["Normal", "LogNormal"])
def test_automatic_guides_of_a_latent_event(head):
    model = smooth(build("made", head, context=0))
    y = torch.tensor([0.4, -0.6, 0.8], dtype=torch.float64)

    def f():
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
        z = pyro.sample("z", model())
        pyro.sample("y", dist.Normal(z.log() if head == "LogNormal" else z, scale[..., None]).to_event(1), obs=y)

    guide = AutoGuideList(f)
    guide.append(AutoNormal(poutine.block(f, expose=["z"]), init_scale=0.2))
    guide.append(AutoDelta(poutine.block(f, expose=["scale"])))
    guide()
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(f, guide)
    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace()
    z, scale = trace.nodes["z"]["value"], trace.nodes["scale"]["value"]
    u = z.log() if head == "LogNormal" else z
    loc = pyro.get_param_store()["AutoGuideList.0.locs.z"]
    log_q = (normal(loc, 0.2).log_prob(u) - (u if head == "LogNormal" else 0)).sum()
    log_p = by_hand(model, z) + dist.Normal(u, scale).log_prob(y).sum() + dist.LogNormal(0.0, 0.5).log_prob(scale)
    assert loss == pytest.approx((log_q - log_p).item(), abs=1e-6)
    svi = SVI(f, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(5, vectorize_particles=True, max_plate_nesting=0))
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1 and model().support.check(guide.median()["z"])


# Validation.


@pytest.mark.parametrize("name", ["context", "steps", "lengths", "ensemble"])
def test_validation_on_and_off(name):
    _, make, truth = case(name)
    y = make(ALL).sample()
    bad = y.clone()
    bad[0, 1], bad[2, 1] = 0.5, math.nan
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="support"):
        make(ALL).log_prob(bad)
    with pyro.validation_enabled(False):
        d = make(ALL)
        log_prob = d.log_prob(bad)
        close(d.log_prob(y), truth(ALL, y))
    assert log_prob[0] == -torch.inf and log_prob[2] == -torch.inf
    close(log_prob[[1, 3]], truth(ALL, y)[[1, 3]])


def test_validate_args_goes_before_the_setting():
    model, y = build("made"), torch.full((T,), 0.5, dtype=torch.float64)
    fixed = {
        v: AutoregressiveDistribution(model.conditioner, model.head, (T,), X, validate_args=v) for v in (True, False)
    }
    for setting in (True, False):
        with pyro.validation_enabled(setting):
            for d in (fixed[False], fixed[False].expand((2, ROWS))):
                assert (d.log_prob(y) == -torch.inf).all()
            for d in (fixed[True], fixed[True].expand((2, ROWS))):
                with pytest.raises(ValueError, match="support"):
                    d.log_prob(y)


def test_enumeration_without_validation():
    model = build("made")
    params, truth = list(model.parameters()), -mixture_by_hand(model)
    with pyro.validation_enabled(False):
        objective = TraceEnum_ELBO(max_plate_nesting=1)
        same_loss_and_gradient(objective, mixture_model(model, "parallel"), nothing, truth, params)


def test_enable_validation():
    before = torch.distributions.Distribution._validate_args
    model, y = build("made"), torch.full((T,), 0.5, dtype=torch.float64)
    try:
        pyro.enable_validation(False)
        assert (model(X).log_prob(y) == -torch.inf).all()
        pyro.enable_validation(True)
        with pytest.raises(ValueError, match="support"):
            model(X).log_prob(y)
    finally:
        pyro.enable_validation(before)


def vmap_validates():
    """Whether torch's own distributions check values under vmap (those before 2.7 can't)."""
    try:
        with pyro.validation_enabled(True):
            torch.func.vmap(lambda y: dist.Bernoulli(0.5).log_prob(y))(torch.ones(2))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("net", ["made", "nade"])
@pytest.mark.parametrize("head", ["Bernoulli", "Normal", "LogNormal"])
@pytest.mark.parametrize("validate", [False, True] if vmap_validates() else [False])
def test_vmap_and_per_row_gradients(net, head, validate):
    model = build(net, head)
    y = draws(model)
    with pyro.validation_enabled(validate):
        got = torch.func.vmap(lambda y, x: model(x).log_prob(y))(y, X)
        sites = torch.func.vmap(lambda y, x: model(x).log_prob_sites(y))(y, X)
        w = {name: p.detach() for name, p in params_of(model).items()}
        per_row = torch.func.vmap(
            torch.func.grad(lambda w, y, x: functional_call(model, w, (x,)).log_prob(y)), (None, 0, 0)
        )(w, y, X)
    close(got, by_hand(model, y, X))
    close(sites, sites_by_hand(model, y, X))
    for n in range(ROWS):
        truth = torch.autograd.grad(by_hand(model, y[n], X[n]), list(params_of(model).values()))
        for g, (name, _) in zip(truth, params_of(model).items(), strict=True):
            close(per_row[name][n], g)


def test_weights_of_vectorised_particles_are_refused():
    module = gx.Autoregressive(gx.conditioners.Recurrent((), 2, hidden=4), gx.heads.Normal(), (3,)).double()
    to_pyro_module_(module)
    zero = torch.zeros(12, dtype=torch.float64)
    module.conditioner.rnn.bias_ih_l0 = PyroSample(dist.Normal(zero, 1.0).to_event(1))
    with (
        pyro.plate("particles", 3, dim=-2),
        pytest.raises(ValueError, match=r"one draw of bias_ih_l0, \(12,\) .*got \(3, 1, 12\)"),
    ):
        module()


def test_samples_under_vmap():
    module = gx.Autoregressive(gx.conditioners.MADE(3, 2, hidden=(8,), context=2), gx.heads.Normal(), (3,)).double()
    contexts = torch.randn(5, 2, dtype=torch.float64)
    with torch.no_grad():
        y = torch.func.vmap(lambda c: module(c).sample((4,)), randomness="different")(contexts)
    assert y.shape == (5, 4, 3) and y.isfinite().all() and len(y.flatten().unique()) == 60
