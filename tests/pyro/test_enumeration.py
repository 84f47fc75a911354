"""Enumerated autoregressive sites, in models and guides, against sums over all values by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import NUTS, TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch import nn

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.checks import close, has_frequencies
from support.pyro_models import (
    ORDERS,
    ROWS,
    C,
    T,
    W,
    X,
    Y,
    binaries,
    build,
    by_hand,
    ensemble_by_hand,
    mixture_by_hand,
    mixture_model,
    nets,
    normal,
    nothing,
    phi_by_hand,
    same_loss_and_gradient,
)
from support.values import built, params_of


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
    b = built(
        gx.Autoregressive(
            conditioners.MADE(2, 3, site=3, context=T, hidden=(7,), direct=False), heads.Categorical(3), (2,)
        )
    )
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
