"""Errors of amortised guides name the argument, the expectation and the value."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_genexact as gx


def model(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1).expand(*mu.shape, 2), 1.0).to_event(1), obs=y)


def of(program, **options):
    return gx.guides.Amortized(program, **options), program


def fit(guide, program, simulations=64):
    return gx.fit_amortized(program, guide, simulations=simulations, ensemble=1, epochs=1, progress=False)


@pytest.mark.parametrize(
    ("simulations", "error"),
    [
        (0, "simulations to be an integer >= 1; got 0"),
        ({"mu": torch.zeros(5)}, "sites ['mu', 'y']; got none of ['y']"),
        ({"mu": torch.zeros(5), "y": torch.zeros(4, 2)}, "same number N >= 1"),
        ({"mu": torch.zeros(5), "y": torch.zeros(5, 3)}, "observations['y'] of shape (*batch, 2)"),
        ({"mu": torch.zeros(5, 2), "y": torch.zeros(5, 2)}, "simulations['mu'] of shape (N, *()); got (5, 2)"),
        ({"mu": torch.zeros(5), "y": torch.full((5, 2), math.nan)}, "5 of 5"),
        (iter([]), "got an empty iterator"),
        (({"mu": torch.randn(9), "y": torch.zeros(9, 2)} for _ in range(5)), "an iterator without end"),
    ],
)
def test_simulations(simulations, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        fit(*of(model), simulations)


def test_observations():
    guide, _ = of(model)
    with pytest.raises(RuntimeError, match="fit_amortized"):
        guide.posterior({"y": torch.zeros(2)})
    fit(guide, model)
    for observations, error in (
        ({"y": torch.zeros(3)}, "of shape (*batch, 2), as in the model; got (3,)"),
        ({"x": torch.zeros(2)}, "Expected observations to be a dict of ['y']; got ['x']"),
        ({"y": torch.tensor([0.0, math.nan])}, "observations['y'] to be finite"),
    ):
        with pytest.raises(ValueError, match=re.escape(error)):
            guide.draws(observations, 3)
    with pytest.raises(ValueError, match="pass observations="):
        guide()
    with pytest.raises(ValueError, match="of one run"):
        guide(observations={"y": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match=re.escape("Expected latents ['mu']; got ['z']")):
        guide.log_prob({"z": torch.zeros(())}, {"y": torch.zeros(2)})


def dynamic():
    if pyro.sample("k", dist.Bernoulli(0.5)) > 0:
        pyro.sample("only", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 1.0))


def rare():
    """Of 64 runs, the first two have no latent besides k."""
    k = pyro.sample("k", dist.Bernoulli(0.1))
    if k > 0:
        pyro.sample("only", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(k, 1.0))


def factor():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("f", -8 * (mu - 3) ** 2)
    pyro.sample("y", dist.Normal(mu, 1.0))


def bounds_of_rows():
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Uniform(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("y", dist.Normal(z, 1.0))


def nested():
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(torch.zeros(()), a))
    pyro.sample("y", dist.Normal(b, 1.0))


def counts():
    pyro.sample("y", dist.Normal(pyro.sample("n", dist.Poisson(3.0)), 1.0))


def test_models():
    pyro.set_rng_seed(1)
    with pytest.raises(ValueError, match=r"in every run"):
        fit(*of(dynamic))
    with pytest.warns(UserWarning, match="one by one"), pytest.raises(ValueError, match="got 'only' in some runs"):
        fit(*of(rare))
    with pytest.raises(ValueError, match="without factors, which simulations ignore; got 'f'"):
        fit(*of(factor))
    guide = gx.guides.Amortized(factor)
    guide(observations={"y": torch.zeros(())})  # the ELBO has factors
    with pytest.raises(ValueError, match="without factors"):
        gx.diagnostics.sbc_ranks(factor, guide, num_simulations=2)
    with pytest.raises(ValueError, match=re.escape("every row of its plate; got bounds [1.0, 2.0, 3.0]")):
        fit(*of(bounds_of_rows))
    with pytest.raises(ValueError, match="bounds of 'b' that depend"):
        fit(*of(nested))
    with pytest.raises(ValueError, match="Expected n with a finite support"):
        fit(*of(counts))
    with pytest.raises(ValueError, match=re.escape("got ['x']")):
        fit(*of(model, observed="x"))
    with pytest.raises(ValueError, match="only observed sites"):
        fit(*of(lambda: pyro.sample("y", dist.Normal(0.0, 1.0))))


def columns(n=3, y=None):
    with pyro.plate("columns", n):
        v = pyro.sample("v", dist.Uniform(0.0, 1.0))
    pyro.sample("y", dist.Normal(v.sum(-1), 1.0), obs=y)
    pyro.sample("z", dist.Normal(v[..., 0], 1.0), obs=y)


def test_latents_on_the_boundary_and_other_sizes():
    guide, _ = of(columns, observed=("y", "z"))
    v = torch.rand(2000, 3).clamp(0.001, 0.999)
    v[7, 0] = 1.0
    data = {"v": v, "y": v.sum(-1), "z": v[:, 0]}
    with pytest.warns(UserWarning, match="1 simulations with latents on the boundary"):
        assert math.isfinite(fit(guide, columns, data).train[-1])
    with pytest.raises(ValueError, match=re.escape("inside their supports; got 2.0% outside")):
        fit(guide, columns, {name: value[:50] for name, value in data.items()})
    with pytest.raises(ValueError, match="'columns' of size 3, as in the first call; got 5"):
        guide(5, torch.zeros(()))
    with pytest.raises(ValueError, match=re.escape("number of rows; got shapes {'y': (4,), 'z': (5,)}")):
        guide.draws({"y": torch.zeros(4), "z": torch.zeros(5)}, 2)


def test_encoder():
    with pytest.raises(TypeError, match="attribute features; got Linear"):
        gx.guides.Amortized(model, encoder=nn.Linear(2, 3))
    wrong = nn.Linear(2, 3)
    wrong.features = 4
    with pytest.raises(ValueError, match=re.escape("(64, 4)")):
        fit(*of(model, encoder=wrong))
    with pytest.raises(ValueError, match=re.escape("observed sites, ['y']; got ['x']")):
        gx.guides.Amortized(model, encoder={"x": wrong})
    with pytest.raises(TypeError, match="Expected guide to be of class Amortized"):
        gx.fit_amortized(model, model)
