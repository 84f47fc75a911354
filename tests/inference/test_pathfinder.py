"""Pathfinder and its warm starts: exact for Gaussians, several modes, starts that fail."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.inference.density import Density
from pyro_genexact.inference.lanczos import low_rank_laplace
from pyro_genexact.inference.pathfinder import ranked
from pyro_genexact.inference.paths import ascend, gaussians
from support.latents import DOUBLE, gaussian_of, still

FACTOR = torch.tensor(
    [[1.0, 0, 0, 0, 0], [0.5, 2, 0, 0, 0], [-1, 0.3, 0.6, 0, 0], [0.2, 0.1, -0.4, 1, 0], [3, -1, 0.5, 0.7, 0.4]],
    **DOUBLE,
)
CENTRE = torch.arange(5.0, **DOUBLE)


def correlated():
    pyro.sample("z", dist.MultivariateNormal(CENTRE, scale_tril=FACTOR))


def two_modes():
    """Weights 0.7 and 0.3 at -3 and 3 in each of 10 dims, standard deviations 0.5."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (10,)))
    parts = [math.log(w) + dist.Normal(m, 0.5).log_prob(z).sum(-1) for w, m in ((0.7, -3.0), (0.3, 3.0))]
    pyro.factor("density", torch.stack(parts).logsumexp(0))


def explosive(y):
    """A moving average: |theta| > 1 makes the residuals of the loop overflow."""
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    residual, terms = y[0], []
    for value in y[1:]:
        terms.append(theta * residual)
        residual = value - terms[-1]
    with pyro.plate("times", len(y) - 1):
        pyro.sample("y", dist.Normal(torch.stack(terms), 0.5), obs=y[1:])


def test_a_gaussian_is_found_exactly():
    torch.manual_seed(0)
    density = Density(correlated)
    paths = ascend(density, density.starts(4))
    covariance = FACTOR @ FACTOR.mT
    for path in paths:
        *_, (mean, found) = gaussians(path)  # secants along exact line searches end at the inverse Hessian
        torch.testing.assert_close(mean, CENTRE, atol=1e-3, rtol=0)
        torch.testing.assert_close(found, covariance, atol=1e-3, rtol=1e-3)
    elbo, best = ranked(density, paths)[0]
    assert abs(elbo) < 1e-3  # the log evidence is 0
    torch.testing.assert_close(best.root, FACTOR, atol=1e-3, rtol=1e-3)


def test_importance_weights_of_a_gaussian():
    torch.manual_seed(0)
    result = gx.diagnostics.pathfinder(correlated, paths=4, num_samples=2000)
    assert result.khat < 0.5 and result.ess > 1500
    assert result.log_evidence == pytest.approx(0.0, abs=0.03)
    mean = result.expectation(lambda d: d["z"])
    assert ((mean - CENTRE) / FACTOR.norm(dim=1)).abs().max() < 0.1


def test_two_modes_have_their_weights_however_many_paths_reach_each():
    torch.manual_seed(0)
    density = Density(two_modes)
    starts = torch.linspace(-2, 1.5, 7, **DOUBLE)[:, None] + torch.zeros(10, **DOUBLE)
    density.starts(4)
    ends = torch.stack([path[-1].point.mean() for path in ascend(density, starts)])
    assert set(ends.round().int().tolist()) == {-3, 3} and (ends < 0).sum() > 3
    result = gx.diagnostics.pathfinder(two_modes, paths=8)
    weight = result.expectation(lambda d: (d["z"].mean(1) < 0).double())
    assert result.khat < 0.7 and result.log_evidence == pytest.approx(0.0, abs=0.1)
    assert weight.item() == pytest.approx(0.7, abs=0.05)


def test_a_path_without_a_density_does_not_spoil_the_others():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("density", dist.Normal(1.0, 0.1).log_prob(z) + (2 - z).sqrt().log())

    density = Density(model)
    density.starts(8)
    starts = torch.tensor([[0.0], [5.0], [math.nan], [1.9]])
    paths = ascend(density, starts)
    assert [bool(path) for path in paths] == [True, False, False, True]
    mode = 1.5 - 0.255**0.5  # zero of 100 (1 - z) - 1 / (4 - 2 z)
    for path in (paths[0], paths[3]):
        assert path[-1].point.item() == pytest.approx(mode, abs=1e-4)


@pytest.mark.parametrize("warm_start", ["laplace", "pathfinder"])
def test_the_first_start_may_overflow(warm_start):
    y = torch.randn(200, generator=torch.Generator().manual_seed(0))
    y = 0.5 * (y[1:] + 0.6 * y[:-1])
    start = init_to_value(values={"theta": torch.tensor(-3.0)})
    guide = gx.guides.AutoFlow(explosive, hidden=(4,), init_loc_fn=start, warm_start=warm_start)
    with pyro.validation_enabled(False):
        guide(y)
    loc, tril = gaussian_of(guide)
    grid = torch.linspace(-1, 1, 801, **DOUBLE)
    residual, log_p = y[0].double().expand(801), dist.Normal(0.0, 2.0).log_prob(grid)
    for value in y[1:].double():
        log_p = log_p + dist.Normal(grid * residual, 0.5).log_prob(value)
        residual = value - grid * residual
    weight = log_p.softmax(0)
    mean = (weight * grid).sum()
    assert loc.item() == pytest.approx(mean.item(), abs=0.02)
    assert tril.item() == pytest.approx((weight * (grid - mean) ** 2).sum().sqrt().item(), rel=0.15)


def test_where_there_is_no_mode_pathfinder_is_better_than_laplace():
    """A funnel, whose log evidence is 0."""

    def funnel():
        v = pyro.sample("v", dist.Normal(torch.zeros((), **DOUBLE), 3.0))
        with pyro.plate("rows", 4):
            pyro.sample("x", dist.Normal(torch.zeros((), **DOUBLE), (v / 2).exp()))

    elbos = []
    for warm_start in ("laplace", "pathfinder"):
        torch.manual_seed(0)
        guide = gx.guides.AutoFlow(funnel, still, warm_start=warm_start)
        guide()
        elbos.append(gx.diagnostics.psis(funnel, guide, num_samples=2000).elbo)
    assert elbos[1] > elbos[0] + 1


@pytest.mark.parametrize("size", [5, 101])  # dense, and of limited memory
def test_nothing_is_made_on_the_default_device(size):
    centre = torch.ones(size, **DOUBLE)

    def model():
        pyro.sample("z", dist.Normal(centre, 1.0).to_event(1))

    def run():
        density = Density(model)
        root = low_rank_laplace(density, centre, 2)
        return gx.diagnostics.pathfinder(model, paths=2, num_samples=100).draws["z"], *root.watched()

    gx.testing.device(run)


def test_errors():
    def subsampled():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(10.0)[rows])

    def never():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.tensor(-torch.inf))

    with pytest.raises(ValueError, match=r"Expected plates without subsampling .*rows"):
        gx.diagnostics.pathfinder(subsampled)
    with pytest.raises(ValueError, match="Expected a start of finite density and positive curvature"):
        gx.diagnostics.pathfinder(never)
    for name, value in (("paths", 0), ("num_samples", 10)):
        with pytest.raises(ValueError, match=name):
            gx.diagnostics.pathfinder(correlated, **{name: value})
