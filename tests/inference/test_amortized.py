"""Amortised guides against posteriors in closed form, by quadrature and by enumeration."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch.distributions import MultivariateNormal

import pyro_genexact as gx
from pyro_genexact.inference.simulations import simulate


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def fitted(model, *args, simulations=4000, epochs=6, observed="y", ensemble=1, **options):
    guide = gx.guides.Amortized(model, observed=observed, hidden=(32,), transforms=2, **options)
    gx.fit_amortized(
        model, guide, *args, simulations=simulations, epochs=epochs, ensemble=ensemble, lr=3e-3, progress=False
    )
    return guide


def normal(y=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu, 0.5).to_event(1), obs=y)


def unit(y=None):
    p = pyro.sample("p", dist.Uniform(torch.zeros((), dtype=torch.float64), 2.0))
    pyro.sample("y", dist.Normal(p, 0.2), obs=y)


def groups(n=4, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", n if y is None else len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def mixed(y=None):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    x = pyro.sample("x", dist.Normal(torch.tensor([-2.0, 0.0, 2.0])[k], 1.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_conjugate_normal(ensemble):
    guide, y = fitted(normal, ensemble=ensemble), torch.tensor([1.0, -0.5])
    draws = guide.draws({"y": y}, 2000)
    exact = dist.Normal(y / 1.25, (0.25 / 1.25) ** 0.5).to_event(1)
    with torch.no_grad():
        log_q = guide.log_prob(draws, {"y": y})
    assert draws["mu"].shape == (2000, 2) and log_q.shape == (2000,)
    assert (log_q - exact.log_prob(draws["mu"])).mean().abs() < 0.03
    assert guide.draws({"y": y[None]}, 1)["mu"].shape == (1, 1, 2)
    many = guide.draws({"y": torch.stack([y, -y, y])}, 5)
    assert many["mu"].shape == (5, 3, 2)
    together = guide.log_prob(many, {"y": torch.stack([y, -y, y])})
    alone = guide.log_prob({"mu": many["mu"][:, 1]}, {"y": -y})
    assert torch.allclose(together[:, 1], alone, atol=1e-4)


def test_training_starts_at_the_linear_regression():
    """Which is the exact posterior here; a rate of 1e-9 leaves the weights of all four members as they are."""
    guide, y = gx.guides.Amortized(normal), torch.tensor([[1.0, -0.5], [-2.0, 0.1]])
    gx.fit_amortized(normal, guide, simulations=4000, epochs=1, lr=1e-9, progress=False)
    assert len(guide.made().members) == 4
    exact = dist.Normal(y / 1.25, (0.25 / 1.25) ** 0.5).to_event(1)
    mu = exact.sample((300,))
    with torch.no_grad():
        error = guide.log_prob({"mu": mu}, {"y": y}) - exact.log_prob(mu)
    assert error.abs().mean() < 0.1
    with pytest.raises(ValueError, match="ensemble"):
        gx.fit_amortized(normal, gx.guides.Amortized(normal), simulations=500, ensemble=0, progress=False)


def test_bounded_prior_does_not_leak():
    guide, y = fitted(unit, epochs=2), torch.tensor(0.1, dtype=torch.float64)  # near an end of the support
    draws = guide.draws({"y": y}, 100_000)["p"]
    assert draws.dtype == torch.float64 and ((draws > 0) & (draws < 2)).all()
    # points on the real line, where the integrand is smooth, mapped to the interval
    t = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    p, weight = 2 * t.sigmoid(), 2 * t.sigmoid() * (-t).sigmoid() * (t[1] - t[0])
    with torch.no_grad():
        density = guide.log_prob({"p": p}, {"y": y}).exp()
    assert (density * weight).sum().item() == pytest.approx(1, abs=1e-4)
    outside = guide.log_prob({"p": torch.tensor([2.5, 0.0], dtype=torch.float64)}, {"y": y})
    assert (outside == -math.inf).all()


@pytest.mark.parametrize("rows", [4, 7])
def test_rows_of_a_plate(rows):
    """Also with another number of rows than in training, in which the rows of one number of rows suffice for z."""
    guide = fitted(groups, 4, simulations=6000, epochs=10)
    y = torch.linspace(-1, 2, rows)
    assert guide.draws({"y": y}, 1)["z"].shape == (1, rows)
    draws = guide.draws({"y": y}, 3000)
    assert draws["mu"].shape == (3000,) and draws["z"].shape == (3000, rows)
    with torch.no_grad():
        log_q = guide.log_prob(draws, {"y": y})
    # z given mu and y is normal with precision 1 + 4, so that its residuals are standard
    rest = (draws["z"] - (draws["mu"][:, None] + 4 * y) / 5) * 5**0.5
    assert rest.mean().abs() < 0.1 and (rest.std() - 1).abs() < 0.07
    if rows == 4:
        cov = torch.ones(5, 5) + torch.diag(torch.tensor([0.0, 1, 1, 1, 1]))  # prior of (mu, z)
        gain = torch.linalg.solve(cov[1:, 1:] + 0.25 * torch.eye(4), cov[1:]).T
        exact = MultivariateNormal(gain @ y, _symmetric(cov - gain @ cov[1:]))
        log_p = exact.log_prob(torch.cat([draws["mu"][:, None], draws["z"]], 1))
        assert (log_q - log_p).mean().abs() < 0.06


def _symmetric(matrix):
    return (matrix + matrix.T) / 2


def test_discrete_and_continuous_latents():
    guide, y = fitted(mixed, simulations=8000, epochs=10), torch.tensor(0.7)
    loc = torch.tensor([-2.0, 0.0, 2.0])
    exact = torch.tensor([0.5, 0.3, 0.2]) * dist.Normal(loc, 1.25**0.5).log_prob(y).exp()
    exact = exact / exact.sum()
    draws = guide.draws({"y": y}, 4000)
    assert draws["k"].dtype == torch.long
    assert torch.allclose(draws["k"].bincount(minlength=3) / 4000, exact, atol=0.06)
    with torch.no_grad():
        log_q = guide.log_prob(draws, {"y": y})
    log_p = exact.log()[draws["k"]] + dist.Normal((loc[draws["k"]] + 4 * y) / 5, 0.2**0.5).log_prob(draws["x"])
    assert (log_q - log_p).mean().abs() < 0.03


def test_is_a_pyro_guide():
    guide, y = fitted(normal, epochs=2), torch.tensor([1.0, -0.5])
    weighted = gx.diagnostics.psis(normal, guide, y, num_samples=200)
    assert weighted.ess > 100 and weighted.khat < 0.7
    found = Predictive(normal, guide=guide, num_samples=7)(y)
    assert found["mu"].shape[0] == 7
    ranks = gx.diagnostics.sbc_ranks(normal, guide, observed="y", num_simulations=100, num_samples=9)["mu"]
    assert 3.6 < ranks.float().mean() < 5.4


def test_fits_by_the_elbo():
    guide, y = gx.guides.Amortized(normal, hidden=(16,), transforms=1), torch.tensor([1.0, -0.5])
    result = gx.fit_guide(normal, guide, y, steps=150, lr=0.02, num_particles=4, progress=False)
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(y).sum()
    assert result.elbo[0] < evidence - 0.3 and abs(result.final - evidence) < 0.1


def test_plates_in_a_guide():
    guide, y = fitted(groups, 4, epochs=4), torch.linspace(-1, 2, 4)
    weighted = gx.diagnostics.psis(groups, guide, y=y, num_samples=300)
    assert weighted.ess > 100


def test_a_simulator_that_takes_no_batch():
    def simulator():
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
        count = torch.tensor(float(sum(torch.rand(()).item() < float(rate) / 20 for _ in range(20))))
        pyro.deterministic("y", count)

    with pytest.warns(UserWarning, match="one by one"):
        guide = fitted(simulator, simulations=300, epochs=2)
    assert (guide.draws({"y": torch.tensor(3.0)}, 50)["rate"] > 0).all()
    found = [simulate(simulator, ["rate", "y"], 8, seed=1, vectorize=False, num_workers=workers) for workers in (0, 2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_stored_and_endless_simulations():
    mu = torch.randn(4000, 2)
    stored = {"mu": mu, "y": mu + 0.5 * torch.randn(4000, 2)}
    rows = [{name: value[i] for name, value in stored.items()} for i in range(4000)]

    def endless():
        while True:
            mu = torch.randn(128, 2)
            yield {"mu": mu, "y": mu + 0.5 * torch.randn(128, 2)}

    for simulations in (stored, rows, endless()):
        guide = gx.guides.Amortized(normal, hidden=(16,), transforms=1)
        gx.fit_amortized(normal, guide, simulations=simulations, ensemble=1, epochs=2, progress=False)
        draws = guide.draws({"y": torch.tensor([1.0, -0.5])}, 2000)["mu"]
        assert torch.allclose(draws.mean(0), torch.tensor([0.8, -0.4]), atol=0.08)


def test_missing_and_constant_outputs():
    mu = torch.randn(2000, 2)
    y = mu.clone()
    y[::10] = math.nan
    guide = gx.guides.Amortized(normal, hidden=(16,), transforms=1)
    with pytest.warns(UserWarning, match="200 of 2000"):
        gx.fit_amortized(normal, guide, simulations={"mu": mu, "y": y}, ensemble=1, epochs=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = {"mu": mu, "y": torch.stack([mu[:, 0], torch.full((2000,), 3.0)], 1)}
        gx.fit_amortized(normal, guide, simulations=constant, ensemble=1, epochs=1, progress=False)
    assert guide.draws({"y": torch.tensor([0.5, 3.0])}, 3)["mu"].isfinite().all()


class Mean(torch.nn.Module):
    """Encodes a set of numbers by the mean of a network's output."""

    features = 3

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 3)

    def forward(self, y):
        return self.layer(y.unsqueeze(-1)).mean(-2)


def test_encoder_of_a_site():
    def many(y=None, z=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu.unsqueeze(-1), torch.ones(5)).to_event(1), obs=y)
        pyro.sample("z", dist.Normal(mu, 3.0), obs=z)

    guide = fitted(many, observed=("y", "z"), encoder={"y": Mean()}, simulations=3000, epochs=8)
    data = {"y": torch.tensor([0.4, 1.0, 1.6, 2.0, 0.0]), "z": torch.tensor(1.0)}
    draws = guide.draws(data, 2000)
    exact = dist.Normal((5 + 1 / 9) / (6 + 1 / 9), (6 + 1 / 9) ** -0.5)
    with torch.no_grad():
        assert (guide.log_prob(draws, data) - exact.log_prob(draws["mu"])).mean() < 0.06
