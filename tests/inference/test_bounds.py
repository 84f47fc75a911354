"""``Bound``: values and gradients of the objectives of ``fit_guide`` against enumeration and closed forms."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

import pyro_genexact as gx
from pyro_genexact.inference.bounds import OBJECTIVES, Bound
from pyro_genexact.inference.density import Density
from pyro_genexact.inference.draws import Draws
from pyro_genexact.inference.elbo import default_loss
from support.known_posterior import EVIDENCE, D, conjugate, exact_elbo, normal

WAYS = ["plated", "mapped", "alone"]


def bound(size, objective="elbo", path=False, way="plated", shapes=None):
    draws = Draws(size, 0, {"z": torch.Size()} if shapes is None else shapes, way=way)
    return Bound(draws, objective, path)


def gradients(loss, model, guide, parameters, repeats, seed=0):
    """Returns the mean of gradients and its standard error, (P,) each."""
    torch.manual_seed(seed)
    found = []
    for _ in range(repeats):
        value = loss.differentiable_loss(model, guide)
        found.append(torch.stack(torch.autograd.grad(value, parameters)))
    rows = torch.stack(found)
    return rows.mean(0), rows.std(0) / repeats**0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_the_posterior_the_bound_is_the_evidence_and_path_gradients_vanish(objective, way):
    guide, given = normal(0.8, 0.2**0.5)
    loss = bound(16, objective, True, way)
    assert loss.loss(conjugate, guide) == pytest.approx(-EVIDENCE, abs=1e-9)
    value = loss.loss_and_grads(conjugate, guide)
    assert value == pytest.approx(-EVIDENCE, abs=1e-9)
    assert all(p.grad.abs() < 1e-9 for p in given)
    plain = bound(16, objective, False, way)
    plain.loss_and_grads(conjugate, guide)
    assert all(p.grad.abs() > 1e-3 for p in given)


@pytest.mark.parametrize("way", WAYS)
def test_bounds_are_means_over_groups(way):
    guide, _ = normal(0.3, 0.7)
    for objective, group in (("elbo", 1), ("iwae", 8), ("forward", 16)):
        loss = bound(16, objective, way=way)
        torch.manual_seed(3)
        traces = loss.draws.of(guide)
        log_w = loss.draws.log_p(conjugate, traces) - loss.draws.log_q(traces)
        z = torch.cat([trace.nodes["z"]["value"].reshape(-1) for trace in traces])
        exact = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(torch.tensor(1.0, **D))
        exact = exact - dist.Normal(0.3, 0.7).log_prob(z)
        torch.testing.assert_close(log_w, exact)
        torch.manual_seed(3)
        expected = -exact.reshape(-1, group).exp().mean(1).log().mean().item()
        assert loss.loss(conjugate, guide) == pytest.approx(expected, rel=1e-6)


def exact_forward(loc, scale):
    """-KL(p | q) up to a constant."""
    return -scale.log() - ((loc - 0.8) ** 2 + 0.2) / (2 * scale**2)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize(("objective", "exact"), [("elbo", exact_elbo), ("forward", exact_forward)])
def test_gradients_of_a_normal_guide_have_the_right_mean(objective, exact, path):
    guide, given = normal(0.5, 0.8)
    expected = -torch.stack(torch.autograd.grad(exact(*given), given))
    size = {"elbo": 64, "forward": 4000}[objective]  # normalised weights are biased by the order of 1 / size
    mean, error = gradients(bound(size, objective, path), conjugate, guide, given, 150)
    assert ((mean - expected).abs() < 4 * error + 1e-3).all()
    assert (error < 0.05 * expected.abs()).all()


def test_both_gradients_of_iwae_have_the_same_mean():
    guide, given = normal(0.5, 0.8)
    plain, e = gradients(bound(800, "iwae"), conjugate, guide, given, 50)
    path, f = gradients(bound(800, "iwae", True), conjugate, guide, given, 50, seed=1)
    assert ((plain - path).abs() < 4 * (e + f)).all() and (e + f < 0.25 * plain.abs()).all()


def of_two(weight):
    """Returns a model of a coin, its guide with the probability ``weight``, and log p and log q of both outcomes."""
    y = torch.tensor([1.0, -0.5], **D)

    def model():
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4, **D)))
        pyro.sample(
            "y",
            dist.Normal(3.0 * k, 1.0).expand([2]).to_event(1)
            if k.dim() == 0
            else dist.Normal(3.0 * k[..., None], 1.0).expand([*k.shape, 2]).to_event(1),
            obs=y,
        )

    def guide():
        pyro.sample("k", dist.Bernoulli(weight))

    log_p = [
        dist.Bernoulli(torch.tensor(0.4, **D)).log_prob(k) + dist.Normal(3.0 * k, 1.0).log_prob(y).sum()
        for k in torch.tensor([0.0, 1.0], **D)
    ]
    return model, guide, torch.stack(log_p)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_score_gradients_are_those_of_enumeration(objective, path, monkeypatch):
    """The mean of the gradients over all outcomes of three draws is the gradient of the mean of the bound.

    That of "forward" is the mean of the weighted gradients of log q.
    """
    weight = torch.tensor(0.3, **D, requires_grad=True)
    model, guide, log_p = of_two(weight)
    loss = bound(3, objective, path, shapes={"k": torch.Size()})
    expected, found, (trace,) = 0.0, 0.0, loss.draws.of(guide)
    for outcome in torch.cartesian_prod(*[torch.arange(2)] * 3):
        log_q = torch.stack([(1 - weight).log(), weight.log()])[outcome]
        log_w = log_p[outcome] - log_q
        value = log_w.mean() if objective == "elbo" else log_w.logsumexp(0) - math.log(3)
        if objective == "forward":
            expected = expected + log_q.sum().exp().detach() * (log_w.softmax(0).detach() * log_q).sum()
        else:
            expected = expected + log_q.sum().exp() * value
        trace.nodes["k"]["value"] = outcome.double()
        monkeypatch.setattr(loss.draws, "of", lambda guide: loss.draws.again(guide, [trace]))
        (gradient,) = torch.autograd.grad(loss.differentiable_loss(model, guide), weight)
        found = found - log_q.detach().sum().exp() * gradient
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0])


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_power_is_a_scale_of_the_model(objective, path):
    loc = torch.tensor(0.4, **D, requires_grad=True)
    guide, given = normal(0.5, 0.8)

    def model():
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0, **D))

    found = []
    for power, program in ((0.3, model), (1.0, poutine.scale(model, 0.3))):
        loss = bound(8, objective, path)
        loss.power = power
        torch.manual_seed(0)
        value = loss.differentiable_loss(program, guide)
        found.append(torch.stack([value.detach(), *torch.autograd.grad(value, [loc, *given])]))
    torch.testing.assert_close(*found)


def test_single_draws_have_a_score_without_baseline():
    weight = torch.tensor(0.3, **D, requires_grad=True)
    model, guide, _ = of_two(weight)
    for objective in ("elbo", "iwae"):
        value = bound(1, objective, way="alone").differentiable_loss(model, guide)
        assert torch.autograd.grad(value, weight)[0].isfinite()


def test_the_baseline_of_the_score_takes_out_the_evidence():
    """A constant in log p changes nothing."""
    weight = torch.tensor(0.3, **D, requires_grad=True)
    model, guide, _ = of_two(weight)

    def shifted():
        model()
        pyro.factor("constant", torch.tensor(1000.0, **D))

    for objective in OBJECTIVES:
        loss = bound(8, objective, shapes={"k": torch.Size()})
        (one, _), (two, _) = (gradients(loss, m, guide, [weight], 1) for m in (model, shifted))
        assert torch.allclose(one, two, rtol=1e-6) and one != 0


@pytest.mark.parametrize("path", [False, True])
def test_parameters_of_the_model_follow_the_bound(path):
    loc = torch.tensor(0.4, **D, requires_grad=True)
    guide, _ = normal(0.5, 0.8)

    def model():
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0, **D))

    exact = (1.0 - loc.item()) / 1.25  # of the log evidence
    for objective in ("iwae", "forward"):
        mean, error = gradients(bound(512, objective, path), model, guide, [loc], 60)
        assert (mean + exact).abs() < 4 * error + (0.05 if objective == "iwae" else 0.005)
    elbo, error = gradients(bound(512, "elbo", path), model, guide, [loc], 60)
    assert (elbo + 0.1).abs() < 4 * error  # loc of the guide less that of the prior


def test_enumerated_latents_are_summed_out_under_every_objective():
    def model():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], **D)), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.zeros((), **D), 1.0))
        pyro.sample("y", dist.Normal(z + torch.tensor([0.0, 2.0], **D)[k], 0.5), obs=torch.tensor(1.0, **D))

    guide = AutoNormal(poutine.block(model, hide=["k"]))
    guide()
    plain = default_loss(model, guide, 8)
    assert isinstance(plain, TraceEnum_ELBO) and plain.vectorize_particles
    loss = default_loss(model, guide, 8, "iwae")
    assert loss.draws.way == "plated"
    (trace,) = traces = loss.draws.of(guide)
    z, y = trace.nodes["z"]["value"].reshape(-1), torch.tensor(1.0, **D)
    likelihood = 0.3 * dist.Normal(z, 0.5).log_prob(y).exp() + 0.7 * dist.Normal(z + 2, 0.5).log_prob(y).exp()
    torch.testing.assert_close(loss.draws.log_p(model, traces), dist.Normal(0.0, 1.0).log_prob(z) + likelihood.log())


@pytest.mark.parametrize("way", ["plated", "alone"])
def test_scales_and_masks_of_enumerated_latents(way):
    """Each unmasked row has 2.5 times the logarithm of its mixture; masked rows have nothing."""
    y, mask = torch.tensor([0.3, 2.0, 1.0, 2.5], **D), torch.tensor([True, True, False, True])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), **D), 1.0))
        with pyro.plate("rows", 4), poutine.scale(scale=2.5), poutine.mask(mask=mask):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], **D)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + torch.tensor([0.0, 2.0], **D)[k], 0.5), obs=y)

    guide, _ = normal(0.3, 0.7)
    draws = Draws(5, 1, {"z": torch.Size()}, True, way)
    traces = draws.of(guide)
    z = torch.stack([trace.nodes["z"]["value"].reshape(-1) for trace in traces]).reshape(5, 1)
    rows = 0.3 * dist.Normal(z, 0.5).log_prob(y[mask]).exp() + 0.7 * dist.Normal(z + 2, 0.5).log_prob(y[mask]).exp()
    exact = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + 2.5 * rows.log().sum(1)
    torch.testing.assert_close(draws.log_p(model, traces), exact)
    torch.testing.assert_close(Density(model)(z.detach()), exact.detach())


def test_scales_that_differ_raise():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with pyro.plate("rows", 4, subsample_size=2):
            pyro.sample("y", dist.Normal(k, 0.5), obs=torch.ones(2))

    with pytest.raises(ValueError, match=r"one scale of all sites that depend on enumerated latents; got \[1.0, 2.0\]"):
        Draws(1, 1, {}, True).log_p(model, Draws(1, 1, {}).of(lambda: None))


@pytest.mark.parametrize("way", ["plated", "alone"])
def test_latents_of_only_the_model_or_only_the_guide_raise(way):
    def more(program=conjugate):
        pyro.sample("w", dist.Normal(torch.zeros((), **D), 1.0))
        program()

    guide, _ = normal(0.3, 0.7)
    for one, other, match in ((more, guide, "model but not guide"), (conjugate, partial(more, guide), "not model")):
        with pytest.warns(UserWarning, match=match):
            bound(4, "iwae", way=way).loss(one, other)
    with pytest.raises(ValueError, match="same latents in every run"), pytest.warns(UserWarning, match="one by one"):
        gx.fit_guide(more, guide, steps=2, num_particles=8, objective="iwae", progress=False)


def test_forward_gradients_allow_draws_outside_of_the_support():
    """The posterior is a half-normal distribution with mean (2 / pi)**0.5 and mean square 1."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), **D), 1.0))
        pyro.factor("positive", torch.where(z > 0, 0.0, -torch.inf))

    guide, given = normal(0.5, 0.9)
    mean, error = gradients(bound(4000, "forward"), model, guide, given, 50)
    loc, square = (2 / math.pi) ** 0.5, 1.0
    distance = square - 2 * 0.5 * loc + 0.5**2
    expected = torch.tensor([-(loc - 0.5) / 0.9**2, 1 / 0.9 - distance / 0.9**3], **D)
    assert ((mean - expected).abs() < 4 * error + 1e-3).all() and (error < 0.01).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_is_made_on_the_default_device(objective):
    weight, loc = (torch.tensor(x, **D, requires_grad=True) for x in (0.3, 0.6))
    zero, y = torch.zeros((), **D), torch.tensor(1.0, **D)

    def model():
        k = pyro.sample("k", dist.Bernoulli(zero + 0.4))
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(z + 3.0 * k, 1.0), obs=y)

    def guide():
        pyro.sample("k", dist.Bernoulli(weight))
        pyro.sample("z", dist.Normal(loc, 1.0))

    def run():
        found = []
        for path, way in itertools.product((False, True), ("plated", "alone")):
            loss = bound(4, objective, path, way, {"k": torch.Size(), "z": torch.Size()})
            value = loss.differentiable_loss(model, guide)
            found += [value.detach(), *torch.autograd.grad(value, (weight, loc))]
        return found

    gx.testing.device(run)


def test_default_losses():
    guide, _ = normal(0.5, 0.8)
    assert type(default_loss(conjugate, guide, 8)) is Trace_ELBO
    model, coin, _ = of_two(torch.tensor(0.3, **D, requires_grad=True))
    assert isinstance(default_loss(model, coin, 8), Bound)  # whose score has a baseline
    in_plate = pyro.plate("rows", 2, dim=-1)
    assert type(default_loss(in_plate(model), in_plate(coin), 8)) is Trace_ELBO
    assert type(default_loss(model, config_enumerate(coin), 8)) is TraceEnum_ELBO
    with pytest.raises(ValueError, match="Expected a guide without sites to enumerate for objective='iwae'"):
        default_loss(model, config_enumerate(coin), 8, "iwae")
    with pytest.raises(ValueError, match="to enumerate for path_gradient or tempering; got some"):
        default_loss(model, config_enumerate(coin), 8, path=True)
    loss = default_loss(conjugate, guide, None, "forward")
    assert isinstance(loss, Bound) and loss.draws.way == "plated" and loss.num_particles == 256


@pytest.mark.parametrize("objective", ["iwae", "forward"])
def test_programs_whose_ratio_is_no_weight_raise(objective):
    def subsampled():
        z = pyro.sample("z", dist.Normal(torch.zeros((), **D), 1.0))
        with pyro.plate("rows", 4, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(z, 0.5), obs=torch.arange(4.0, **D)[rows])

    guide, _ = normal(0.5, 0.8)
    with pytest.raises(ValueError, match=f"plates without subsampling for objective='{objective}'.*got rows"):
        default_loss(subsampled, guide, 8, objective)
    assert isinstance(default_loss(subsampled, guide, 8, path=True), Bound)
    with pytest.raises(ValueError, match=f"a guide without poutine.scale for objective='{objective}'.*got z"):
        default_loss(*(poutine.scale(program, 0.1) for program in (conjugate, guide)), 8, objective)
    assert isinstance(default_loss(poutine.scale(conjugate, 0.1), guide, 8, objective), Bound)  # a tempered posterior
