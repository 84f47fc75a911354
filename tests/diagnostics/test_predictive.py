"""Predictive checks against predictive distributions in closed form, of models and of simulators."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch

from pyro_genexact import PaddedSequence
from pyro_genexact import diagnostics as dg


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)


def model(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(mu + x, 0.5), obs=y)


class Simulator:
    """The same without a density, one run at a time."""

    def __call__(self, x):
        mu = float(pyro.sample("mu", dist.Normal(0.0, 3.0)))
        pyro.deterministic("y", torch.stack([mu + a + 0.5 * torch.randn(()) for a in x]))


@pytest.mark.parametrize("kind", ["model", "simulator"])
def test_predictions_have_the_distribution_of_the_model_given_the_draws(kind):
    x, y, draws = torch.arange(3.0), torch.tensor([2.0, 3.0, 4.0]), {"mu": 2.0 + torch.randn(500) / 4}
    program, options = (model, {}) if kind == "model" else (Simulator(), {"vectorize": False})
    data = dg.predictive_data(program, draws, {"y": y}, x, **options)
    found = {g: {n: tuple(v.shape) for n, v in data[g].data_vars.items()} for g in data.groups()}
    of_latents = {"mu": (1, 500), "twice": (1, 500)} if kind == "model" else {"mu": (1, 500)}
    of_data = {"y": (1, 500, 3)}
    assert found == {
        "posterior": of_latents, "prior": of_latents, "posterior_predictive": of_data, "prior_predictive": of_data,
        "observed_data": {"y": (3,)},
    }  # fmt: skip
    assert (data["posterior"]["mu"].values[0] == draws["mu"].numpy()).all()
    if kind == "model":
        assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "row")
        assert (data["prior"]["twice"] == 2 * data["prior"]["mu"]).all()
    noise = data["posterior_predictive"]["y"].values[0] - draws["mu"].numpy()[:, None] - x.numpy()
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 0.5) < 0.03
    prior = data["prior_predictive"]["y"].values[0, :, 1]
    assert abs(prior.mean() - 1) < 0.5 and abs(prior.std() - 9.25**0.5) < 0.4


def test_p_values():
    x, draws = torch.zeros(4), {"mu": torch.zeros(2000)}
    data = dg.predictive_data(model, draws, {"y": torch.tensor([0.5, -0.5, 0.0, 0.25])}, x)
    found = dg.predictive_p_values(
        data, {"elements": lambda v: v["y"], "large": lambda v: (v["y"] > 100).sum(-1), "sd": lambda v: v["y"].std(-1)}
    )
    exact = 1 - dist.Normal(0.0, 0.5).cdf(torch.tensor([0.5, -0.5, 0.0, 0.25]).double())
    torch.testing.assert_close(found["elements"], exact, atol=0.04, rtol=0)
    assert found["large"] == 0.5  # ties count half
    squares = 3 * torch.tensor([0.5, -0.5, 0.0, 0.25]).var().item() / 0.25
    assert abs(found["sd"].item() - st.chi2.sf(squares, 3)) < 0.04


def test_missing_data_and_data_that_are_no_tensors():
    draws = {"mu": np.zeros(50)}
    data = dg.predictive_data(model, draws, {"y": [0.0, float("nan"), 9.0]}, torch.zeros(3))
    p = dg.predictive_p_values(data, {"y": lambda v: v["y"], "largest": lambda v: v["y"].nan_to_num().amax(-1)})
    assert p["y"][1].isnan() and p["y"][2] == p["largest"] == 0 and 0 < p["y"][0] < 1


@pytest.mark.parametrize("posterior", [lambda x: None, {"mu": torch.zeros(9)}])
def test_types(posterior):
    y = PaddedSequence(torch.zeros(3), torch.tensor(2))
    with pytest.raises(TypeError, match=r"'y' to be a tensor|posterior to be draws"):
        dg.predictive_data(model, posterior, {"y": y}, torch.zeros(3))


ERRORS = {
    "site": (lambda x, draws: dg.predictive_data(model, draws, {"z": x}, x), r"sites of the model, .*got \['z'\]"),
    "draws": (
        lambda x, draws: dg.predictive_data(model, {"m": x}, {"y": x}, x),
        r"latents of the model, \['mu'\]; got",
    ),
    "batch": (
        lambda x, draws: dg.predictive_data(model, draws, {"y": x.expand(2, 3)}, x),
        r"'y' of shape \(3,\), as in one run of the model; got \(2, 3\)",
    ),
    "statistic": (
        lambda x, draws: dg.predictive_p_values(
            dg.predictive_data(model, draws, {"y": x}, x), {"mean": lambda v: v["y"].mean()}
        ),
        "'mean' to return one value per draw",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3), {"mu": torch.zeros(20)})
