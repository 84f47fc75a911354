"""Flows as guides and as priors: how often networks run, gradients of the ELBO, and posteriors known in closed form."""

from __future__ import annotations

import math
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.reparam import TransformReparam
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from support.checks import close
from support.pyro_flows import affine_by_hand, log_prob_by_hand, noise_by_hand, redraw
from support.recipes import maf_and_iaf
from support.values import params_of

D, ROWS, WIDTH = 3, 6, 4


@pytest.fixture
def calls(monkeypatch):
    """How often each method of each conditioner ran: Counter of (method, id of its first weight)."""
    counter = Counter()
    for method in ("forward", "start", "extend", "adjoint"):
        original = getattr(gx.conditioners.MADE, method)

        def counted(self, *args, original=original, method=method, **kwargs):
            counter[method, id(self.layers[0].weight)] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(gx.conditioners.MADE, method, counted)
    return counter


def conditioners(flow):
    return [m for m in flow.modules() if isinstance(m, gx.conditioners.MADE)]


def expected(flow, **times):
    return Counter({(m, id(c.layers[0].weight)): n for c in conditioners(flow) for m, n in times.items() if n})


class VAE(nn.Module):
    """y ~ N(decoder(z), 1); z ~ prior, guide z ~ q(encoder(y)). Everything in float64."""

    def __init__(self, prior, q):
        super().__init__()
        self.prior, self.q = prior, q
        self.encoder = nn.Linear(5, WIDTH, dtype=torch.float64)
        self.decoder = nn.Linear(D, 5, dtype=torch.float64)

    def model(self, y):
        pyro.module("vae", self)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", self.prior())
            pyro.sample("y", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=y)

    def guide(self, y):
        pyro.module("vae", self)
        with pyro.plate("data", len(y)):
            pyro.sample("z", self.q(self.encoder(y)))


def vae(transforms=3):
    prior = redraw(gx.flows.maf, D, transforms=2, hidden=(8,), scale=0.3)
    q = redraw(gx.flows.iaf, D, WIDTH, transforms=transforms, hidden=(8,), scale=0.3)
    return VAE(prior, q), torch.randn(ROWS, 5, dtype=torch.float64)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("particles", [1, 4])
def test_sample_and_score_run_each_conditioner_once(calls, elbo, particles):
    module, y = vae()
    objective = elbo(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    objective.loss_and_grads(module.model, module.guide, y)
    # gradient included: one parallel pass of each network of the guide, and one of each of the prior
    assert calls == expected(module.q, forward=1) + expected(module.prior, forward=1)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_sample_and_score_of_a_guide_under_a_plain_trace(calls):
    module, y = vae()
    trace = poutine.trace(module.guide).get_trace(y)
    trace.compute_log_prob()
    (-trace.log_prob_sum()).backward()
    assert calls == expected(module.q, forward=1)
    z = trace.nodes["z"]["value"].detach()
    context = module.encoder(y).detach()
    close(trace.nodes["z"]["log_prob"].detach(), log_prob_by_hand_of(module.q, z, context))


def log_prob_by_hand_of(flow, z, context=None, params=None):
    noise, ladj = noise_by_hand(flow, params or params_of(flow), z, context)
    return -0.5 * (noise**2).sum(-1) - D / 2 * math.log(2 * math.pi) + ladj


def test_score_of_another_value_runs_again(calls):
    q = redraw(gx.flows.iaf, D, transforms=1, hidden=(8,))
    d = q()
    z = d.rsample()
    d.log_prob(z)
    assert calls == expected(q, forward=1)
    d.log_prob(z.clone())  # the sequential direction
    assert calls == expected(q, forward=1, start=1, extend=D - 1)


def test_a_maf_samples_and_scores_in_one_sweep_each_way(calls):
    flow = redraw(gx.flows.maf, D, transforms=2, hidden=(8,))
    d = flow()
    z = d.rsample((7,))
    log_prob = d.log_prob(z)
    assert calls == expected(flow, start=1, extend=D - 1)
    (log_prob.sum() + (z**2).sum()).backward()
    assert calls == expected(flow, start=1, extend=D - 1, adjoint=1)
    close(log_prob.detach(), log_prob_by_hand_of(flow, z.detach()).detach())


def push_by_hand(flow, params, noise, context):
    """An IAF's sample from its noise."""
    total = torch.zeros(noise.shape[:-1], dtype=noise.dtype)
    for index, part in enumerate(flow.transforms):
        if isinstance(part, gx.transforms.Reverse):
            noise = noise.flip(-1)
        elif isinstance(part, gx.transforms.AutoregressiveTransform):
            shift, s = affine_by_hand(flow, index, params, noise, context)
            noise, total = noise * s.exp() + shift, total + s.sum(-1)
    return noise, total


def elbo_by_hand(module, y, noise):
    """One sample's ELBO from given noise, all of it by plain matrix products."""
    q, prior = params_of(module.q), params_of(module.prior)
    z, ladj = push_by_hand(module.q, q, noise, y @ module.encoder.weight.T + module.encoder.bias)
    log_q = -0.5 * (noise**2).sum(-1) - D / 2 * math.log(2 * math.pi) - ladj
    residual = y - z @ module.decoder.weight.T - module.decoder.bias
    log_y = -0.5 * (residual**2).sum(-1) - 5 / 2 * math.log(2 * math.pi)
    return (log_prob_by_hand_of(module.prior, z, params=prior) + log_y - log_q).sum()


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_elbo_and_its_gradient_by_hand_with_the_same_noise(elbo):
    module, y = vae(transforms=2)
    torch.manual_seed(5)
    drawn = poutine.trace(module.guide).get_trace(y).nodes["z"]["value"].detach()
    torch.manual_seed(5)
    loss = elbo(max_plate_nesting=1).loss_and_grads(module.model, module.guide, y)
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    noise = noise_by_hand(module.q, params_of(module.q), drawn, module.encoder(y))[0].detach()

    truth = elbo_by_hand(module, y, noise)
    assert loss == pytest.approx(-truth.item(), abs=1e-9)
    names, params = zip(*module.named_parameters(), strict=True)
    for name, grad in zip(names, torch.autograd.grad(-truth, params), strict=True):
        assert grads[name].isfinite().all() and grads[name].abs().sum() > 0, name
        torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_a_maf_as_guide_has_the_gradient_of_finite_differences():
    """The sequential direction in the guide: rsample by sweep, score from memory."""
    flow = redraw(gx.flows.maf, D, WIDTH, transforms=2, hidden=(8,), scale=0.3)
    prior = redraw(gx.flows.maf, D, transforms=1, hidden=(8,), scale=0.3)
    module, y = VAE(prior, flow), torch.randn(ROWS, 5, dtype=torch.float64)

    def loss():
        torch.manual_seed(3)
        return Trace_ELBO(max_plate_nesting=1).differentiable_loss(module.model, module.guide, y)

    loss().backward()
    for name, p in module.named_parameters():
        assert p.grad.abs().sum() > 0, name
        with torch.no_grad():
            step = 1e-6 * torch.randn_like(p)
            p += step
            plus = loss()
            p -= 2 * step
            numeric = (plus - loss()).item() / 2
            p += step
        assert numeric == pytest.approx((p.grad * step).sum().item(), rel=1e-4, abs=1e-8), name


def test_vae_trains():
    """Rows on a noisy line: a trained flow prior and encoder explain them far better than the start."""
    module, _ = vae(transforms=1)
    t = torch.randn(64, 1, dtype=torch.float64)
    y = t * torch.arange(1.0, 6.0, dtype=torch.float64) + 2 + 0.5 * torch.randn(64, 5, dtype=torch.float64)
    svi = SVI(module.model, module.guide, pyro.optim.ClippedAdam({"lr": 0.02}), Trace_ELBO(max_plate_nesting=1))
    losses = [svi.step(y) / 64 for _ in range(150)]
    # no model with unit noise does better than its determinant bound: 5 / 2 log 2 pi = 4.6 nats and more
    assert losses[0] > 15 and 4.6 < sum(losses[-20:]) / 20 < 9.5


# Flows that are known Gaussians.


def gaussian(recipe, size=2, context=0, **options):
    """A flow of one linear transform, and (A, b, C): noise = A y + C c + b for a MAF, y = A noise + C c + b for an IAF."""
    flow = redraw(recipe, size, context, transforms=1, hidden=(), **options)
    (net,) = conditioners(flow)
    layer = net.layers[0]
    m = torch.randn(size, size, dtype=torch.float64).tril(-1)
    s, b = 0.5 * torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    c = torch.randn(size, context, dtype=torch.float64) if context else None
    with torch.no_grad():
        layer.weight.zero_()[0::2] = m[:, : layer.weight.shape[1]]
        layer.bias[0::2], layer.bias[1::2] = b, 7 * torch.atanh(s / 7)
        if context:
            layer.context_weight.zero_()[0::2] = c
    flow.requires_grad_(False)
    return flow, m + s.exp().diag(), b, c


def law(recipe, a, b):
    """Mean and covariance of y without a context."""
    if recipe is gx.flows.maf:
        inverse = torch.linalg.inv(a)
        return -inverse @ b, inverse @ inverse.T
    return b, a @ a.T


def posterior(mean, cov, y, noise):
    """Of z ~ N(mean, cov), y ~ N(z, noise^2)."""
    gain = cov @ torch.linalg.inv(cov + noise**2 * torch.eye(len(mean), dtype=torch.float64))
    return mean + (y - mean) @ gain.T, cov - gain @ cov


def run(model, site, samples=40, warmup=30):
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=samples, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()[site]


def agrees(z, mean, cov):
    """Rows of draws (samples, N, k) whose posteriors are N(mean_n, cov): pooled, whitened, they are standard normal."""
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (z - mean).flatten(0, -2).T, upper=False)
    n = white.shape[1]
    assert white.mean(1).abs().max() < 6 / n**0.5
    assert (torch.cov(white) - torch.eye(len(cov), dtype=torch.float64)).abs().max() < 9 / n**0.5


@maf_and_iaf
def test_gaussian_flow_is_that_gaussian(recipe):
    flow, a, b, _ = gaussian(recipe)
    y = torch.randn(5, 2, dtype=torch.float64)
    close(flow().log_prob(y), dist.MultivariateNormal(*law(recipe, a, b)).log_prob(y))


@pytest.mark.parametrize("recipe, reparam", [(gx.flows.maf, False), (gx.flows.iaf, False), (gx.flows.maf, True)])
def test_nuts_through_a_flow_prior(recipe, reparam):
    flow, a, b, _ = gaussian(recipe)
    y = torch.randn(25, 2, dtype=torch.float64) + 1

    def model():
        with pyro.plate("data", 25):
            z = pyro.sample("z", flow())
            pyro.sample("y", dist.Normal(z, 0.7).to_event(1), obs=y)

    if reparam:
        noise = run(poutine.reparam(model, config={"z": TransformReparam()}), "z_base")
        z = torch.linalg.solve(a, (noise - b).mT).mT if recipe is gx.flows.maf else noise @ a.T + b
    else:
        z = run(model, "z")
    assert z.shape == (40, 25, 2)
    agrees(z, *posterior(*law(recipe, a, b), y, 0.7))


def test_nuts_through_a_prior_with_positive_support():
    flow, a, b, _ = gaussian(gx.flows.maf, support=constraints.positive)
    y = torch.randn(25, 2, dtype=torch.float64)

    def model():
        with pyro.plate("data", 25):
            z = pyro.sample("z", flow())
            pyro.sample("y", dist.Normal(z.log(), 0.7).to_event(1), obs=y)

    z = run(model, "z")
    assert (z > 0).all()
    agrees(z.log(), *posterior(*law(gx.flows.maf, a, b), y, 0.7))


@maf_and_iaf
def test_nuts_through_a_flow_likelihood(recipe):
    """c ~ N(0, 1) is the flow's context: linear in it, so its posterior is Gaussian."""
    flow, a, b, c = gaussian(recipe, context=2)
    y = torch.randn(25, 2, dtype=torch.float64)

    def model():
        with pyro.plate("data", 25):
            x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("y", flow(x), obs=y)

    # residual r = noise + k x with noise ~ N(0, I)
    k = c if recipe is gx.flows.maf else torch.linalg.solve(a, c)
    r = y @ a.T + b if recipe is gx.flows.maf else torch.linalg.solve(a, (y - b).T).T
    sign = -1 if recipe is gx.flows.maf else 1
    cov = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + k.T @ k)
    agrees(run(model, "x"), sign * r @ k @ cov, cov)


def test_hand_log_prob_agrees_with_pyro_helper():
    """The two hand-written densities of these tests are one (guards the reference itself)."""
    flow = redraw(gx.flows.maf, 2, transforms=2, hidden=(8,))
    y = torch.randn(4, 2, dtype=torch.float64)
    close(log_prob_by_hand(flow, params_of(flow), y), flow().log_prob(y))
