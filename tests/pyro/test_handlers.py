"""Autoregressive models at ``pyro.sample`` sites: density, plates, handlers, copies, validation, vmap."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.func import functional_call

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.distributions import AutoregressiveDistribution
from support.checks import close, has_frequencies
from support.pyro_models import (
    HEADS,
    ORDERS,
    ROWS,
    C,
    T,
    X,
    Y,
    binaries,
    build,
    by_hand,
    call,
    draws,
    ensemble_by_hand,
    mixture_by_hand,
    mixture_model,
    nets,
    normal,
    nothing,
    same_loss_and_gradient,
    sites_by_hand,
)
from support.values import built, params_of, sized


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


STEPS = sized(ROWS, T, C, seed=6)
LENGTHS = torch.tensor([3, 0, 2, 1])


def with_steps(head="Bernoulli"):
    torch.manual_seed(0)
    head = HEADS[head]()
    net = conditioners.Recurrent((), head.num_params, context=gx.Covariates(C), hidden=5)
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
