"""Tail probabilities of observations: uniform for the model's own, small for others, and a warning only for these."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact.simulation import fit_amortized as fitting
from pyro_genexact.simulation.simulations import simulate
from pyro_genexact.simulation.typicality import Typicality


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)


def model(y=None):
    """Two real numbers around a ring, a count, and a constant."""
    angle = pyro.sample("angle", dist.Uniform(0.0, 2 * math.pi))
    ring = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle + 2], -1)
    noise = pyro.sample("noise", dist.Normal(torch.zeros(2), 0.1).to_event(1))
    count = pyro.sample("count", dist.Binomial(4, torch.tensor(0.5)))
    shifts = torch.stack([noise[..., 0], noise[..., 1], count, 0 * count], -1)
    pyro.deterministic("y", ring + shifts, event_dim=1)


def simulated(size, seed):
    return simulate(model, ["y"], size, seed=seed, vectorize=True)


@pytest.fixture(scope="module")
def guide():
    pyro.set_rng_seed(0)
    guide = gx.guides.Amortized(model, hidden=(8,), transforms=1)
    gx.fit_amortized(model, guide, simulations=4000, epochs=1, ensemble=2, progress=False)
    return guide


UNLIKE = {
    "shifted": [9.0, 0.0, 2.0, 2.0],
    "far": [1e30, 0.0, 2.0, 2.0],
    "within the ring": [0.0, 0.0, 2.0, 2.0],
    "large count": [1.0, 0.0, 40.0, 2.0],
    "another constant": [1.0, 0.0, 2.0, 2.1],
}


def test_rate_for_observations_of_the_model(guide):
    new = simulated(4000, seed=9)
    p = guide.tail_probability(new)
    for level in (0.01, 0.1, 0.5):
        error = (level * (1 - level) * (1 / 4000 + 1 / 2000)) ** 0.5  # of the new and of the kept simulations
        assert abs((p <= level).double().mean() - level) < 4 * error
    n = int(guide.typicality.count())
    assert n == 2000 and (p >= 0.999 / (n + 1)).all()
    lowest = (p < 1.5 / (n + 1)).double().sum()
    assert lowest <= 12  # the expected number is 2, with a geometric distribution
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for i in range(100):
            guide.draws({"y": new["y"][i]}, 1)
        guide.draws(new, 1)
    assert len(found) <= 1


@pytest.mark.parametrize("kind", UNLIKE)
def test_observations_unlike_all_simulations(guide, kind):
    y = torch.tensor(UNLIKE[kind])
    assert guide.tail_probability({"y": y}) < 0.01
    if kind != "within the ring":
        with pytest.warns(UserWarning, match="The observation is less probable than all of 2000 simulations"):
            guide.draws({"y": y}, 3)


def test_one_warning_for_a_batch(guide):
    y = simulated(30, seed=3)["y"]
    y[::10, 3] += 1.0
    with pytest.warns(UserWarning, match="^3 of 30 observations are less probable") as found:
        guide.draws({"y": y.reshape(5, 6, 4)}, 2)
    assert len(found) == 1 and found[0].filename == __file__
    assert guide.tail_probability({"y": y.reshape(5, 6, 4)}).shape == (5, 6)


def test_state_of_a_guide(guide):
    y = {"y": torch.tensor(UNLIKE["shifted"])}
    other = gx.guides.Amortized(model, hidden=(8,), transforms=1)
    other.setup(ensemble=2)
    with pytest.raises(RuntimeError, match="Fit the guide by fit_amortized"):
        other.tail_probability(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.draws(y, 1)
    other.load_state_dict(guide.state_dict())
    new = simulated(20, seed=4)
    assert torch.equal(other.tail_probability(new), guide.tail_probability(new))


def groups(n=3, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", n):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def test_rows_and_endless_simulations(monkeypatch):
    """An observation is as unlike as its most unlike row; with more rows, it takes more to be so."""
    monkeypatch.setattr(fitting, "FIRST", 1000)
    monkeypatch.setattr(fitting, "BATCHES", 2)

    def endless():
        while True:
            mu = torch.randn(500)
            z = mu[:, None] + torch.randn(500, 3)
            yield {"mu": mu, "z": z, "y": z + 0.5 * torch.randn(500, 3)}

    guide = gx.guides.Amortized(groups, hidden=(8,), transforms=1)
    gx.fit_amortized(groups, guide, simulations=endless(), epochs=1, progress=False)
    p = guide.tail_probability({"y": next(endless())["y"]})
    assert abs((p <= 0.1).double().mean() - 0.1) < 0.06
    with pytest.warns(UserWarning, match="less probable than all of 500"):
        guide.draws({"y": torch.tensor([0.0, 9.0, 0.0, 1.0])}, 1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.draws({"y": torch.tensor([0.0, 9.0] * 100)}, 1, 200)


def test_features_that_are_all_constant():
    typicality = Typicality(3)
    typicality.fit(torch.full((40, 3), 2.0), False, 0)
    assert typicality.tail(typicality(torch.tensor([[2.0, 2.0, 2.0], [2.0, 2.0, 2.5]]))).tolist() == pytest.approx(
        [1.0, 1 / 21]
    )


@pytest.mark.parametrize("seed", range(4))
def test_equal_observations_are_equally_typical(seed):
    """In a batch, alone and in another precision, in spite of rounding."""
    torch.manual_seed(seed)
    points = torch.randn(3, 5)
    typicality = Typicality(5)
    typicality.fit(points[torch.randint(3, (600,))], False, seed)
    p = typicality.tail(typicality(points))
    assert sorted(p.tolist()) == pytest.approx([1 / 3, 2 / 3, 1.0], abs=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float64):
            for point, expected in zip(points.to(dtype), p, strict=True):
                typicality.to(dtype).warn(point, False)
                assert typicality.tail(typicality(point)) == pytest.approx(expected.item(), abs=1e-6)
