"""Flows at ``pyro.sample`` sites: Pyro's handlers, objectives and modules meet a density that is computed by hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.reparam import TransformReparam

from support.checks import close
from support.pyro_flows import KINDS, ROWS, D, build, call, kinds, log_prob_by_hand, noise_by_hand, redraw, rows
from support.values import params_of


def is_standard_normal(z):
    """Rows of independent standard normals: means, variances and correlations within five standard errors."""
    z = z.reshape(len(z), -1)
    n = len(z)
    assert z.mean(0).abs().max() < 5 / n**0.5
    assert (torch.cov(z.T) - torch.eye(z.shape[1], dtype=z.dtype)).abs().max() < 7 / n**0.5


@kinds
def test_log_density_by_hand(kind):
    flow, x = build(kind), rows(kind)
    y = torch.randn(ROWS, D, dtype=torch.float64)
    close(call(flow, x).log_prob(y), log_prob_by_hand(flow, params_of(flow), y, x))


@kinds
def test_subsampled_plate_scales_the_log_density(kind):
    flow, x = build(kind), rows(kind)
    y = torch.randn(ROWS, D, dtype=torch.float64)
    seen = []

    def model():
        with pyro.plate("data", ROWS, subsample_size=3) as index:
            seen.append(index)
            pyro.sample("y", call(flow, None if x is None else x[index]), obs=y[index])

    trace = poutine.trace(model).get_trace()
    index = seen[0]
    assert len(set(index.tolist())) == 3
    expected = log_prob_by_hand(flow, params_of(flow), y[index], None if x is None else x[index]).sum() * ROWS / 3
    close(trace.log_prob_sum(), expected)


@kinds
def test_unobserved_site_in_a_plate_draws_every_row_afresh(kind):
    flow, x = build(kind), rows(kind, 3)

    def model():
        with pyro.plate("particles", 3000, dim=-2), pyro.plate("data", 3):
            return pyro.sample("y", call(flow, x))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    y = trace.nodes["y"]["value"]
    assert y.shape == (3000, 3, D)
    z, _ = noise_by_hand(flow, params_of(flow), y, x)
    is_standard_normal(z)
    close(trace.nodes["y"]["log_prob"], log_prob_by_hand(flow, params_of(flow), y, x))


@kinds
def test_batch_shape_is_that_of_base_and_context(kind):
    context = KINDS[kind][1]
    torch.manual_seed(0)
    base = dist.Normal(torch.zeros(4, 1, D, dtype=torch.float64), 1.0).to_event(1)
    flow = redraw(KINDS[kind][0], D, context, transforms=2, hidden=(8,), base=base)
    x = torch.randn(3, context, dtype=torch.float64) if context else None
    d = call(flow, x)
    assert d.batch_shape == ((4, 3) if context else (4, 1)) and d.event_shape == (D,)
    y = d.sample((2000,))
    assert y.shape == (2000, *d.batch_shape, D)
    is_standard_normal(noise_by_hand(flow, params_of(flow), y, x)[0])
    close(d.log_prob(y[0]), log_prob_by_hand(flow, params_of(flow), y[0], x))
    assert d.expand((5, 4, 3)).batch_shape == (5, 4, 3)


@kinds
def test_an_unbatched_base_takes_the_batch_of_the_context(kind):
    flow = build(kind)
    x = torch.randn(5, 3, dtype=torch.float64) if flow.context else None
    d = call(flow, x)
    assert d.batch_shape == ((5,) if flow.context else ())
    assert call(flow, None if x is None else x[:1].expand(5, 3)).sample().unique(dim=0).shape[0] == (
        5 if flow.context else D
    )


def guide_and_model(kind, flow, x):
    """z_n ~ flow(x_n) in the guide; z_n ~ N(0, 1), y_n ~ N(z_n, 1) with y = 1 in the model."""

    def model():
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(ROWS, D, dtype=torch.float64))

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("data", ROWS):
            pyro.sample("z", call(flow, x))

    return model, guide


def loss_by_hand(flow, x, samples):
    """-ELBO of each sample, with y drawn as the change of variables by hand inverts it: (samples,)."""
    with torch.no_grad():
        d = call(flow, x)
        z = d.sample((samples,) if d.batch_shape else (samples, ROWS))
        q = log_prob_by_hand(flow, params_of(flow), z, x)
        p = -0.5 * (z**2 + (1 - z) ** 2).sum(-1) - D * math.log(2 * math.pi)
        return (q - p).sum(-1)


@kinds
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_vectorised_particles_have_the_expected_loss_of_others(kind, elbo):
    flow, x = build(kind), rows(kind)
    flow.requires_grad_(True)
    model, guide = guide_and_model(kind, flow, x)
    truth = loss_by_hand(flow, x, 20000)
    mean, sd = truth.mean().item(), truth.std().item()
    for vectorised, particles in ((True, 2000), (False, 20)):
        objective = elbo(num_particles=particles, vectorize_particles=vectorised, max_plate_nesting=1)
        loss = objective.loss(model, guide)
        assert isinstance(loss, float)
        assert abs(loss - mean) < 5 * sd * (1 / particles + 1 / 20000) ** 0.5


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_loss_is_exact_where_guide_and_prior_are_one(elbo):
    """q = p makes every particle's loss -log p(y), whatever was drawn; a score that mismatches its sample shows."""
    q, p = build("conditional iaf"), build("conditional iaf")
    x, y = rows("conditional iaf"), torch.linspace(-1, 1, ROWS, dtype=torch.float64)

    def model():
        pyro.module("p", p)
        with pyro.plate("data", ROWS):
            pyro.sample("z", p(x))
            pyro.sample("y", dist.Normal(torch.zeros_like(y), 1.0), obs=y)

    def guide():
        pyro.module("q", q)
        with pyro.plate("data", ROWS):
            pyro.sample("z", q(x))

    expected = (0.5 * y**2 + 0.5 * math.log(2 * math.pi)).sum().item()
    for vectorised in (True, False):
        objective = elbo(num_particles=3, vectorize_particles=vectorised, max_plate_nesting=1)
        assert objective.loss(model, guide) == pytest.approx(expected, abs=1e-8)
        assert objective.loss_and_grads(model, guide) == pytest.approx(expected, abs=1e-8)


@kinds
def test_svi_fits_a_guide(kind):
    flow, x = build(kind, scale=0.1, transforms=1), rows(kind)
    model, guide = guide_and_model(kind, flow, x)
    # the posterior N(1/2, 1/2) is in the family: the loss falls to -log p(y) = ROWS * D * -log N(1; 0, 2)
    optimum = ROWS * D * (0.5 * 1 / 2 + 0.5 * math.log(2 * math.pi * 2))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(150):
        svi.step()
    assert optimum - 0.1 < loss_by_hand(flow, x, 4000).mean().item() < optimum + 1.5
    assert set(pyro.get_param_store().keys()) == {f"flow$$${name}" for name in params_of(flow)}


@kinds
def test_predictive_in_parallel(kind):
    flow, x = build(kind), rows(kind, 3)

    def model():
        with pyro.plate("data", 3):
            return pyro.sample("y", call(flow, x))

    out = Predictive(model, num_samples=2000, parallel=True)()["y"]
    assert out.shape == (2000, 3, D)
    is_standard_normal(noise_by_hand(flow, params_of(flow), out, x)[0])
    one_by_one = Predictive(model, num_samples=2)()["y"]
    assert one_by_one.shape == (2, 3, D)


@pytest.mark.parametrize("kind", ["conditional maf", "conditional iaf"])
def test_predictive_with_posterior_samples_in_the_context(kind):
    flow, w = build(kind), torch.randn(500, 3, dtype=torch.float64)

    def model():
        weights = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("data", 4):
            return pyro.sample("y", flow(weights))

    out = Predictive(model, {"w": w[:, None]}, parallel=True)()["y"]
    assert out.shape == (500, 4, D)
    is_standard_normal(noise_by_hand(flow, params_of(flow), out, w[:, None])[0])


@kinds
def test_scale_mask_condition_block(kind):
    flow, x = build(kind), rows(kind)
    y = torch.randn(ROWS, D, dtype=torch.float64)
    log_prob = log_prob_by_hand(flow, params_of(flow), y, x)
    keep = torch.arange(ROWS) % 3 == 0

    def model():
        with pyro.plate("data", ROWS):
            return pyro.sample("y", call(flow, x))

    conditioned = poutine.condition(model, {"y": y})
    close(poutine.trace(conditioned).get_trace().log_prob_sum(), log_prob.sum())
    close(poutine.trace(poutine.scale(conditioned, 0.25)).get_trace().log_prob_sum(), 0.25 * log_prob.sum())
    masked = poutine.trace(poutine.mask(conditioned, keep)).get_trace()
    close(masked.log_prob_sum(), log_prob[keep].sum())
    close(call(flow, x).mask(keep).log_prob(y), log_prob * keep)
    assert "y" not in poutine.trace(poutine.block(model, hide=["y"])).get_trace().nodes
    drawn = poutine.trace(model).get_trace()
    replayed = poutine.trace(poutine.replay(model, drawn)).get_trace()
    value = drawn.nodes["y"]["value"]
    assert replayed.nodes["y"]["value"] is value
    close(replayed.log_prob_sum(), log_prob_by_hand(flow, params_of(flow), value, x).sum())


@kinds
def test_inference_mode(kind):
    flow, x = build(kind), rows(kind)
    truth = lambda y: log_prob_by_hand(flow, params_of(flow), y, x)  # noqa: E731
    with torch.inference_mode():
        d = call(flow, x)
        y = d.sample((4,)) if d.batch_shape else d.sample((4, ROWS))
        inside = d.log_prob(y)  # of a sample just drawn
        fresh = torch.randn(ROWS, D, dtype=torch.float64)
        inside_fresh = d.log_prob(fresh)
    close(inside, truth(y.clone()).detach())
    close(inside_fresh, truth(fresh.clone()).detach())
    # the same distribution afterwards, with gradients
    value = y.clone().requires_grad_()
    outside = d.log_prob(value)
    close(outside.detach(), inside.clone())
    outside.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    (expected,) = torch.autograd.grad(truth(value).sum(), value)
    close(value.grad, expected)


@kinds
def test_render_model(kind):
    flow, x = build(kind), rows(kind)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", call(flow, x))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(ROWS, D, dtype=torch.float64))

    source = pyro.render_model(model, render_distributions=True).source
    assert "z -> y" in source and "z ~ TransformedDistribution" in source and "y ~ Normal" in source


@kinds
def test_transform_reparam_keeps_the_log_density(kind):
    flow, x = build(kind), rows(kind)

    def model():
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", call(flow, x))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(ROWS, D, dtype=torch.float64))

    reparam = poutine.reparam(model, config={"z": TransformReparam()})
    trace = poutine.trace(reparam).get_trace()
    noise, z = trace.nodes["z_base"]["value"], trace.nodes["z"]["value"]
    close(noise_by_hand(flow, params_of(flow), z, x)[0], noise)
    trace.compute_log_prob()
    close(trace.nodes["z_base"]["log_prob"], -0.5 * (noise**2).sum(-1) - D / 2 * math.log(2 * math.pi))
    direct = poutine.trace(poutine.condition(model, {"z": z})).get_trace()
    ladj = noise_by_hand(flow, params_of(flow), z, x)[1]
    close(trace.log_prob_sum(), direct.log_prob_sum() - ladj.sum())
    # the same gradient of the joint with respect to the noise
    noise = noise.detach().requires_grad_()
    joint = poutine.trace(poutine.condition(reparam, {"z_base": noise})).get_trace().log_prob_sum()
    joint.backward()
    step = 1e-6 * torch.randn_like(noise)
    plus, minus = (
        poutine.trace(poutine.condition(reparam, {"z_base": noise.detach() + s * step})).get_trace().log_prob_sum()
        for s in (1, -1)
    )
    assert (plus - minus).item() / 2 == pytest.approx((noise.grad * step).sum().item(), rel=1e-4)


def test_context_rows_keep_to_themselves():
    flow, x = build("conditional iaf"), rows("conditional iaf").requires_grad_()
    z = flow(x).rsample((3,))
    for n in range(ROWS):
        (g,) = torch.autograd.grad(z[:, n].sum(), x, retain_graph=True)
        assert g[n].abs().sum() > 0 and g.abs().sum(1).nonzero().tolist() == [[n]]
