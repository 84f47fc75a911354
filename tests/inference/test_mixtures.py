"""Guides that are mixtures of flows: densities, draws, gradients of the weights, fits."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.core.functional import recording
from pyro_genexact.guides import AutoFlow
from pyro_genexact.inference.mixture_guide import FlowMixture, MixtureOfFlows
from pyro_genexact.testing import redraw
from support.checks import close
from support.latents import DOUBLE, numbers, plated, still

LEFT, RIGHT = numbers(2) - 1.5, numbers(2) + 1.5


def of_flows(D, K=3, recipe=gx.flows.iaf):
    flows = [recipe(D, hidden=(8,), transforms=2).double() for _ in range(K)]
    mixture = FlowMixture(flows)
    for k, flow in enumerate(flows):
        redraw(flow, seed=k, spread=0.2)
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([0.3, -0.5, 0.1], **DOUBLE)[:K])
    return mixture


def grid(D, half=12.0, steps=401):
    points = torch.linspace(-half, half, steps, **DOUBLE)
    return torch.cartesian_prod(*[points] * D).reshape(-1, D), (points[1] - points[0]).item() ** D


def target(z):
    """The log density, over the last dim, of modes of weights 0.7 and 0.3, with evidence e^3."""
    pairs = ((0.7, LEFT, 0.5), (0.3, RIGHT, 0.7))
    return 3 + torch.stack([math.log(w) + dist.Normal(m, s).log_prob(z).sum(-1) for w, m, s in pairs]).logsumexp(0)


def plated_modes():
    prior = dist.Normal(numbers(), 3.0)
    with pyro.plate("rows", 2):
        z = pyro.sample("z", prior)
    rest = target(z) - prior.log_prob(z).sum(-1)
    pyro.factor("density", rest.unsqueeze(-1) if rest.dim() else rest)


def joint_modes():
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    pyro.factor("density", target(z))


def boxed_modes():
    z = pyro.sample("z", dist.ImproperUniform(constraints.independent(constraints.real, 2), (), (1, 2)))
    pyro.factor("density", target(z.squeeze(-2)))


def overlapping(model=plated_modes):
    """A mixture of two skewed components that is not that of the model."""
    guide = AutoFlow(model, still, mixture=2, warm_start=0)
    guide()
    with torch.no_grad():
        for k, part in enumerate(guide.flow.parts):
            tails, affine = part.transforms[-2:]
            tails.skewness.copy_(torch.tensor([0.2, -0.1], **DOUBLE) * (k + 1))
            affine.center.copy_((LEFT + 0.5, RIGHT)[k])
            affine.log_scale.fill_(-0.2 - 0.1 * k)
            affine.lower.fill_(0.2)
        guide.flow.logits.copy_(torch.tensor([0.2, -0.3], **DOUBLE))
    return guide


# the distribution


def test_the_density_integrates_to_one_and_is_the_sum_of_its_parts():
    for D, K in ((1, 3), (2, 2)):
        d = of_flows(D, K)()
        z, cell = grid(D, steps=241)
        with torch.no_grad():
            log_q = d.log_prob(z)
            each = torch.stack([part.log_prob(z).exp() for part in d.parts])
        assert log_q.exp().sum().item() * cell == pytest.approx(1.0, abs=1e-6)
        close(log_q.exp(), (torch.tensor([0.3, -0.5, 0.1], **DOUBLE)[:K].softmax(0)[:, None] * each).sum(0))


def test_draws_have_the_density():
    """The probability integral transform of draws is uniform, and components come as often as their weights."""
    d = of_flows(1)()
    x, cell = grid(1, steps=4001)
    with torch.no_grad():
        cdf = (d.log_prob(x).exp() * cell).cumsum(0)
        torch.manual_seed(0)
        z = d.sample((50, 60)).flatten()
    index = torch.searchsorted(x[:, 0].contiguous(), z)
    assert scipy.stats.kstest(cdf[index].numpy(), "uniform").pvalue > 0.01
    close(d._drawn[2].flatten().bincount().double() / 3000, d.logits.detach().softmax(0), tol=0.04)


@pytest.mark.parametrize("recipe", [gx.flows.iaf, gx.flows.realnvp])
def test_log_prob_of_draws_is_that_of_equal_values(recipe):
    """The inverses of draws are known to their own flows; values and gradients are the same as those of a copy."""
    mixture = of_flows(3, recipe=recipe)
    torch.manual_seed(1)
    d = mixture()
    z = d((7,))
    known, other = d.log_prob(z), d.log_prob(z + 0)
    close(known, other)
    total = torch.randn(7, **DOUBLE)
    for a, b in zip(
        *(torch.autograd.grad((x * total).sum(), [*mixture.parameters()], retain_graph=True) for x in (known, other)),
        strict=True,
    ):
        close(a, b, tol=1e-8)


def test_nothing_stale_is_served():
    mixture = of_flows(2)
    d = mixture()
    with torch.no_grad():
        z = d.rsample((4,))
        without = d.log_prob(z)
    found = d.log_prob(z)
    assert found.requires_grad and not without.requires_grad
    close(found.detach(), without)
    with torch.no_grad():
        z += 1.0
        close(d.log_prob(z), mixture().log_prob(z.clone()))
        assert d._last(z) is None
        z = d.rsample((4,))
        d.log_prob(z)
        mixture.logits += torch.tensor([1.0, 0.0, 0.0], **DOUBLE)
        close(d.log_prob(z), mixture().log_prob(z.clone()))
        z = d.rsample((4,))
        d.log_prob(z)
        for p in mixture.parts.parameters():
            p *= 1.1
        close(mixture().log_prob(z), mixture().log_prob(z.clone()))
    d.rsample((4,))
    for other in (pickle.loads(pickle.dumps(d)), copy.deepcopy(d)):
        assert other.log_prob(z).shape == (4,) and other._drawn is None


def test_shapes():
    d = of_flows(2)().expand((4, 1))
    assert isinstance(d, MixtureOfFlows) and d.event_shape == (2,)
    for sample in ((), (3,), (0,)):
        z = d.sample(sample)
        assert z.shape == (*sample, 4, 1, 2) and not z.requires_grad
        assert d.log_prob(z).shape == d.log_prob(z.clone()).shape == (*sample, 4, 1)
    assert d.log_prob(torch.zeros(2, **DOUBLE)).shape == (4, 1)
    with pytest.raises(ValueError, match="Expected x to be the last draw of this distribution"):
        d.score_parts(d().clone())
    z = d.sample().clone()
    log_prob, score, entropy = d.score_parts(z)  # a fixed value has the score of all parameters
    assert score is log_prob and entropy == 0


# gradients


def exact_gradients(guide):
    """Of E_q[log p - log q] by quadrature."""
    z, cell = grid(2, half=8.0, steps=201)
    log_q = guide.get_posterior().log_prob(z)
    elbo = (log_q.exp() * (target(z) - log_q)).sum() * cell
    return torch.cat([g.flatten() for g in torch.autograd.grad(elbo, [*guide.parameters()])])


def distance(elbo, model, guide, parameters, exact, repeats=30):
    """The largest distance of mean gradients from exact ones, in standard errors."""
    found = []
    for _ in range(repeats):
        elbo.loss_and_grads(model, guide)
        found.append(-torch.cat([p.grad.flatten() for p in parameters]))
        for p in parameters:
            p.grad = None
    grads = torch.stack(found)
    error = grads.std(0) / repeats**0.5
    moving = error > 1e-12  # upper triangles have no gradient
    return ((grads.mean(0) - exact).abs() / error)[moving].max().item()


def vectorised(elbo, nesting=1):
    options = {"strict_enumeration_warning": False} if elbo is TraceEnum_ELBO else {}
    return elbo(num_particles=500, vectorize_particles=True, max_plate_nesting=nesting, **options)


@pytest.mark.parametrize(
    "elbo, model",
    [
        (Trace_ELBO, plated_modes),
        (TraceEnum_ELBO, plated_modes),
        (TraceGraph_ELBO, plated_modes),
        (TraceGraph_ELBO, joint_modes),
    ],
)
def test_gradients_are_unbiased(elbo, model):
    torch.manual_seed(0)
    guide = overlapping(model)
    exact = exact_gradients(guide)
    assert distance(vectorised(elbo), model, guide, [*guide.parameters()], exact) < 4


def test_gradients_are_unbiased_if_code_cannot_read_values():
    torch.manual_seed(0)
    guide = overlapping()
    exact = exact_gradients(guide)
    with recording():
        assert distance(vectorised(Trace_ELBO), plated_modes, guide, [*guide.parameters()], exact) < 4


def test_gradients_of_traced_losses_are_unbiased():
    """With few draws, so that sizes of the first run would matter."""
    torch.manual_seed(0)
    guide = overlapping()
    elbo = JitTrace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1, ignore_jit_warnings=True)
    exact = exact_gradients(guide)
    assert distance(elbo, plated_modes, guide, [*guide.parameters()], exact, repeats=250) < 4


def test_gradients_are_biased_without_the_scores_or_the_costs_of_auxiliary_sites(monkeypatch):
    """So the test above can fail."""
    torch.manual_seed(0)
    guide = overlapping()
    problem = vectorised(Trace_ELBO), plated_modes, guide, [*guide.parameters()], exact_gradients(guide)
    with monkeypatch.context() as patch:
        patch.setattr(AutoFlow, "forward", AutoFlow.__mro__[1].forward)
        assert distance(*problem) > 6
    monkeypatch.setattr(MixtureOfFlows, "has_rsample", True)
    monkeypatch.delattr(MixtureOfFlows, "score_parts")
    assert distance(*problem) > 6


@pytest.mark.parametrize("elbo, boxed", [(Trace_ELBO, False), (TraceGraph_ELBO, False), (Trace_ELBO, True)])
def test_gradients_at_other_sites_are_unbiased(elbo, boxed):
    """A mixture at the site of a latent, also as a part of a distribution that has the score of all parameters."""
    torch.manual_seed(0)
    start = overlapping()
    mixture, exact = start.flow, exact_gradients(start)

    def guide():
        q = pyro.module("q", mixture)()
        pyro.sample("z", q.expand((1,)).to_event(1) if boxed else q)

    pyro.clear_param_store()
    with pyro.validation_enabled(False):
        model = boxed_modes if boxed else joint_modes
        assert distance(vectorised(elbo, 0), model, guide, [*mixture.parameters()], exact) < 4


def test_losses_that_cannot_have_the_score_raise():
    guide = overlapping()
    for elbo in (TraceMeanField_ELBO, RenyiELBO):
        with pyro.validation_enabled(True), pytest.raises(NotImplementedError):
            elbo(num_particles=2, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(plated_modes, guide)


# starts and fits


def curved_modes():
    """Bananas of weights 0.7 and 0.3 that open to different sides; the log evidence is 0."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    terms = []
    for w, m, curve in ((0.7, -4.0, 0.5), (0.3, 4.0, -0.4)):
        x = z - m
        x = torch.cat([x[..., :1], x[..., 1:2] - curve * (x[..., :1].square() - 1), x[..., 2:]], -1)
        terms.append(math.log(w) + dist.Normal(0.0, 1.0).log_prob(x).sum(-1))
    pyro.factor("density", torch.stack(terms).logsumexp(0))


def test_a_fit_has_the_weights_of_curved_modes():
    torch.manual_seed(0)
    guide = AutoFlow(curved_modes, mixture=2, hidden=(8,), transforms=1)
    result = gx.fit_guide(curved_modes, guide, steps=150, lr=0.03, num_particles=128, progress=False)
    assert -0.1 < result.final < 0.03
    with torch.no_grad():
        left = (guide.get_posterior().sample((20_000,))[:, 0] < 0).float().mean()
    assert left.item() == pytest.approx(0.7, abs=0.03)
    weighted = gx.diagnostics.psis(curved_modes, guide)
    assert weighted.khat < 0.7


# the guide


def test_the_density_of_a_guide_is_that_of_all_sites():
    guide = AutoFlow(plated, mixture=2, hidden=(8,), warm_start=0)
    guide()
    trace = poutine.trace(guide).get_trace()
    z = trace.nodes["_AutoFlow_latent"]["value"]
    expected = guide.get_posterior().log_prob(z) - z[0]  # scale = exp(z_0)
    close(trace.log_prob_sum(), expected)
    with pyro.plate("draws", 5, dim=-2):
        trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    z = trace.nodes["_AutoFlow_latent"]["value"]
    assert trace.nodes["z"]["value"].shape == (5, 3) and z.shape == (5, 1, 4)
    total = sum(site["log_prob"].sum(-1) for site in trace.nodes.values() if site["type"] == "sample")
    close(total, guide.get_posterior().log_prob(z)[:, 0] - z[:, 0, 0])


def test_one_flow_is_the_guide_without_mixture():
    states = [
        AutoFlow(plated, hidden=(8,), **options) for options in ({"warm_start": 0}, {"warm_start": 0, "mixture": 1})
    ]
    for guide in states:
        torch.manual_seed(0)
        guide()
    close(dict(states[0].state_dict()), dict(states[1].state_dict()))


@pytest.mark.filterwarnings("ignore:k-hat")
def test_uses_of_a_guide():
    options = {"mixture": 2, "hidden": (4,), "transforms": 1, "warm_start": 0, "init_scale": 0.5}
    guide, new = AutoFlow(plated, **options), AutoFlow(plated, **options)
    guide(), new()
    copies = [copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), new]
    copies[2].load_state_dict(guide.state_dict())
    z = guide.get_posterior().sample((3,))
    for other in copies:
        close(other.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))
        close(other.median(num_samples=50), guide.median(num_samples=50))
    low, high = guide.quantiles([0.1, 0.9])["scale"]
    assert 0 < low < high
    assert Predictive(plated, guide=guide, num_samples=6, parallel=True)()["z"].shape == (6, 3)
    for method in ("metropolis", "importance"):
        data = gx.sample_posterior(plated, guide, draws=20, chains=2, method=method, progress=False, predictions=False)
        assert data.posterior["z"].shape == (2, 20, 3)


def test_models_that_are_mapped_or_enumerated():
    def alone():
        z = [pyro.sample(f"z{i}", dist.Normal(float(i), 1.0)) for i in range(2)]
        pyro.sample("x", dist.Normal(torch.stack(z).sum(), 1.0), obs=torch.tensor(1.0))

    def enumerated():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=torch.tensor(1.0))

    for model in (alone, enumerated):
        guide = AutoFlow(model, mixture=2, hidden=(4,), transforms=1, warm_start=0)
        result = gx.fit_guide(model, guide, steps=3, num_particles=4, progress=False)
        assert math.isfinite(result.final)


def test_errors():
    with pytest.raises(ValueError, match="Expected mixture to be"):
        AutoFlow(plated, mixture=0)
    guide = AutoFlow(plated, mixture=2, hidden=(4,), warm_start=0)
    for method in (guide.get_transform, guide.get_base_dist):
        with pytest.raises(RuntimeError, match="Call the guide once"):
            method()
    guide()
    for call in (
        guide.get_transform,
        guide.get_base_dist,
        lambda: gx.sample_posterior(plated, guide, draws=2, chains=1, method="nuts", progress=False),
    ):
        with pytest.raises(ValueError, match="got a mixture of 2 flows"):
            call()
