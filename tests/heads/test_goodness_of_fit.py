"""Samples of every scalar head, and of coordinates of vectors, by the chi-square statistic of bins of the exact density."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch.distributions import constraints

from pyro_genexact.families.repaired import REPAIRED
from support import families

ROWS, BINS, LEAST = 4000, 20, 0.01
HEADS = dict(families.HEADS)
del HEADS["StableWithLogProb"]  # another name of Stable
SCALARS = [name for name, head in HEADS.items() if head.site_shape == ()]


def predicted(head, seeds=3):
    """Distributions (seeds, 1) of parameters of spread 1."""
    phi = [torch.randn(1, head.num_params, generator=torch.Generator().manual_seed(s)) for s in range(seeds)]
    return head(torch.stack(phi).double())


def grid(support, steps=4001):
    """Nodes in ascending order, denser where densities may be infinite, and weights (double exponential quadrature)."""
    low, high = float(getattr(support, "lower_bound", -math.inf)), float(getattr(support, "upper_bound", math.inf))
    if support.is_discrete:
        top = 1.0 if support is constraints.boolean else min(high, 4000.0)
        x = torch.arange(top + 1, dtype=torch.float64)
        return x, torch.ones_like(x)
    t = torch.linspace(-4, 4, steps, dtype=torch.float64)
    u, du = math.pi / 2 * t.sinh(), math.pi / 2 * t.cosh() * (t[1] - t[0])
    if math.isfinite(high):
        part, rest = torch.sigmoid(2 * u), torch.sigmoid(-2 * u)
        x, dx = low + (high - low) * part, 2 * (high - low) * part * rest
    elif math.isfinite(low):
        x, dx = low + u.exp(), u.exp()
    else:
        x, dx = u.sinh(), u.cosh()
    inside = (x > low) & (x < high)
    return x[inside], (du * dx)[inside]


def p_values(samples, log_prob, nodes):
    """Of Pearson's test for each column of samples (rows, columns), by bins of about equal mass.

    Args:
        samples: to be tested.
        log_prob: of the nodes, shape (nodes, columns).
        nodes: of :func:`grid`, and their weights.
    """
    x, weights = nodes
    discrete = bool((weights == 1).all())
    found = []
    for column, p in zip(samples.double().T, (log_prob.exp() * weights[:, None]).T, strict=True):
        below = p.cumsum(0) - (0 if discrete else p / 2)
        assert abs(float(p.sum()) - 1) < 2e-3
        edges, masses = [], [0.0]
        for i in torch.searchsorted(below, torch.arange(1, BINS, dtype=torch.float64) / BINS).tolist():
            if below[i] - masses[-1] > LEAST and 1 - below[i] > LEAST:
                edges.append(float(x[i]))
                masses.append(float(below[i]))
        assert edges
        expected = len(column) * torch.tensor([*masses, 1.0], dtype=torch.float64).diff()
        bins = torch.searchsorted(torch.tensor(edges, dtype=torch.float64), column.contiguous())
        counts = torch.bincount(bins, minlength=len(expected))
        found.append(st.chi2.sf(float(((counts - expected).square() / expected).sum()), len(edges)))
    return found


def check(name, samplers=None, seed=0):
    """Samples of a head's distributions (columns, 1), by both its samplers or given ones, against their density."""
    d = predicted(HEADS[name], 2 if name == "Stable" else 3)  # whose density is slow
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        samplers = samplers or [type(d).sample] + [type(d).rsample] * d.has_rsample
        draws = [sampler(d, (ROWS,)).detach() for sampler in samplers]
    nodes = grid(HEADS[name].support, 1201 if name == "Stable" else 4001)
    log_prob = d.log_prob(nodes[0][:, None, None]).squeeze(-1)
    for samples in draws:
        found = p_values(samples.squeeze(-1), log_prob, nodes)
        assert min(found) > 1e-4, f"samples don't follow the density: p-values {found}"


@pytest.mark.parametrize("name", SCALARS)
def test_scalars(name):
    check(name)


def two_atoms(d, shape=()):
    """Of the right mean, and nearly the right variance."""
    sign = torch.randint(2, torch.Size(shape) + d.batch_shape).double() * 2 - 1
    return d.loc + 1.2 * sign * d.scale


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("SoftLaplace", two_atoms),
        ("Normal", lambda d, shape: dist.Normal(d.loc, 1.1 * d.scale).sample(shape)),
        ("Beta", lambda d, shape: dist.Beta(d.concentration0, d.concentration1).sample(shape)),
        ("Stable", lambda d, shape: d.sample(shape) + 0.2 * d.scale),
        ("Poisson", lambda d, shape: dist.Poisson(1.15 * d.rate).sample(shape)),
        ("Categorical", lambda d, shape: torch.randint(3, (*shape, *d.batch_shape))),
    ],
)
def test_power(name, wrong):
    with pytest.raises(AssertionError, match="samples don't follow the density"):
        check(name, [wrong])


@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_power_over_a_mutant(method, monkeypatch):
    monkeypatch.setattr(REPAIRED["SoftLaplace"], method, two_atoms)
    with pytest.raises(AssertionError, match="samples don't follow the density"):
        check("SoftLaplace")


def of_sum(d, covariance, family, **others):
    return family(loc=d.loc.sum(-1), scale=covariance.sum((-1, -2)).sqrt(), **others)


def first(a):
    """The parameters of the first coordinate, that of others summed."""
    return a[..., 0], a[..., 1:].sum(-1)


MARGINALS = {
    "MultivariateNormal": lambda d: of_sum(d, d.covariance_matrix, dist.Normal),
    "MultivariateStudentT": lambda d: of_sum(d, d.scale_tril @ d.scale_tril.mT, dist.StudentT, df=d.df),
    "LowRankMultivariateNormal": lambda d: of_sum(d, d.covariance_matrix, dist.Normal),
    "Dirichlet": lambda d: dist.Beta(*first(d.concentration)),
    "OneHotCategorical": lambda d: dist.Bernoulli(d.probs[..., 0]),
    "Multinomial": lambda d: dist.Binomial(4, d.probs[..., 0]),
    "DirichletMultinomial": lambda d: dist.BetaBinomial(*first(d.concentration), 4),
}
"""Of the sum of the coordinates where there is a location, else of the first one."""
COUNTS = constraints.integer_interval(0, 4)


def marginal_p_values(name, sampled=None, seed=0):
    d = predicted(HEADS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        samples = (sampled or d).sample((ROWS,))
    samples = samples.sum(-1) if hasattr(d, "loc") else samples[..., 0]
    marginal = MARGINALS[name](d)
    nodes = grid(COUNTS if name.endswith("Multinomial") else marginal.support)
    return p_values(samples.squeeze(-1), marginal.log_prob(nodes[0][:, None, None]).squeeze(-1), nodes)


@pytest.mark.parametrize("name", MARGINALS)
def test_vectors(name):
    assert min(marginal_p_values(name)) > 1e-4


@pytest.mark.parametrize("name", MARGINALS)
def test_power_of_vectors(name):
    """Samples of parameters 0."""
    head = HEADS[name]
    assert max(marginal_p_values(name, head(torch.zeros(3, 1, head.num_params).double()))) < 1e-4


def cosine_p_values(kappa_of_samples, kappa=2.0):
    """Of the cosine with the mean direction, of samples of one concentration and the density of another."""
    mean = torch.tensor([2.0, -3.0, 6.0], dtype=torch.float64) / 7
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = HEADS["VonMises3D"](kappa_of_samples * mean[None]).sample((ROWS,)) @ mean
    w, weights = grid(constraints.interval(-1.0, 1.0))
    x = w[:, None] * mean + (1 - w * w).sqrt()[:, None] * mean.new_tensor([3.0, 2.0, 0.0]) / math.sqrt(13)
    log_prob = HEADS["VonMises3D"](kappa * mean[None]).log_prob(x[:, None]) + math.log(2 * math.pi)
    return p_values(samples, log_prob, (w, weights))


def test_cosine_of_von_mises_in_three_dimensions():
    assert min(cosine_p_values(2.0)) > 1e-4
    assert max(cosine_p_values(1.7)) < 1e-4
