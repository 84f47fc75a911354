"""Simulations and observed sites of amortised guides: encoders, missing entries, sizes, black-box simulators."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact.encoders import DeepSet, Joint, Standardized, Vector
from pyro_genexact.simulation.observations import stacked
from pyro_genexact.simulation.simulations import simulate
from support.amortised import EXACT, FAST, SMALL, Y, fitted, groups, items, kl, normal


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def exact(y):
    """The log posterior density of ``items``."""
    return lambda z: dist.Normal(y.sum() / (len(y) + 1), (len(y) + 1) ** -0.5).log_prob(z["mu"])


def of_items(simulations, encoder=None, **options):
    guide = gx.guides.Amortized(items, encoder=encoder or DeepSet(1, 8, width=16), **SMALL)
    gx.fit_amortized(items, guide, 20, simulations=simulations, **FAST, **options)
    return guide


def test_sets_of_any_size():
    """Learned from sets of 1 to 20 items, and from half of the items of sets, the others missing."""
    mu = torch.randn(3000)
    y, n = mu[:, None] + torch.randn(3000, 20), torch.randint(1, 21, (3000,))
    guide = of_items({"mu": mu, "y": gx.PaddedSequence(y, n)}, epochs=8)
    for size in (2, 9):
        data = torch.linspace(-0.5, 1.5, size)
        assert kl(guide, {"y": data}, exact(data)) < 0.1
    with torch.no_grad():
        padded = guide.posterior({"y": gx.PaddedSequence(y[:3], torch.tensor([2, 9, 20]))}).log_prob(torch.ones(1))
        missing = torch.where(torch.arange(20) < 9, y[1], torch.nan)
        for i, value in ((0, y[0, :2]), (1, y[1, :9]), (2, y[2]), (1, missing)):
            one = guide.log_prob({"mu": torch.tensor(1.0)}, {"y": value})
            torch.testing.assert_close(padded[i], one, atol=1e-4, rtol=0)


def test_batches_of_sets_of_different_sizes():
    def endless():
        for size in torch.randint(1, 21, (10_000,)).tolist():
            mu = torch.randn(64)
            yield {"mu": mu, "y": mu[:, None] + torch.randn(64, size)}

    guide, y = of_items(endless(), epochs=4), torch.randn(3) + 1
    assert kl(guide, {"y": y}, exact(y)) < 0.1


def test_missing_entries():
    """NaN is a missing entry to an encoder that reads these, and a failed run at all other sites."""
    mu = torch.randn(2000)
    y = (mu[:, None] + torch.randn(2000, 5)).where(torch.rand(2000, 5) < 0.7, torch.nan)
    y[:7] = torch.nan
    encoder = Vector(5, 8, width=16)
    guide = gx.guides.Amortized(items, encoder=encoder, **SMALL)
    with pytest.warns(UserWarning, match=f"{int(y.isnan().all(1).sum())} of 2000"):
        gx.fit_amortized(items, guide, 5, simulations={"mu": mu, "y": y}, epochs=6, **FAST)
    data = torch.tensor([0.5, math.nan, 1.0, math.nan, -0.2])
    assert kl(guide, {"y": data}, exact(data[[0, 2, 4]])) < 0.1
    with pytest.raises(ValueError, match="finite where it is not missing"):
        guide.draws({"y": torch.full((5,), math.nan)}, 1)
    guide = gx.guides.Amortized(items, **SMALL)
    with pytest.warns(UserWarning, match=f"{int(y.isnan().any(1).sum())} of 2000"):
        gx.fit_amortized(items, guide, 5, simulations={"mu": mu, "y": y}, epochs=1, **FAST)


class Mean(nn.Module):
    """Encodes a set of numbers by the mean of a network's output."""

    features = 3

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, y):
        return self.layer(y.unsqueeze(-1)).mean(-2)


def several(y=None, z=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), torch.ones(5)).to_event(1), obs=y)
    pyro.sample("z", dist.Normal(mu, 3.0), obs=z)


@pytest.mark.parametrize("encoder", [{"y": Mean()}, Joint({"y": Mean(), "z": Standardized(1)})])
def test_encoders_of_sites(encoder):
    guide = fitted(several, observed=("y", "z"), encoder=encoder, simulations=2000)
    data = {"y": torch.tensor([0.4, 1.0, 1.6, 2.0, 0.0]), "z": torch.tensor(1.0)}
    posterior = dist.Normal((5 + 1 / 9) / (6 + 1 / 9), (6 + 1 / 9) ** -0.5)
    assert kl(guide, data, lambda z: posterior.log_prob(z["mu"])) < 0.1


def test_encoders_that_do_not_fit():
    for encoder, text in ((Vector(1, 4), "inputs=10, the number of elements"), (DeepSet(2, 4), r"of shape \(N, F\)")):
        with pytest.raises(ValueError, match=text):
            gx.guides.Amortized(items, encoder=encoder).setup()
    guide = gx.guides.Amortized(items, encoder=Vector(10, 4))
    guide.setup()
    with pytest.raises(ValueError, match=r"\(\*batch, 10\), as in the model; got \(9,\)"):
        guide.draws({"y": torch.zeros(9)}, 1)


def numpy_simulator():
    """Counts of a branching process, by code that takes one number."""
    rate = pyro.sample("rate", dist.Gamma(3.0, 3.0))
    size, sizes = 5, []
    for _ in range(3):
        size = int(np.random.poisson(float(rate) * size)) if size < 1000 else 1000
        sizes.append(size)
    pyro.deterministic("y", torch.tensor(sizes))


def test_a_simulator_of_numbers(capsys):
    """Integers; the posterior is that of a gamma prior and Poisson counts."""
    with pytest.warns(UserWarning, match="run 400 times, one by one"):
        guide = fitted(numpy_simulator, simulations=400, epochs=10)
    y = torch.tensor([4, 6, 5])
    exact = dist.Gamma(3.0 + 15, 3.0 + 5 + 4 + 6)
    assert kl(guide, {"y": y}, lambda z: exact.log_prob(z["rate"])) < 0.2
    options = {"seed": 1, "vectorize": False, "progress": True}
    alone, found = (simulate(numpy_simulator, ["rate", "y"], 8, num_workers=n, **options) for n in (0, 2))
    assert capsys.readouterr().err.count("8/8 runs: simulated") == 2
    assert all(torch.equal(found[name], alone[name]) for name in found)


class Simulator(dist.TorchDistribution):
    """A normal variable without log_prob."""

    arg_constraints = {}
    support = dist.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Simulator(self.loc.expand(batch_shape))

    def sample(self, sample_shape=()):
        return self.loc + torch.randn((*sample_shape, *self.loc.shape))


@pytest.mark.parametrize("shared", [False, True])
def test_noise_outside_of_sites(shared):
    """A vectorised run has the same noise in all draws, so that the model runs one by one."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", Simulator(mu + torch.randn(()) if shared else mu))

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        draws = simulate(model, ["mu", "y"], 2000)
    assert any("the distribution of 'y' differs" in str(w.message) for w in found) == shared
    assert abs((draws["y"] - draws["mu"]).mean()) < 0.15
    assert (draws["y"] - draws["mu"]).var().item() == pytest.approx(1 + shared, rel=0.15)


def test_a_dataset_of_sets_of_different_sizes():
    mu, size = torch.randn(400), torch.randint(1, 6, (400,)).tolist()
    each = [{"mu": mu[i], "y": mu[i] + torch.randn(n)} for i, n in enumerate(size)]
    of_items(each, epochs=1)
    found = stacked(each)["y"]
    assert found.lengths.tolist() == size and torch.equal(found.values[7, : size[7]], each[7]["y"])
    with pytest.raises(ValueError, match="encoder is not one of sets or series; got a PaddedSequence"):
        gx.fit_amortized(items, gx.guides.Amortized(items, **SMALL), 5, simulations=each, **FAST)


def test_subsampled_data_of_global_latents():
    def model(y, batch=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("items", len(y), subsample_size=batch) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    guide = gx.guides.Amortized(model, encoder=DeepSet(1, 8, width=16), **SMALL)
    guide(torch.randn(20))
    with pytest.raises(ValueError, match=r"'items' without subsampling.*got 5 of 20"):
        guide(torch.randn(20), 5)


def test_stored_and_endless_simulations():
    mu = torch.randn(2000, 2)
    stored = {"mu": mu, "y": mu + 0.5 * torch.randn(2000, 2)}
    each = [{name: value[i] for name, value in stored.items()} for i in range(2000)]

    def endless():
        while True:
            mu = torch.randn(64, 2)
            yield {"mu": mu, "y": mu + 0.5 * torch.randn(64, 2)}

    for simulations in (stored, each, endless()):
        guide = gx.guides.Amortized(normal, **SMALL)
        gx.fit_amortized(normal, guide, simulations=simulations, epochs=1, **FAST)
        assert kl(guide, {"y": Y}, lambda z: EXACT.log_prob(z["mu"])) < 0.1


def test_constant_outputs_and_other_dtypes():
    mu = torch.randn(2000, 2, dtype=torch.float64)
    constant = {"mu": mu, "y": torch.stack([mu[:, 0], torch.full((2000,), 3.0)], 1)}
    guide = gx.guides.Amortized(normal, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gx.fit_amortized(normal, guide, simulations=constant, epochs=5, **FAST)
    draws = guide.draws({"y": torch.tensor([0.5, 3.0])}, 500)["mu"]
    assert (draws[:, 0] - 0.5).abs().mean() < 0.1 and 0.8 < draws[:, 1].std() < 1.2


def test_training_continues_and_has_the_options_of_fit(tmp_path):
    from lightning_fabric import Fabric

    class Stop(Exception):
        pass

    calls = []

    class Flaky(nn.Module):
        features = 2

        def forward(self, y):
            calls.append(0)
            if len(calls) == 60:
                raise Stop
            return y

    def run(encoder=None, **options):
        torch.manual_seed(0)
        guide = gx.guides.Amortized(normal, encoder=encoder or Flaky(), **SMALL)
        result = gx.fit_amortized(normal, guide, simulations=500, **{"epochs": 4, **FAST, **options})
        return result, guide.state_dict()

    file = {"checkpoint": tmp_path / "fit.ckpt", "every": 7}
    with pytest.raises(Stop):
        run(**file)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    weights = [run(**file)[1], run()[1], run(fabric=fabric)[1]]
    assert all(torch.equal(weights[0][name], w[name]) for w in weights for name in w)
    assert run(seconds=0.2, epochs=None)[0].stopped == "seconds"


def hidden_states(y=None):
    """A random walk of random length, whose states are latents: y given mu is normal with variance 1 + steps."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    state = mu
    for i in range(int(pyro.sample("steps", dist.Bernoulli(0.5), infer={"is_auxiliary": True})) + 1):
        state = pyro.sample(f"state_{i}", dist.Normal(state, 1.0))
    pyro.sample("y", dist.Normal(state, 1.0), obs=y)


def test_latents_that_are_averaged_over():
    """The posterior of mu is a mixture over the number of steps."""
    guide = gx.guides.Amortized(hidden_states, latents="mu", **SMALL)
    gx.fit_amortized(hidden_states, guide, simulations=2000, epochs=5, vectorize=False, **FAST)
    mu, y = torch.linspace(-6, 6, 601), torch.tensor(1.5)
    joint = dist.Normal(0.0, 1.0).log_prob(mu).exp() * sum(
        0.5 * dist.Normal(mu, (2.0 + n) ** 0.5).log_prob(y).exp() for n in range(2)
    )
    with torch.no_grad():
        density = guide.log_prob({"mu": mu}, {"y": y}).exp()
    assert (density - joint / (joint.sum() * 0.02)).abs().sum() * 0.02 < 0.15  # twice the total variation
    ranks = gx.diagnostics.sbc_ranks(
        hidden_states, guide, num_simulations=200, num_samples=19, vectorize=False, observed="y"
    )
    assert list(ranks) == ["mu"] and 8 < ranks["mu"].float().mean() < 11
    with pytest.raises(ValueError, match="in some runs only"):
        for seed in range(10):  # one of two runs has a state more
            torch.manual_seed(seed)
            gx.guides.Amortized(hidden_states).setup()


def test_rows_of_averaged_globals_are_joint():
    """Given y, rows with a common mean are dependent if this mean is averaged over."""
    guide = gx.guides.Amortized(groups, latents="z", **SMALL)
    gx.fit_amortized(groups, guide, 3, simulations=2000, epochs=6, **FAST)
    assert not guide.made().has_rows
    y = torch.tensor([0.5, 1.0, -1.0])
    prior = torch.ones(3, 3) + torch.eye(3)
    gain = torch.linalg.solve(prior + 0.25 * torch.eye(3), prior).T
    exact = dist.MultivariateNormal(gain @ y, _symmetric(prior - gain @ prior))
    assert kl(guide, {"y": y}, lambda z: exact.log_prob(z["z"])) < 0.05
    with pytest.raises(ValueError, match=r"\['w'\]"):
        gx.guides.Amortized(groups, latents=["z", "w"]).setup()
    with pytest.raises(ValueError, match="latents"):
        gx.guides.Amortized(groups, latents=())


def _symmetric(matrix):
    return (matrix + matrix.T) / 2
