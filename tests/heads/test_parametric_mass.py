"""Heads of every distribution that Pyro exports have mass one: quadrature and sums."""

from __future__ import annotations

import itertools
import math

import numpy
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_genexact.heads import Parametric, VonMises
from support.families import DISCRETE, HEADS, SCALARS, ends, mass_above, noise, unit
from support.values import draws


def cells(head, top=4000):
    """All values of a discrete site, or the first ones."""
    if head.site_shape:
        total = int(getattr(head.support, "upper_bound", 1))
        grid = torch.tensor(list(itertools.product(range(total + 1), repeat=head.site_shape[0]))).double()
        return grid[head.support.check(grid)]
    top = 1 if head.support is constraints.boolean else int(min(ends(head.support)[1], top))
    return torch.arange(top + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", [n for n in SCALARS if n not in DISCRETE])
@pytest.mark.parametrize("seed", range(3))
def test_mass_of_continuous_scalars(name, seed):
    head = HEADS[name]
    d = head(noise(head, 1, 1, seed=seed))
    low, high = ends(head.support)
    if math.isfinite(low):
        mass = mass_above(d, low, high)
        middle = float(draws(d))
    else:
        middle = float(d.loc)  # where Laplace's kink is
        mass = mass_above(d, middle, math.inf) + mass_above(d, middle, math.inf, sign=-1)
    assert abs(mass - 1) < 1e-6
    samples = draws(d, 4000, seed=seed + 1)
    above = mass_above(d, middle, high)
    assert abs(float((samples > middle).double().mean()) - above) < 4.5 * math.sqrt(above * (1 - above) / 4000)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("seed", range(3))
def test_mass_of_counts(name, seed):
    head = HEADS[name]
    d = head(noise(head, 1, 1, seed=seed))
    values = cells(head)
    p = d.log_prob(values.reshape(-1, 1, 1, *head.site_shape)).exp().flatten()
    assert abs(float(p.sum()) - 1) < 1e-10
    assert len(p) < 4001 or p[-1] * len(p) < 1e-12
    samples = draws(d, 4000, seed=seed + 1).double().flatten(0, 2)
    for value, mass in list(zip(values, p, strict=True))[:8]:
        hits = (samples == value).flatten(1).all(1) if head.site_shape else samples == value
        assert abs(float(hits.double().mean()) - mass) < 4.5 * math.sqrt(mass * (1 - mass) / 4000) + 1e-3


def plane(d, n=401):
    """Mass of a distribution of two real numbers, double exponential around the origin."""
    t = torch.linspace(-3.4, 3.4, n, dtype=torch.float64)
    x = torch.sinh(math.pi / 2 * torch.sinh(t))
    w = torch.cosh(math.pi / 2 * torch.sinh(t)) * math.pi / 2 * torch.cosh(t) * (t[1] - t[0])
    p = d.log_prob(torch.cartesian_prod(x, x)[:, None, None]).exp().flatten()
    return float((p * torch.cartesian_prod(w, w).prod(-1)).sum())


def square(d, n=200):
    x = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * math.pi / n) - math.pi
    return float(d.log_prob(torch.cartesian_prod(x, x)[:, None, None]).exp().mean()) * (2 * math.pi) ** 2


def circle(d, n=400):
    x = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * math.pi / n) - math.pi
    x = torch.stack([x.cos(), x.sin()], -1) if d.event_shape == (2,) else x[:, None]
    return float(d.log_prob(x[:, None, None]).exp().mean()) * 2 * math.pi


def segment(d):
    """Mass of a distribution on the simplex of two numbers."""
    x, rest, w = unit()
    return float((d.log_prob(torch.stack([x, rest], -1)[:, None, None]).exp().flatten() * w).sum())


@pytest.mark.parametrize(
    ("family", "shape", "fixed", "mass"),
    [
        (dist.MultivariateNormal, (2,), {}, plane),
        (dist.MultivariateStudentT, (2,), {}, plane),
        (dist.LowRankMultivariateNormal, (2,), {"rank": 1}, plane),
        (dist.MixtureOfDiagNormals, (2,), {"components": 3}, plane),
        (dist.MixtureOfDiagNormalsSharedCovariance, (2,), {"components": 3}, plane),
        (dist.Normal, (2,), {}, plane),
        (dist.StudentT, (2,), {"df": torch.tensor([3.0, 5.0])}, plane),
        (dist.SineBivariateVonMises, (), {}, square),
        (dist.VonMises, (2,), {}, square),
        (dist.SineSkewed, (1,), {"base_dist": VonMises((1,))}, circle),
        (dist.ProjectedNormal, (2,), {}, circle),
        (dist.Dirichlet, (2,), {}, segment),
        (dist.RelaxedOneHotCategorical, (2,), {"temperature": 0.7}, segment),
        (dist.LogisticNormal, (1,), {}, segment),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_mass_of_pairs(family, shape, fixed, mass, seed):
    head = Parametric(family, shape, **fixed)
    assert abs(mass(head(noise(head, 1, 1, seed=seed))) - 1) < 1e-6


def sphere(d):
    """Mass of a distribution on the sphere."""
    z, w = (torch.as_tensor(v) for v in numpy.polynomial.legendre.leggauss(60))
    angle = torch.arange(100, dtype=torch.float64) * (2 * math.pi / 100)
    r = (1 - z * z).sqrt()[:, None]
    x = torch.stack([r * angle.cos(), r * angle.sin(), z[:, None].expand(-1, 100)], -1)
    p = d.log_prob(x.reshape(-1, 1, 1, 3)).exp().reshape(60, 100)
    return float((p.mean(1) * 2 * math.pi * w).sum())


def test_mass_of_projected_normals():
    head = HEADS["ProjectedNormal"]
    assert abs(sphere(head(noise(head, 1, 1, spread=2.0))) - 1) < 1e-10


@pytest.mark.parametrize("kappa", [0.0, 1e-6, 1.0, 30.0])
def test_mass_of_von_mises_in_three_dimensions(kappa):
    mean = torch.tensor([2.0, -3.0, 6.0], dtype=torch.float64) / 7
    assert abs(sphere(HEADS["VonMises3D"]((kappa * mean).expand(1, 1, 3))) - 1) < 1e-10
