"""How ``AutoFlow`` starts: Laplace's approximation, where it applies and where not."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import init_to_value
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.guides import AutoFlow
from pyro_genexact.inference.density import Density
from pyro_genexact.inference.laplace import inverse_root
from support.latents import DOUBLE, MEAN, TRIL, gaussian, gaussian_of, numbers, plated, still


def test_start_is_that_of_pyros_gaussian():
    values = {"scale": torch.tensor(1.7, **DOUBLE), "z": torch.arange(3.0, **DOUBLE)}
    start = init_to_value(values=values)
    guide = AutoFlow(plated, init_loc_fn=start, init_scale=0.2, warm_start="laplace")  # which has no mode
    guide()
    z = guide.get_posterior().sample((4000,)).detach()
    expected = torch.cat([values["scale"].log()[None], values["z"]])
    torch.testing.assert_close(z.mean(0), expected, atol=0.06, rtol=0)
    assert (z.std(0) / 0.2 - 1).abs().max() < 0.2


def test_laplace_of_a_gaussian_is_that_gaussian():
    guide = AutoFlow(gaussian, hidden=(8,))
    guide()
    loc, tril = gaussian_of(guide)
    torch.testing.assert_close(loc, MEAN, check_dtype=False)
    torch.testing.assert_close(tril, TRIL, check_dtype=False)


def test_laplace_of_a_positive_latent_is_that_of_its_logarithm():
    """Of u = log x, x ~ Gamma(4, 2): the mode is log 2 and the curvature there 4."""

    def model():
        pyro.sample("x", dist.Gamma(numbers() + 4.0, 2.0))

    guide = AutoFlow(model, hidden=(8,))
    guide.fit_laplace()
    loc, tril = gaussian_of(guide)
    assert loc.item() == pytest.approx(math.log(2), abs=1e-4)
    assert tril.item() == pytest.approx(0.5, abs=1e-4)


def test_laplace_is_the_mode_with_the_highest_elbo():
    """A thousandth of the mass is in a spike, at the first start. Its density is higher, but its ELBO is log 0.001."""

    def model():
        spiked = dist.Categorical(torch.tensor([0.999, 0.001], **DOUBLE))
        parts = dist.Normal(torch.tensor([0.0, 0.05], **DOUBLE), torch.tensor([1.0, 1e-4], **DOUBLE))
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("density", dist.MixtureSameFamily(spiked, parts).log_prob(z))

    start = numbers() + 0.05
    guide = AutoFlow(model, hidden=(8,), warm_start="laplace", init_loc_fn=init_to_value(values={"z": start}))
    guide()
    loc, tril = gaussian_of(guide)
    assert loc.item() == pytest.approx(0.0, abs=1e-3) and tril.item() == pytest.approx(1.0, abs=1e-3)
    assert not guide.fit_laplace()


def test_laplace_leaves_gradients_of_the_model_and_random_numbers_alone():
    weight = torch.tensor(0.5, **DOUBLE, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(weight, 1.0))
        with pyro.plate("rows", 10, subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(10.0, **DOUBLE)[rows])

    guide = AutoFlow(model, still, warm_start=0)
    guide()
    before = torch.get_rng_state()
    assert guide.fit_laplace() and weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    loc, tril = gaussian_of(guide)
    assert tril.item() == pytest.approx(11**-0.5, rel=1e-6)  # whatever the rows, as long as they stay the same
    assert 0 < loc.item() < 9


def test_an_interrupt_leaves_the_guide_as_it_was(monkeypatch):
    guide = AutoFlow(gaussian, still)
    guide()
    before, density = gaussian_of(guide), Density.__call__

    def interrupted(self, z):
        if not torch.equal(gaussian_of(guide)[0], before[0]):
            raise KeyboardInterrupt
        return density(self, z)

    monkeypatch.setattr(Density, "__call__", interrupted)
    with torch.no_grad():
        guide.flow.transforms[-1].loc += 1.0
    before = gaussian_of(guide)
    with pytest.raises(KeyboardInterrupt):
        guide.fit_laplace()
    torch.testing.assert_close(gaussian_of(guide), before)


def test_latents_without_a_density_are_named_by_the_fit():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.tensor(-torch.inf))

    with pytest.raises(FloatingPointError, match=r"at step 0, at \['never \(model\)'\]"):
        gx.fit_guide(model, AutoFlow(model, hidden=(4,)), steps=5, progress=False)


def test_negative_curvature_counts_as_positive():
    hessian = torch.tensor([[4.0, 0.0], [0.0, -9.0]], **DOUBLE)
    torch.testing.assert_close(inverse_root(hessian), torch.tensor([[0.5, 0.0], [0.0, 1 / 3]], **DOUBLE))


def test_flat_priors_start_at_zero():
    def model():
        pyro.sample("z", dist.ImproperUniform(constraints.positive, (), (2,)))

    guide = AutoFlow(model, hidden=(8,))
    assert guide()["z"].shape == (2,) and torch.equal(gaussian_of(guide)[0], torch.zeros(2))


@pytest.mark.parametrize("options", [{}, {"mixture": 2}, {"blocks": "rows"}])
def test_the_first_call_may_be_inside_of_plates_and_enumeration(options, monkeypatch):
    """The start is that of a call by itself, and the enumeration around it has its own dims afterwards."""

    def model():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Normal(numbers(), 1.0))
            k = pyro.sample("k", dist.Bernoulli(numbers() + 0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + k, 1.0), obs=numbers(2) + 1)

    ways, starts = [], Density.starts
    monkeypatch.setattr(Density, "starts", lambda *args: (starts(*args), ways.append(args[0].batched))[0])
    found = []
    for before in (True, False):
        torch.manual_seed(0)
        guide = AutoFlow(model, hidden=(4,), **options)
        if before:
            guide()
        elbo = TraceEnum_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
        found.append(elbo.loss(model, guide))
    assert found[1] == pytest.approx(found[0], abs=0.2) and all(ways)
