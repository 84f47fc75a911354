"""Autoregressive guides, and automatic guides of autoregressive sites, against their ELBO by hand."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.checks import close
from support.pyro_models import (
    ROWS,
    T,
    W,
    X,
    Y,
    binaries,
    build,
    by_hand,
    draws,
    family_by_hand,
    mixture_model,
    nets,
    normal,
    nothing,
    phi_by_hand,
    scale_of,
    smooth,
)
from support.values import built, params_of, sized


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
