"""Ranks, coverage and two-sample tests of posteriors: each accepts the exact posterior and rejects wrong ones."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch

import pyro_genexact as gx
from pyro_genexact import diagnostics as dg
from pyro_genexact.diagnostics import simulated
from support.values import F64

ZEROS = torch.zeros(2, dtype=F64)


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(3)


def model(y=None):
    """Two means with a prior of scale 1, a coin that the data do not depend on, and one row of data of scale 1."""
    mu = pyro.sample("mu", dist.Normal(ZEROS, 1.0).to_event(1))
    pyro.sample("coin", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
    pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


class Posterior:
    """The exact posterior N(y / 2, 1/2) with another scale or location."""

    observed = ("y",)

    def __init__(self, scale=1.0, shift=0.0, weight=0.5):
        self.scale, self.shift, self.weight, self.calls = scale, shift, weight, []

    def draws(self, observations, num):
        y = observations["y"]
        self.calls.append(len(y))
        exact = (1 - self.weight) ** 0.5  # 1, the scale of the prior, if the data have no weight
        mu = self.weight * y + self.shift + self.scale * exact * torch.randn(num, *y.shape, dtype=F64)
        return {"mu": mu, "coin": (torch.rand(num, len(y)) < 0.3).double()}


def p_value(ranks, size=100, bins=20):
    return st.chisquare((ranks.flatten() * bins // size).bincount(minlength=bins).numpy()).pvalue


def test_ranks_of_the_exact_posterior_are_uniform():
    posterior = Posterior()
    ranks = dg.sbc_ranks(model, posterior, num_simulations=1000)
    assert ranks["mu"].shape == (1000, 2) and ranks["coin"].shape == (1000,)
    assert max(posterior.calls) > 1 and sum(posterior.calls) == 1000
    assert all(p_value(r) > 0.01 for r in (ranks["mu"][:, 0], ranks["mu"][:, 1], ranks["coin"]))


@pytest.mark.parametrize("wrong", [{"scale": 0.8}, {"scale": 1.25}, {"shift": 0.2}])
def test_ranks_and_coverage_of_wrong_posteriors_are_not(wrong):
    posterior = Posterior(**wrong)
    ranks = dg.sbc_ranks(model, posterior, num_simulations=1000)
    assert p_value(ranks["mu"][:, 0]) < 1e-3 and p_value(ranks["coin"]) > 0.01
    near = dg.tarp(model, posterior, num_simulations=1000, references=around_data)
    assert p_value(near) < 1e-3
    if "scale" in wrong:
        assert p_value(dg.tarp(model, posterior, num_simulations=1000)) < 1e-3


def around_data(data):
    """Mostly on one side of the posterior, so that a bias does not cancel."""
    y = data["y"]
    return {"mu": y + 1 + 0.5 * torch.randn(y.shape, dtype=F64), "coin": torch.ones(len(y), dtype=F64)}


def test_coverage_of_the_exact_posterior_is_uniform():
    for references in (None, around_data):
        ranks = dg.tarp(model, Posterior(), num_simulations=1000, references=references)
        assert ranks.shape == (1000,) and p_value(ranks) > 0.01


def test_quantities_of_data_detect_the_prior():
    prior = Posterior(weight=0.0)

    def log_likelihood(latents, data):
        return dist.Normal(latents["mu"], 1.0).log_prob(data["y"]).sum(-1)

    quantities = {"log p(y | mu)": log_likelihood}
    ranks = dg.sbc_ranks(model, prior, num_simulations=500, test_quantities=quantities)
    assert p_value(ranks["mu"][:, 0]) > 0.01 and p_value(ranks["log p(y | mu)"]) < 1e-6
    exact = dg.sbc_ranks(model, Posterior(), num_simulations=500, test_quantities=quantities)
    assert p_value(exact["log p(y | mu)"]) > 0.01
    assert p_value(dg.tarp(model, prior, num_simulations=500)) > 0.01
    assert p_value(dg.tarp(model, prior, num_simulations=500, references=around_data)) < 1e-6


def test_batched_ranks_are_those_of_single_posteriors(monkeypatch):
    """Deterministic draws, and chunks of several sizes."""

    class Grid:
        def draws(self, observations, num):
            grid = torch.linspace(-1, 1, num, dtype=F64)[:, None, None]
            return {"mu": observations["y"] + grid, "coin": torch.full((num, len(observations["y"])), 0.5)}

    def one(y, num_samples):
        return {
            "mu": y + torch.linspace(-1, 1, num_samples, dtype=F64)[:, None],
            "coin": torch.full((num_samples,), 0.5),
        }

    found = []
    for posterior, largest in ((one, 1), (Grid(), 2**14), (Grid(), 500), (Grid(), 1)):
        monkeypatch.setattr(simulated, "LARGEST", largest)
        pyro.set_rng_seed(1)
        found.append(dg.sbc_ranks(model, posterior, observed="y", num_simulations=12, num_samples=20))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in ("mu", "coin"))


def test_simulations_without_a_result_are_left_out():
    def failing():
        mu = pyro.sample("mu", dist.Normal(ZEROS, 1.0).to_event(1))
        pyro.sample("coin", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
        y = torch.where(mu > 2.0, torch.nan, mu + torch.randn(mu.shape, dtype=F64))
        pyro.deterministic("y", y, event_dim=1)

    with pytest.warns(UserWarning, match=r"\d+ of 200 simulations with NaN or infinity in \['y'\]") as found:
        ranks = dg.sbc_ranks(failing, Posterior(), num_simulations=200, vectorize=True)
    assert 150 < len(ranks["mu"]) < 200 and found[0].filename == __file__


def test_draws_of_samplers_in_numpy():
    def sampler(y, num_samples):
        return {"mu": np.zeros((num_samples, 2)), "coin": np.zeros(num_samples)}

    ranks = dg.sbc_ranks(model, sampler, observed="y", num_simulations=20, num_samples=9)
    assert set(ranks["mu"].unique().tolist()) == {0, 9}


def test_no_warnings_of_observations_unlike_a_fit():
    class Warns(Posterior):
        def draws(self, observations, num):
            warnings.warn("1 of 9 observations are less probable than all of 9 simulations.", stacklevel=2)
            return super().draws(observations, num)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dg.tarp(model, Warns(), num_simulations=20)


def test_ranks_of_an_amortised_guide():
    def coin(y=None):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("y", dist.Binomial(10, p), obs=y)

    guide = gx.guides.Amortized(coin, hidden=(16,), transforms=1)
    gx.fit_amortized(coin, guide, simulations=1000, epochs=5, lr=1e-2, progress=False)
    ranks = dg.sbc_ranks(coin, guide, num_simulations=300, test_quantities={"log q": guide.log_prob})
    assert {name: p_value(r, bins=5) > 1e-3 for name, r in ranks.items()} == {"p": True, "log q": True}


def test_plot_of_coverage():
    import matplotlib.pyplot as plt

    (ax,) = dg.plot_coverage(torch.randint(100, (300,)), 99, confidence_bands="pointwise")
    labels = ax.get_title(), ax.get_xlabel(), ax.get_ylabel()
    assert labels == ("TARP", "credibility level", "expected coverage minus level")
    plt.close("all")


@pytest.mark.parametrize("distance", [0.0, 1.5])
def test_accuracy_of_a_classifier_of_two_normals(distance):
    """The best accuracy is (1 + TV) / 2 = Phi(d / 2)."""
    x, y = torch.randn(800), torch.randn(800) + distance
    assert dg.c2st(x, y) == pytest.approx(st.norm.cdf(distance / 2), abs=0.03)


def test_classifier_of_dicts_of_draws():
    x = {"a": torch.randn(100), "b": torch.rand(100, 2) < 0.5}
    disjoint = {"b": x["b"].long(), "a": 1e6 * (x["a"] + 20)}  # names in another order
    assert dg.c2st({**x, "a": 1e6 * x["a"]}, disjoint) == 1.0
    equal = {"b": torch.rand(100, 2) < 0.5, "a": torch.randn(100)}
    assert dg.c2st(x, equal) < 0.65 < dg.c2st({"a": x["a"], "b": x["b"] | True}, equal)


def test_classifier_needs_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-genexact\[scikit-learn\]'"):
        dg.c2st(torch.zeros(9), torch.zeros(9))


ERRORS = {
    "no names": (lambda: dg.sbc_ranks(model, lambda y, num_samples: {}), "observed to be the names .* got None"),
    "twice": (
        lambda: dg.sbc_ranks(model, Posterior(), test_quantities={"mu": lambda latents, data: latents["mu"]}),
        r"other names than the latents; got \['mu'\]",
    ),
    "quantity": (
        lambda: dg.sbc_ranks(model, Posterior(), test_quantities={"q": lambda latents, data: torch.zeros(3)}),
        r"'q' of draws to have shape \(99, 3\)",
    ),
    "references": (
        lambda: dg.tarp(model, Posterior(), references=lambda data: {"mu": data["y"]}),
        r"references of the shapes of the latents, {'mu': \(200, 2\), 'coin': \(200,\)}",
    ),
    "nan draws": (lambda: dg.sbc_ranks(model, Posterior(scale=math.nan)), "'mu' without NaN"),
    "nan distances": (lambda: dg.tarp(model, Posterior(shift=math.nan)), "'distance to the references' without NaN"),
    "sizes": (lambda: dg.c2st(torch.zeros(9), torch.zeros(8)), r"same names and shapes; got \(9,\) and \(8,\)"),
    "few": (lambda: dg.c2st(torch.zeros(4), torch.zeros(4)), "at least 5 draws"),
    "nan": (lambda: dg.c2st(torch.zeros(9), torch.full((9,), math.nan)), "y to be finite"),
    "scalar": (lambda: dg.c2st({"a": torch.tensor(1.0)}, {}), r"x\['a'\] of shape \(N, ...\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
