"""Flows at ``pyro.sample`` sites: Pyro's handlers, objectives and modules meet a density that is computed by hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import TransformReparam
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.func import functional_call

import pyro_genexact as gx

KINDS = {
    "conditional maf": (gx.flows.maf, 3),
    "conditional iaf": (gx.flows.iaf, 3),
    "maf": (gx.flows.maf, 0),
}
D, ROWS = 2, 12


def redraw(recipe, *args, scale=0.4, **options):
    """A flow in float64 whose weights are far from the identity."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        flow = recipe(*args, **options)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0.0, scale)
    return flow


def build(kind, seed=0, transforms=2, scale=0.4):
    torch.manual_seed(seed)
    recipe, context = KINDS[kind]
    return redraw(recipe, D, context, scale=scale, transforms=transforms, hidden=(8,))


def rows(kind, n=ROWS):
    context = KINDS[kind][1]
    return torch.randn(n, context, dtype=torch.float64) if context else None


def affine_by_hand(flow, index, params, x, context=None):
    """Shift and log-scale of transform ``index``, by plain matrix products with ``params``."""
    part = flow.transforms[index]
    maf = isinstance(part, gx.transforms.Inverse)
    path = f"transforms.{index}." + ("transform." if maf else "")
    layers = getattr(part, "transform", part).conditioner.layers
    h = x
    for i, layer in enumerate(layers):
        weight, bias = (
            params[f"{path}conditioner.layers.{i}.weight"] * layer.mask,
            params[f"{path}conditioner.layers.{i}.bias"],
        )
        h = h[..., : weight.shape[1]] @ weight.mT + bias
        if context is not None:
            h = h + context @ params[f"{path}conditioner.layers.{i}.context_weight"].mT
        if i + 1 < len(layers):
            h = h.relu() if maf else h * h.sigmoid()
    shift, raw = h.unflatten(-1, (-1, 2)).unbind(-1)
    return shift, 7 * torch.tanh(raw / 7)


def noise_by_hand(flow, params, y, context=None):
    """The base noise of y and log|dnoise/dy|, from plain matrix products with ``params``; no code of the package runs."""
    total = torch.zeros(y.shape[:-1], dtype=y.dtype)
    for index in range(len(flow.transforms) - 1, -1, -1):
        part = flow.transforms[index]
        if isinstance(part, gx.transforms.Reverse):
            y = y.flip(-1)
        elif isinstance(part, gx.transforms.Inverse):
            shift, s = affine_by_hand(flow, index, params, y, context)
            y, total = y * s.exp() + shift, total + s.sum(-1)
        elif isinstance(part, gx.transforms.AutoregressiveTransform):
            x = y
            for _ in range(y.shape[-1]):  # a triangular system: as many substitutions as sites are exact
                shift, s = affine_by_hand(flow, index, params, x, context)
                x = (y - shift) * (-s).exp()
            y, total = x, total - affine_by_hand(flow, index, params, x, context)[1].sum(-1)
    return y, total


def log_prob_by_hand(flow, params, y, context=None):
    z, ladj = noise_by_hand(flow, params, y, context)
    return -0.5 * (z**2).sum(-1) - D / 2 * math.log(2 * math.pi) + ladj


def params_of(flow):
    return dict(flow.named_parameters())


def call(flow, x):
    return flow() if x is None else flow(x)


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def is_standard_normal(z):
    """Rows of independent standard normals: means, variances and correlations within five standard errors."""
    z = z.reshape(len(z), -1)
    n = len(z)
    assert z.mean(0).abs().max() < 5 / n**0.5
    assert (torch.cov(z.T) - torch.eye(z.shape[1], dtype=z.dtype)).abs().max() < 7 / n**0.5


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


kinds = pytest.mark.parametrize("kind", KINDS)


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


class Regression(PyroModule):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, y=None):
        d = call(self.flow, x)  # outside the plate, which would draw weights with priors once a row
        with pyro.plate("data", ROWS):
            return pyro.sample("y", d, obs=y)


@kinds
def test_attribute_of_a_pyro_module(kind):
    flow, x = build(kind), rows(kind)
    model, y = Regression(flow), torch.randn(ROWS, D, dtype=torch.float64)
    names = {f"flow$$${name}" for name in params_of(flow)}
    trace = poutine.trace(model, param_only=False).get_trace(x, y)
    assert {n for n, site in trace.nodes.items() if site["type"] == "param"} == names
    close(trace.log_prob_sum(), log_prob_by_hand(flow, params_of(flow), y, x).sum())

    start = log_prob_by_hand(flow, params_of(flow), y, x).sum().item()
    svi = SVI(model, lambda *_: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(40)]
    assert losses[0] == pytest.approx(-start)
    end = log_prob_by_hand(flow, params_of(flow), y, x).sum().item()  # the very parameters of the module moved
    assert end > start + 5 and -losses[-1] == pytest.approx(end, abs=1.0)


def test_pyro_module_restores_from_the_store():
    flow = build("conditional maf")
    old = {k: v.detach().clone() for k, v in params_of(flow).items()}
    pyro.module("flow", flow)
    loaded = pyro.module("flow", build("conditional maf", seed=1), update_module_params=True)
    for name, value in loaded.named_parameters():
        close(value.detach(), old[name])


def with_priors(kind, transforms=2):
    """A flow whose every parameter is a PyroSample."""
    flow = build(kind, transforms=transforms)
    template = build(kind, transforms=transforms)  # the plain copy that names and masks are read from
    to_pyro_module_(flow)
    for module in list(flow.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros_like(value.detach()), 0.5).to_event(value.dim())
            setattr(module, name, PyroSample(prior))
    return flow, template


@kinds
def test_weights_with_priors(kind):
    flow, template = with_priors(kind)
    names = set(params_of(template))
    x, y = rows(kind), torch.randn(ROWS, D, dtype=torch.float64)
    assert not list(flow.parameters())

    trace = poutine.trace(lambda: call(flow, x)).get_trace()
    sites = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
    assert set(sites) == names and len(sites) == len(names)
    d = trace.nodes["_RETURN"]["value"]
    weights = {name: trace.nodes[name]["value"] for name in names}
    # the module's context is over, and the weights are those of the trace nonetheless
    close(d.log_prob(y), log_prob_by_hand(template, weights, y, x))
    close(d.log_prob(y), functional_call(template, weights, () if x is None else (x,)).log_prob(y))
    draws = d.sample() if x is not None else d.sample((ROWS,))
    close(d.log_prob(draws.clone()), log_prob_by_hand(template, weights, draws, x))
    torch.manual_seed(3)
    a = d.sample((50,))
    torch.manual_seed(3)
    b = functional_call(template, weights, () if x is None else (x,)).sample((50,))
    close(a, b)
    other = call(flow, x).log_prob(y)  # another call, other weights
    assert (other - d.log_prob(y)).abs().max() > 1e-3


@kinds
def test_weights_with_priors_conditioned_and_replayed(kind):
    flow, template = with_priors(kind)
    x, y = rows(kind), torch.randn(ROWS, D, dtype=torch.float64)
    weights = {name: value.detach() for name, value in params_of(template).items()}
    conditioned = poutine.condition(lambda: call(flow, x), data=weights)
    close(conditioned().log_prob(y), log_prob_by_hand(template, weights, y, x))


@kinds
def test_weights_with_priors_in_svi_and_predictive(kind):
    flow, template = with_priors(kind, transforms=1)
    model, x = Regression(flow), rows(kind)
    y = 0.3 * torch.randn(ROWS, D, dtype=torch.float64) + 2
    guide = AutoNormal(model, init_scale=0.05)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(120)]
    assert sum(losses[-20:]) / 20 < sum(losses[:10]) / 10 - 20
    out = Predictive(model, guide=guide, num_samples=20)(x)
    assert out["y"].shape == (20, ROWS, D)
    assert set(out) == {"y"} | {f"flow.{name}" for name in params_of(template)}
    assert (out["y"].mean((0, 1)) - 2).abs().max() < 1
    assert all(v.grad is not None and v.grad.isfinite().all() for v in guide.parameters())


@kinds
@pytest.mark.parametrize("way", ["log_prob", "rsample"])
def test_frozen_parameters_stay(kind, way):
    flow, x = build(kind), rows(kind)
    frozen = {name for name in params_of(flow) if ".layers.0." in name}
    for name, p in flow.named_parameters():
        p.requires_grad_(name not in frozen)

    def loss(params):
        d = functional_call(flow, params, () if x is None else (x,))
        torch.manual_seed(5)
        if way == "rsample":
            return (d.rsample(() if d.batch_shape else (ROWS,)) ** 2).sum()
        return -d.log_prob(torch.randn(ROWS, D, dtype=torch.float64)).sum()

    loss(params_of(flow)).backward()
    for name, p in flow.named_parameters():
        if name in frozen:
            assert p.grad is None, name
            continue
        step = torch.randn_like(p) * 1e-6
        plus, minus = ({**params_of(flow), name: p + sign * step} for sign in (1, -1))
        numeric = ((loss(plus) - loss(minus)) / 2).item()
        assert numeric == pytest.approx((p.grad * step).sum().item(), rel=1e-4, abs=1e-9), name


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


@kinds
def test_functional_call_outlives_the_call(kind):
    flow, x = build(kind), rows(kind)
    args = () if x is None else (x,)
    other = {name: value.detach().clone().requires_grad_() for name, value in params_of(build(kind, seed=7)).items()}
    y = torch.randn(ROWS, D, dtype=torch.float64)
    d = functional_call(flow, other, args)
    close(d.log_prob(y), log_prob_by_hand(flow, other, y, x))
    assert (d.log_prob(y) - log_prob_by_hand(flow, params_of(flow), y, x)).abs().max() > 1e-2
    draw = d.rsample(() if d.batch_shape else (ROWS,))
    torch.manual_seed(1)
    again = d.rsample(() if d.batch_shape else (ROWS,))
    torch.manual_seed(1)
    base = d.base_dist.sample(() if d.batch_shape else (ROWS,))
    close(noise_by_hand(flow, other, again, x)[0], base)
    grads = torch.autograd.grad((draw**2).sum(), list(other.values()))
    assert all(g.isfinite().all() for g in grads) and sum(g.abs().sum() for g in grads) > 0


def test_functional_call_replaces_buffers_too():
    torch.manual_seed(0)
    data = torch.randn(50, D, dtype=torch.float64)
    flow = redraw(gx.flows.maf, D, transforms=1, hidden=(8,), standardize=data)
    buffers = {name: value for name, value in flow.named_buffers() if name.endswith(("shift", "scale"))}
    assert len(buffers) == 2
    y = torch.randn(6, D, dtype=torch.float64)
    moved = {name: value * 2 if name.endswith("scale") else value + 1 for name, value in buffers.items()}
    expected = functional_call(flow, moved, ()).log_prob(y)  # hand: z of (y - shift - 1) / 2 / scale
    shift, scale = (next(v for k, v in moved.items() if k.endswith(e)) for e in ("shift", "scale"))
    inner = gx.Flow(list(flow.transforms)[:1], flow.base)
    close(expected, inner().log_prob((y - shift) / scale) - scale.log().sum())


class Shift(dist.TransformModule):
    """y = x + shift, as users write transforms that learn."""

    bijective = True
    domain = codomain = dist.constraints.real_vector

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(D, dtype=torch.float64))

    def _call(self, x):
        return x + self.shift

    def _inverse(self, y):
        return y - self.shift

    def log_abs_det_jacobian(self, x, y):
        return x.new_zeros(x.shape[:-1])


def test_functional_call_replaces_parameters_of_plain_transforms_too():
    flow = gx.Flow([Shift()], dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1))
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    d = functional_call(flow, {"transforms.0.shift": shift}, ())
    close(d.log_prob(shift), torch.tensor(-D / 2 * math.log(2 * math.pi), dtype=torch.float64))


def test_plain_transforms_with_priors_keep_their_weights_after_the_call():
    flow = gx.Flow([Shift()], dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1))
    to_pyro_module_(flow)
    flow.transforms[0].shift = PyroSample(dist.Normal(torch.zeros(D, dtype=torch.float64), 5.0).to_event(1))
    trace = poutine.trace(flow).get_trace()
    value = trace.nodes["transforms.0.shift"]["value"]
    with poutine.trace() as later:
        log_prob = trace.nodes["_RETURN"]["value"].log_prob(value)
    assert not later.trace.nodes
    close(log_prob, torch.tensor(-D / 2 * math.log(2 * math.pi), dtype=torch.float64))


def test_context_rows_keep_to_themselves():
    flow, x = build("conditional iaf"), rows("conditional iaf").requires_grad_()
    z = flow(x).rsample((3,))
    for n in range(ROWS):
        (g,) = torch.autograd.grad(z[:, n].sum(), x, retain_graph=True)
        assert g[n].abs().sum() > 0 and g.abs().sum(1).nonzero().tolist() == [[n]]


def test_nested_module_and_plain_module_agree():
    """``pyro.module`` in a function and an attribute of a PyroModule see the same parameters."""
    flow = build("conditional maf")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow(x)

    outer, x = Outer(), rows("conditional maf")
    pyro.module("outer", outer)
    assert set(pyro.get_param_store().keys()) == {f"outer$$$flow.{name}" for name in params_of(flow)}
    y = torch.randn(ROWS, D, dtype=torch.float64)
    close(outer(x).log_prob(y), log_prob_by_hand(flow, params_of(flow), y, x))
