"""Amortised guides against posteriors in closed form, by quadrature and by enumeration."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import pyro_genexact as gx
from pyro_genexact import testing
from support.amortised import EXACT, SMALL, Y, fitted, groups, kl, normal


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


@pytest.mark.parametrize("ensemble", [1, 2])
def test_conjugate_normal(ensemble):
    guide = fitted(normal, ensemble=ensemble, epochs=4)
    assert kl(guide, {"y": Y}, lambda z: EXACT.log_prob(z["mu"])) < 0.03
    draws = guide.draws({"y": Y}, 20_000)["mu"]
    torch.testing.assert_close(draws.mean(0), EXACT.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(0), EXACT.stddev, atol=0.03, rtol=0)


def test_training_starts_at_the_linear_regression():
    """Which is the exact posterior here; a rate of 1e-9 leaves the weights of all four members as they are."""
    guide, y = gx.guides.Amortized(normal), torch.stack([Y, -Y])
    gx.fit_amortized(normal, guide, simulations=4000, epochs=1, lr=1e-9, progress=False)
    assert len(guide.made().members) == 4
    exact = dist.Normal(y / 1.25, (0.25 / 1.25) ** 0.5).to_event(1)
    mu = exact.sample((300,))
    with torch.no_grad():
        error = guide.log_prob({"mu": mu}, {"y": y}) - exact.log_prob(mu)
    assert error.abs().mean() < 0.1
    with pytest.raises(ValueError, match="ensemble"):
        gx.fit_amortized(normal, gx.guides.Amortized(normal), simulations=500, ensemble=0, progress=False)


def test_many_observations_in_one_call():
    guide, many = fitted(normal, epochs=1), torch.stack([Y, -Y, Y])
    draws = guide.draws({"y": many}, 5)
    assert draws["mu"].shape == (5, 3, 2)
    together = guide.log_prob(draws, {"y": many})
    alone = guide.log_prob({"mu": draws["mu"][:, 1]}, {"y": -Y})
    assert together.shape == (5, 3) and torch.allclose(together[:, 1], alone, atol=1e-4)
    assert guide.draws({"y": many[None]}, 2)["mu"].shape == (2, 1, 3, 2)
    assert guide.draws({"y": many[:0]}, 2)["mu"].shape == (2, 0, 2)


def supports(y=None):
    pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    pyro.sample("half", dist.Gamma(2.0, 1.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    ordered = dist.transforms.OrderedTransform()
    mu = pyro.sample("ordered", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [ordered]))
    pyro.sample("y", dist.Normal(mu.sum(-1), 1.0), obs=y)


@torch.no_grad()
def test_no_draw_outside_of_the_supports():
    """10^6 draws, with tails in which float32 rounds many values to the boundaries."""
    guide = gx.guides.Amortized(supports, recipe=gx.flows.iaf, transforms=1, hidden=(8,))
    testing.redraw(guide.setup())
    guide.network.members[0].of_all.scale.mul_(6)
    at = {
        name: site["fn"].support
        for name, site in pyro.poutine.trace(supports).get_trace().nodes.items()
        if "fn" in site
    }
    for chunk in range(10):
        draws = guide.draws({"y": torch.tensor(0.3)}, 100_000)
        assert all(at[name].check(value).all() for name, value in draws.items())
        if not chunk:  # the chunk does reach the boundaries
            assert (draws["interval"] > 2.9999995).any() and (
                draws["ordered"].diff() < 1e-6 * draws["ordered"].abs()[:, 1:]
            ).any()

    inside = {name: value[:3] for name, value in draws.items()}
    assert guide.log_prob(inside, {"y": torch.tensor(0.3)}).isfinite().all()
    for name, value in inside.items():  # also those outside have -inf
        found = guide.log_prob({**inside, name: -value - 4}, {"y": torch.tensor(0.3)})
        assert (found == -math.inf).all(), name


@torch.no_grad()
def test_draws_of_an_ensemble_come_from_all_its_members():
    network = gx.guides.Amortized(normal, **SMALL).setup(ensemble=2)
    for member, place in zip(network.members, (-20.0, 20.0), strict=True):
        member.of_all.shift.fill_(place)
    posterior = network(y=Y)
    for draws in (posterior.sample((2000,)), posterior.rsample((2000,))):
        positive = (draws > 0).float()
        assert torch.equal(positive[:, 0], positive[:, 1]) and 0.45 < positive.mean() < 0.55


def unit(y=None):
    p = pyro.sample("p", dist.Uniform(torch.zeros((), dtype=torch.float64), 2.0))
    s = pyro.sample("s", dist.Beta(torch.tensor(2.0, dtype=torch.float64), 1.0))
    pyro.sample("y", dist.Normal(p * s, 0.2), obs=y)


def test_density_integrates_to_1():
    guide, y = (
        fitted(unit, simulations=1000, epochs=2, recipe=gx.flows.nsf),
        torch.tensor(0.1, dtype=torch.float64),
    )  # the posterior is near an end
    draws = guide.draws({"y": y}, 1000)
    assert draws["p"].dtype == torch.float64 and ((draws["p"] > 0) & (draws["p"] < 2)).all()
    # points on the real line, where the integrand is smooth, mapped to the interval
    t = torch.linspace(-13, 13, 401, dtype=torch.float64)
    points, weight = t.sigmoid(), t.sigmoid() * (-t).sigmoid() * (t[1] - t[0])
    p, s = torch.meshgrid(2 * points, points, indexing="ij")
    with torch.no_grad():
        density = guide.log_prob({"p": p, "s": s}, {"y": y}).exp()
        grid = guide.log_prob({"p": 2 * points[:, None], "s": points}, {"y": y}).exp()  # broadcasts
    torch.testing.assert_close(grid, density)
    assert (density * 2 * weight[:, None] * weight).sum().item() == pytest.approx(1, abs=1e-4)
    edge = torch.tensor([2.5, 0.0, -1.0, 1.0], dtype=torch.float64)
    outside = guide.log_prob({"p": edge, "s": torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=torch.float64)}, {"y": y})
    assert (outside == -math.inf).all()


def test_rows_of_a_plate():
    """Also with another number of rows than in training, in which the rows of one number of rows suffice for z."""
    guide = fitted(groups, 4, simulations=3000, epochs=6)
    for rows in (4, 7):
        y = torch.linspace(-1, 2, rows)
        draws = guide.draws({"y": y}, 3000)
        assert draws["mu"].shape == (3000,) and draws["z"].shape == (3000, rows)
        # z given mu and y is normal with precision 1 + 4, so that its residuals are standard
        rest = (draws["z"] - (draws["mu"][:, None] + 4 * y) / 5) * 5**0.5
        assert rest.mean().abs() < 0.1 and (rest.std() - 1).abs() < 0.07
    y = y[:4]
    cov = torch.ones(5, 5) + torch.diag(torch.tensor([0.0, 1, 1, 1, 1]))  # prior of (mu, z)
    exact = _conditional(cov, slice(1, 5), y)
    joint = lambda z: exact.log_prob(torch.cat([z["mu"][:, None], z["z"]], 1))  # noqa: E731
    assert kl(guide, {"y": y}, joint) < 0.1


def _conditional(cov, of_y, y, size=None, noise=0.25):
    """The Gaussian posterior of the first elements of x with covariance ``cov`` given a slice, observed with noise."""
    gain = torch.linalg.solve(cov[of_y, of_y] + noise * torch.eye(len(y)), cov[of_y]).T
    rest = cov - gain @ cov[of_y]
    return MultivariateNormal((gain @ y)[:size], ((rest + rest.T) / 2)[:size, :size])


def crossed(y=None):
    columns = pyro.plate("columns", 2, dim=-1)
    with columns:
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, torch.ones(1)))
        with columns:
            pyro.sample("y", dist.Normal(u + v, 0.5), obs=y)


def test_crossed_plates():
    """Rows with their own latents, and a plate of latents that all rows share."""
    guide, y = fitted(crossed, simulations=2000, epochs=6), torch.tensor([[0.5, -1.0], [1.0, 0.0], [0.2, 0.1]])
    draws = guide.draws({"y": y}, 2)
    assert draws["u"].shape == (2, 3, 1) and draws["v"].shape == (2, 2)
    # x = (u, v, u + v), and the last six are observed
    of_row, of_column = torch.eye(3).repeat_interleave(2, 0), torch.eye(2).repeat(3, 1)
    x = torch.cat([torch.eye(5), torch.cat([of_row, of_column], 1)])
    exact = _conditional(x @ x.T, slice(5, 11), y.flatten(), 5)
    joint = lambda z: exact.log_prob(torch.cat([z["u"].flatten(1), z["v"]], 1))  # noqa: E731
    assert kl(guide, {"y": y}, joint) < 0.15


def nested(y=None):
    with pyro.plate("groups", 2, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(1)))
        with pyro.plate("members", 3, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(w, 0.5), obs=y)


def test_nested_plates():
    guide, y = fitted(nested, simulations=2000, epochs=6), torch.tensor([[0.5, -1.0, 0.3], [1.0, 0.0, 2.0]])
    cov = torch.ones(4, 4) + torch.diag(torch.tensor([0.0, 1, 1, 1]))
    each = [_conditional(cov, slice(1, 4), y[i]) for i in range(2)]
    draws = guide.draws({"y": y}, 2)
    assert draws["z"].shape == (2, 2, 1) and draws["w"].shape == (2, 2, 3)
    joint = lambda z: sum(e.log_prob(torch.cat([z["z"], z["w"]], -1)[:, i]) for i, e in enumerate(each))  # noqa: E731
    assert kl(guide, {"y": y}, joint) < 0.15


def summed(y=None, total=None):
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)
    pyro.sample("total", dist.Normal(z.sum(-1), 0.1), obs=total)


def test_rows_that_depend_on_each_other():
    """The observed sum makes the rows dependent, so that their posterior is no product."""
    z = torch.randn(2000, 2)
    simulations = {"z": z, "y": z + 0.5 * torch.randn(2000, 2), "total": z.sum(-1) + 0.1 * torch.randn(2000)}
    guide = fitted(summed, observed=("y", "total"), simulations=simulations)
    data = {"y": Y, "total": torch.tensor(1.5)}
    x = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 2], [10, 10]])  # the last three are observed with noise 1
    exact = _conditional(x @ x.T, slice(2, 5), torch.cat([2 * Y, torch.tensor([15.0])]), 2, noise=1.0)
    assert kl(guide, data, lambda z: exact.log_prob(z["z"])) < 0.03


def hidden(number):
    def program():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Uniform(torch.zeros(2), torch.ones(2)))
            pyro.sample("y", dist.Normal(z, 0.5))
        pyro.deterministic("total", torch.as_tensor(number(z)))

    return program


def test_dependences_that_only_values_show():
    for number, plate in (
        (lambda z: sum(map(float, z)), None),
        (lambda z: z.numpy().max(), None),
        (lambda z: np.random.normal() + 0 * float(z[0]), "rows"),
    ):
        guide = gx.guides.Amortized(hidden(number), ("y", "total"))
        guide.setup()
        assert [x.row for x in guide.latents] == [None if plate is None else -1]


def mixed(y=None):
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    x = pyro.sample("x", dist.Normal(torch.tensor([-2.0, 0.0, 2.0])[k], 1.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def test_discrete_and_continuous_latents():
    guide, y = fitted(mixed, simulations=4000, epochs=6), torch.tensor(0.7)
    loc = torch.tensor([-2.0, 0.0, 2.0])
    exact = torch.tensor([0.5, 0.3, 0.2]) * dist.Normal(loc, 1.25**0.5).log_prob(y).exp()
    exact = exact / exact.sum()
    draws = guide.draws({"y": y}, 4000)
    assert draws["k"].dtype == torch.long
    assert torch.allclose(draws["k"].bincount(minlength=3) / 4000, exact, atol=0.06)
    given = lambda z: dist.Normal((loc[z["k"]] + 4 * y) / 5, 0.2**0.5).log_prob(z["x"])  # noqa: E731
    assert kl(guide, {"y": y}, lambda z: exact.log()[z["k"]] + given(z)) < 0.03


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_each_draw_comes_from_one_member(batch):
    """Members that are far apart: the draws of each have its regression on their own observation."""
    guide = fitted(groups, 4, ensemble=3, epochs=1, simulations=500)
    for k, member in enumerate(guide.network.members):
        member.of_row.shift += 1000.0 * k
    y = torch.arange(math.prod(batch) * 4.0).reshape(*batch, 4)
    with torch.no_grad():
        z = guide.posterior({"y": y}).rsample((600,))[..., 1:]
    assert z.shape == (600, *batch, 4)
    which = (z / 1000.0).round()
    assert (which == which[..., :1]).all()
    rest = (z - 1000.0 * which - 0.8 * y).mean(0)
    assert (rest / (1 + y)).abs().max() < 0.3
    share = torch.stack([(which == k).float().mean((0, -1)) for k in range(3)])
    assert (share - 1 / 3).abs().max() < 0.08  # four standard errors
