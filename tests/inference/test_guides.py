"""``AutoFlow``: posteriors known in closed form, every kind of support, the conventions of Pyro's automatic guides."""

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
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch import nn
from torch.distributions import biject_to, constraints

import pyro_genexact as gx
from pyro_genexact.guides import AutoFlow
from pyro_genexact.inference import gaussian as parts
from support.latents import DOUBLE, MEAN, TRIL, gaussian, gaussian_of, numbers, plated, still


def constrained():
    pyro.sample("positive", dist.Gamma(numbers() + 2.0, 1.0))
    pyro.sample("interval", dist.Uniform(numbers() - 1.0, 3.0))
    pyro.sample("simplex", dist.Dirichlet(numbers(3) + 1))
    pyro.sample("chol", dist.LKJCholesky(3, numbers() + 1.0))
    normal = dist.Normal(numbers(3), 1.0).to_event(1)
    pyro.sample("ordered", dist.TransformedDistribution(normal, [dist.transforms.OrderedTransform()]))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 4, dim=-1):
        pyro.sample("plated", dist.HalfNormal(numbers(2) + 1.0).to_event(1))
    with pyro.plate("data", 10, subsample_size=5) as index:
        pyro.sample("y", dist.Normal(numbers(), 1.0), obs=torch.arange(10.0, **DOUBLE)[index])


def test_an_exact_gaussian_at_the_posterior_has_no_error():
    """loc and L of the posterior under a flow that is the identity: log q = log p of every draw."""
    guide = AutoFlow(gaussian, still, warm_start=0)
    guide()
    last = guide.flow.transforms[-1]
    with torch.no_grad():
        last.loc.copy_(MEAN)
        last.log_scale.copy_(TRIL.diagonal().log())
        last.lower.copy_(TRIL)
    for _ in range(3):
        assert Trace_ELBO().loss(gaussian, guide) == pytest.approx(0.0, abs=1e-10)
    posterior, truth = guide.get_posterior(), dist.MultivariateNormal(MEAN, scale_tril=TRIL)
    z = posterior.sample((5,))
    torch.testing.assert_close(posterior.log_prob(z + 1), truth.log_prob(z + 1))


@pytest.mark.parametrize("module", [parts.Tails(numbers(3)), parts.Gaussian(numbers(3), 0.7)])
def test_tails_and_gaussian_are_bijections(module):
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.5 * torch.randn_like(weight)
        if isinstance(module, parts.Gaussian):
            module.root.add_(0.5 * torch.randn(3, 3, **DOUBLE).tril(-1))
    x = 3 * torch.randn(5, 3, **DOUBLE)
    t = module()
    y = t(x)
    jacobians = torch.func.vmap(torch.func.jacrev(t))(x)
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), torch.linalg.slogdet(jacobians).logabsdet)
    torch.testing.assert_close(t.inv(y), x)
    assert t(torch.full((3,), 1e4, **DOUBLE)).isfinite().all()


def test_an_exact_gaussian_is_recovered():
    guide = AutoFlow(gaussian, hidden=(8,), transforms=1, warm_start=200)
    guide()
    result = gx.fit_guide(gaussian, guide, steps=120, progress=False)
    assert -0.15 < result.final < 0.02  # log p(y) = 0
    with torch.no_grad():
        z = guide.get_posterior().sample((20_000,))
    torch.testing.assert_close(z.mean(0), MEAN, atol=0.2, rtol=0)
    torch.testing.assert_close(torch.cov(z.T), TRIL @ TRIL.T, atol=0.25, rtol=0)


def test_a_funnel_is_fitted_better_than_by_a_gaussian():
    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    flow = gx.fit_guide(funnel, AutoFlow(funnel, transforms=2, hidden=(16,)), steps=200, progress=False)
    normal = gx.fit_guide(funnel, AutoMultivariateNormal(funnel), steps=200, progress=False)
    assert normal.final + 0.5 < flow.final < 0.1  # log p(y) = 0


def test_skew_and_heavy_tails_are_learned():
    """A posterior of independent sinh-arcsinh normals is within reach of a flow that does nothing."""
    tails = parts.SinhArcsinh(torch.tensor([0.8, -0.3], **DOUBLE), torch.tensor([0.0, 0.4], **DOUBLE))

    def model():
        normal = dist.Normal(numbers(2), 1.0).to_event(1)
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("density", dist.TransformedDistribution(normal, [tails]).log_prob(z))

    result = gx.fit_guide(model, AutoFlow(model, still), steps=400, lr=0.03, num_particles=32, progress=False)
    assert abs(result.final) < 0.01  # log p(y) = 0


@pytest.mark.parametrize("recipe", [gx.flows.iaf, gx.flows.realnvp, gx.flows.bnaf])
def test_the_density_is_that_of_the_unconstrained_latents(recipe):
    """log q of each site's Delta and of the flow add up to the density by change of variables."""
    guide = AutoFlow(constrained, recipe, warm_start=0)
    guide()
    with torch.no_grad():
        for weight in guide.flow.parameters():
            weight += 0.1 * torch.randn_like(weight)
    trace = poutine.trace(guide).get_trace()
    assert guide.latent_dim == 1 + 1 + 2 + 3 + 3 + 16
    latent = trace.nodes["_AutoFlow_latent"]["value"]
    total = guide.get_posterior().log_prob(latent)
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        support, value = site["fn"].support, trace.nodes[name]["value"]
        assert value.shape == site["value"].shape and support.check(value).all()
        onto = biject_to(support)
        total = total - onto.log_abs_det_jacobian(onto.inv(value), value).sum()
    torch.testing.assert_close(trace.log_prob_sum(), total)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])
@pytest.mark.parametrize("together", [False, True])
def test_losses(elbo, together):
    guide = AutoFlow(constrained, hidden=(8,))
    objective = elbo(num_particles=2, vectorize_particles=together, max_plate_nesting=2)
    assert math.isfinite(objective.loss_and_grads(constrained, guide))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


def test_particles_at_once_are_particles_one_by_one():
    guide = AutoFlow(plated, hidden=(8,))
    guide()
    with torch.no_grad():
        one, many = (
            Trace_ELBO(num_particles=200, vectorize_particles=together, max_plate_nesting=1).loss(plated, guide)
            for together in (False, True)
        )
    assert one == pytest.approx(many, abs=1.5)


def test_one_latent_and_latents_without_numbers():
    def model():
        pyro.sample("nothing", dist.Normal(torch.zeros(0), 1.0).to_event(1))
        pyro.sample("z", dist.Normal(2.0, 3.0))

    guide = AutoFlow(model, hidden=(8,))
    assert guide()["nothing"].shape == (0,) and guide.latent_dim == 1
    assert gx.fit_guide(model, guide, steps=120, lr=0.1, num_particles=2, progress=False).final == pytest.approx(
        0.0, abs=0.1
    )


def test_quantiles_and_median():
    guide = AutoFlow(constrained, still, warm_start=0)
    guide()
    q = torch.tensor([0.1, 0.5, 0.9], **DOUBLE)
    found, middle = guide.quantiles(q, num_samples=40_000), guide.median(num_samples=5000)
    loc, tril = gaussian_of(guide)
    normal = loc[:, None] + tril.diagonal()[:, None] * dist.Normal(numbers(), 1.0).icdf(q)
    torch.testing.assert_close(found["positive"], normal[0].exp().detach(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(found["interval"], (normal[1].sigmoid() * 4 - 1).detach(), rtol=0.01, atol=0.01)
    simplex = biject_to(constraints.simplex)(normal[2:4].mT)
    torch.testing.assert_close(found["simplex"], simplex.detach(), rtol=0.01, atol=0.01)
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        assert found[name].shape == (3, *site["value"].shape) and middle[name].shape == site["value"].shape
        assert site["fn"].support.check(found[name]).all()


def test_medians_are_the_same_at_each_call():
    def model():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(numbers(), 1.0))

    guide = AutoFlow(model, hidden=(8,), warm_start=0)
    guide()
    state = torch.get_rng_state()
    first = guide.median()["z"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(guide.median()["z"], first)
    assert torch.equal(guide.quantiles([0.5])["z"][0], first)


def test_quantiles_of_a_decreasing_map_are_in_order():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.less_than(0.0), (), ()))
        pyro.factor("exponential", z)

    guide = AutoFlow(model, hidden=(8,))
    guide()
    low, high = guide.quantiles([0.05, 0.95])["z"]
    assert low < high < 0


def test_copies_and_state():
    guide, other = (AutoFlow(plated, hidden=(8,), warm_start=0) for _ in range(2))
    guide(), other()
    with torch.no_grad():
        for weight in guide.parameters():
            weight += 0.1 * torch.randn_like(weight)
    copies = [copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), other]
    copies[2].load_state_dict(guide.state_dict())
    z = guide.get_posterior().sample()
    for other in copies:
        torch.testing.assert_close(other.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))
        assert other()["z"].shape == (3,)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in guide.parameters()}
    assert guide.model is not None and copies[0].model is guide.model


def test_neutra():
    """The transported model has the density of the unconstrained latents times the Jacobian."""
    guide = AutoFlow(plated, hidden=(8,))
    guide()
    neutra = NeuTraReparam(guide)
    moved = poutine.reparam(plated, config=lambda _: neutra)
    trace = poutine.trace(moved).get_trace()
    noise = trace.nodes["scale_shared_latent"]["value"]
    z = guide.get_transform()(noise)
    values = {"scale": z[0].exp(), "z": z[1:]}
    truth = poutine.trace(poutine.condition(plated, values)).get_trace().log_prob_sum() + z[0]
    ladj = torch.autograd.functional.jacobian(guide.get_transform(), noise).slogdet()[1]
    torch.testing.assert_close(trace.log_prob_sum(), truth + ladj)
    mcmc = MCMC(NUTS(moved, max_tree_depth=2), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["scale_shared_latent"]
    assert neutra.transform_sample(draws[:, None])["z"].shape == (3, 3)  # draws left of the plate


def test_predictive():
    guide = AutoFlow(constrained, hidden=(8,))
    guide()
    draws = Predictive(constrained, guide=guide, num_samples=6, parallel=True)()
    assert draws["plated"].shape == (6, 2, 4, 2) and (draws["plated"] > 0).all()


def test_enumerated_latents_are_left_to_the_model():
    @config_enumerate
    def model(y):
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)

    y = torch.tensor([-4.0, -3.0, 3.0, 4.0])
    guide = AutoFlow(
        model,
        hidden=(8,),
        transforms=1,
        init_scale=0.7,
        init_loc_fn=init_to_value(values={"loc": torch.tensor([-3.0, 3.0])}),
    )
    assert set(guide(y)) == {"loc"}
    result = gx.fit_guide(model, guide, y, steps=30, num_particles=1, progress=False)
    grid = torch.linspace(-9, 9, 181)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    log_y = torch.logsumexp(torch.stack([dist.Normal(m[..., None], 1.0).log_prob(y) for m in (a, b)]), 0) - math.log(2)
    prior = dist.Normal(0.0, 3.0).log_prob(a) + dist.Normal(0.0, 3.0).log_prob(b)
    evidence = (log_y.sum(-1) + prior).logsumexp((0, 1)).item() + 2 * math.log(0.1)
    assert evidence - 2 < result.final < evidence - 0.5  # one of two modes: log 2 below at best


# errors


def subsampled():
    with pyro.plate("batches", 5, subsample_size=2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def unbounded():
    with pyro.plate("endless"):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))


def discrete():
    pyro.sample("k", dist.Categorical(torch.ones(3)))


@pytest.mark.parametrize("model", [lambda: None, config_enumerate(discrete)])
def test_models_without_latents_raise_as_with_pyros_guides(model):
    for guide in (AutoMultivariateNormal(poutine.block(model, hide=["k"])), AutoFlow(model)):
        name = type(guide).__name__
        with pytest.raises(RuntimeError, match=f"{name} found no latent variables; Use an empty guide instead"):
            guide()


@pytest.mark.parametrize(
    "model, options, call, text",
    [
        (discrete, {}, {}, "discrete sample site 'k'"),
        (subsampled, {}, {}, "got 'z' in plate 'batches' with a subsample of 2 of 5"),
        (unbounded, {}, {}, "got 'z' in plate 'endless'"),
        (plated, {"recipe": lambda D: gx.flows.iaf(D + 1)}, {}, r"over 4 real numbers .* got event_shape \(5,\)"),
        (plated, {"support": constraints.positive}, {}, "over 4 real numbers"),
        (plated, {"recipe": lambda D: gx.flows.iaf(D, context=2)}, {}, "without context; got context=2"),
    ],
)
def test_errors(model, options, call, text):
    guide = AutoFlow(model, **options)
    for _ in range(2):  # a failed call leaves nothing behind
        with pytest.raises(ValueError, match=text):
            guide(**call)


def test_errors_of_arguments():
    with pytest.raises(ValueError, match="Expected init_scale to be positive and finite; got 0"):
        AutoFlow(plated, init_scale=0)
    for warm_start in (-1, "newton"):
        with pytest.raises(ValueError, match="warm_start"):
            AutoFlow(plated, warm_start=warm_start)
    with pytest.raises(TypeError, match="Expected recipe to be callable; got int"):
        AutoFlow(plated, 3)
    with pytest.raises(TypeError, match="Expected recipe to return a Flow; got Linear"):
        AutoFlow(plated, lambda D: nn.Linear(D, D), warm_start=0)()
    for method in ("median", "get_posterior", "get_transform", "get_base_dist"):
        with pytest.raises(RuntimeError, match="Call the guide once before"):
            getattr(AutoFlow(plated), method)()
    unpickled = AutoFlow(plated, still, warm_start=0)
    unpickled()
    unpickled = pickle.loads(pickle.dumps(unpickled))
    assert unpickled.get_posterior().sample().shape == (4,)
    with pytest.raises(RuntimeError, match="Unpickled guides carry no model"):
        unpickled.fit_laplace()
    guide = AutoFlow(gaussian, still, warm_start=0)
    guide()
    for q in (0.5, [-0.1], [1.1]):
        with pytest.raises(ValueError, match="quantiles to be a list of probabilities"):
            guide.quantiles(q)
