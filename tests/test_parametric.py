"""Heads of every distribution that Pyro exports, against quadrature, enumeration and SciPy."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import numpy
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch.distributions import constraints

from pyro_genexact.families.guard import contains, guarded_log_prob
from pyro_genexact.heads import parametric
from pyro_genexact.heads.parametric import Normal, Parametric, VonMises
from pyro_genexact.heads.table import families, markdown

ROWS = families()
HEADS = {row.name: row.head for row in ROWS if row.head is not None}
SCALARS = [n for n, h in HEADS.items() if h.site_shape == ()]
DISCRETE = [n for n, h in HEADS.items() if h.support.is_discrete]
EVERY = pytest.mark.parametrize("name", HEADS)


def noise(head, *batch, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*batch, head.num_params, generator=generator, dtype=torch.float64)


def draws(d, *shape, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return d.sample(shape)


def ends(support):
    support = support if not isinstance(support, constraints.independent) else support.base_constraint
    low, high = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    return float(low), float(high)


def from_0(n=3001):
    """Nodes and weights for (0, inf), double exponential."""
    t = torch.linspace(-4.6, 4.6, n, dtype=torch.float64)
    x = torch.exp(math.pi / 2 * torch.sinh(t))
    return x, x * math.pi / 2 * torch.cosh(t) * (t[1] - t[0])


def unit(n=3001):
    """Nodes x, their 1 - x, and weights for (0, 1), double exponential."""
    t = torch.linspace(-3.9, 3.9, n, dtype=torch.float64)
    u = math.pi * torch.sinh(t)
    x, rest = torch.sigmoid(u), torch.sigmoid(-u)
    return x, rest, x * rest * math.pi * torch.cosh(t) * (t[1] - t[0])


def mass_above(d, low, high, sign=1):
    """Mass of a scalar distribution of batch (1, 1) between low and high, or from low on to +inf or -inf."""
    if math.isfinite(high):
        x, _, w = unit()
        x, w = low + (high - low) * x, (high - low) * w
        inner = (x > low) & (high - x > 1e-15 * (1 + abs(high)))  # below that the end is a rounding away
        x, w = x[inner], w[inner]
    else:
        x, w = from_0()
        x = low + sign * x
        x, w = x[x != low], w[x != low]
    return float((d.log_prob(x[:, None, None]).exp()[:, 0, 0] * w).nansum())


def cells(head, top=4000):
    """All values of a discrete site, or the first ones."""
    if head.site_shape:
        total = int(getattr(head.support, "upper_bound", 1))
        grid = torch.tensor(list(itertools.product(range(total + 1), repeat=head.site_shape[0]))).double()
        return grid[head.support.check(grid)]
    top = 1 if head.support is constraints.boolean else int(min(ends(head.support)[1], top))
    return torch.arange(top + 1, dtype=torch.float64)


def test_at_least_sixty():
    assert len(HEADS) >= 60
    assert all(row.reason for row in ROWS if row.head is None)
    assert markdown().count("\n") == len(ROWS) + 4


@EVERY
def test_shapes_and_start(name):
    head = HEADS[name]
    d = head(torch.zeros(2, 3, head.num_params, dtype=torch.float64))
    value = draws(d, 5)
    assert d.batch_shape == (2, 3) and d.event_shape == head.site_shape and value.shape == (5, 2, 3, *head.site_shape)
    assert head.support.event_dim == len(head.site_shape) and d.has_rsample == head.has_rsample
    assert contains(head.support, value).all()
    assert d.log_prob(value).isfinite().all() and d.log_prob(value).shape == (5, 2, 3)
    one = head(torch.zeros(1, head.num_params, dtype=torch.float64))
    assert torch.allclose(one.log_prob(value[:, 0, :1]), d.log_prob(value)[:, 0, :1])
    base = d.base_dist if len(head._lead) else d
    for part in head._plan:  # nothing saturated, scales of 1
        start = getattr(base, part.name, None)
        if start is not None:
            assert start.abs().max() <= 4.0
            if "scale" in part.name and "tril" not in part.name:
                assert torch.equal(start, torch.ones_like(start))


@EVERY
def test_every_parameter_has_a_gradient(name):
    head = HEADS[name]
    phi = noise(head, 8, 3).requires_grad_()
    d = head(phi)
    if head.num_params:
        d.log_prob(draws(d)).sum().backward()
        assert (phi.grad.abs().amax((0, 1)) > 0).all()
    if head.has_rsample and head.num_params:
        (grad,) = torch.autograd.grad(
            (head(phi).rsample() * noise(head, 8, 3, seed=5).sum(-1).reshape(8, 3, *[1] * len(head.site_shape)))
            .cos()
            .sum(),
            phi,
        )
        assert grad.isfinite().all() and (grad.abs().amax((0, 1)) > 0).all()


@EVERY
def test_samples_follow_the_density(name):
    """The mean of the score, d log p / d phi, is 0 if they do."""
    head = HEADS[name]
    rows = 100 if name == "SineBivariateVonMises" else 2000  # whose normaliser is slow
    phi = noise(head, 1, 1).expand(rows, 1, -1).clone().requires_grad_()
    if not head.num_params:
        return
    d = head(phi)
    value = draws(d)
    assert not value.requires_grad
    (score,) = torch.autograd.grad(d.log_prob(value).sum(), phi)
    score = score[:, 0]
    assert (score.mean(0).abs() < 4.5 * score.std(0) / math.sqrt(rows) + 1e-12).all()


@EVERY
@pytest.mark.parametrize("size", [1e4, -1e4, 1e8, -1e8, None])
def test_extreme_parameters(name, size):
    head = HEADS[name]
    value = draws(head(torch.zeros(4, 3, head.num_params, dtype=torch.float64)))
    phi = noise(head, 4, 3, spread=1e8) if size is None else torch.full((4, 3, head.num_params), size).double()
    log_prob = head(phi.requires_grad_()).log_prob(value)
    # exp(-exp(1e8)) is no number
    assert log_prob.isfinite().all() or (name == "Gumbel" and not log_prob.isnan().any())
    if head.num_params:
        log_prob.sum().backward()
        assert phi.grad.isfinite().all()


FAR = {
    "line": [1e4, -1e4, 1e8, -1e8, 1e30],
    "half": [1e-300, 1e-30, 1e-8, 1e4, 1e8, 1e30],
    "interval": [1e-9, 1 - 1e-9],
    "counts": [0.0, 1e4, 1e6, 1e8],
}


@pytest.mark.parametrize("name", SCALARS)
def test_far_values(name):
    head = HEADS[name]
    low, high = ends(head.support)
    if name in DISCRETE:
        values = FAR["counts"] if high == math.inf and head.support is not constraints.boolean else []
    elif math.isfinite(high):
        values = [low + (high - low) * v for v in FAR["interval"]]
    else:
        values = [low + v for v in FAR["half"]] if math.isfinite(low) else FAR["line"]
    for value in values:
        phi = noise(head, 3, 1).requires_grad_()
        log_prob = head(phi).log_prob(torch.tensor(value, dtype=torch.float64))
        beyond = name == "Gumbel" and value < 0  # exp(-exp(1e4)) is no number
        assert torch.equal(log_prob, torch.full_like(log_prob, -math.inf)) if beyond else log_prob.isfinite().all()
        if head.num_params:
            log_prob.sum().backward()
            assert phi.grad.isfinite().all()


@pytest.mark.parametrize("name", ["AffineBeta", "Beta", "Chi2", "Gamma", "Kumaraswamy", "RelaxedBernoulli", "Uniform"])
def test_ends(name):
    """Densities may be infinite at the ends, which are no part of the support."""
    support = HEADS[name].support
    for end in ends(support)[:: -1 if name == "Uniform" else 1][: 1 if name == "Uniform" else 2]:
        if math.isfinite(end):
            log_prob = guarded_log_prob(HEADS[name](noise(HEADS[name], 1, 1)), torch.tensor(end).double(), support)
            assert float(log_prob) == -math.inf
    for vectors in ("Dirichlet", "RelaxedOneHotCategorical"):
        assert not HEADS[vectors].support.check(torch.tensor([1.0, 0.0, 0.0]))
        assert HEADS[vectors].support.check(torch.tensor([0.5, 0.25, 0.25]))


@EVERY
def test_outside(name):
    head = HEADS[name]
    phi = noise(head, 3, 2).requires_grad_()
    d = head(phi)
    inside = draws(d).double()
    low, high = ends(head.support)
    outside = [torch.full_like(inside, math.inf), inside * math.nan]
    if name in DISCRETE:
        outside += [inside + 0.5, inside - 100]
    elif math.isfinite(low) or math.isfinite(high):
        outside += [torch.full_like(inside, low - 1 if math.isfinite(low) else high + 1)]
    if head.site_shape and (name in DISCRETE or not isinstance(head.support, constraints.independent)):
        outside += [inside * 0, inside * 2]
    for value in outside:
        log_prob = guarded_log_prob(head(phi), value, head.support)
        assert torch.equal(log_prob, torch.full_like(log_prob, -math.inf))
        if head.num_params:
            (grad,) = torch.autograd.grad(log_prob.sum(), phi)
            assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.allclose(guarded_log_prob(d, inside, head.support), d.log_prob(inside))


@EVERY
def test_copies_and_dtypes(name):
    head = HEADS[name]
    phi = noise(head, 2, 3)
    d = head(phi)
    value = draws(d)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), copy.deepcopy(head).double()):
        assert torch.allclose(twin(phi).log_prob(value), d.log_prob(value)) and repr(twin) == repr(head)
        assert contains(twin.support, value).all()
    single = head(phi.float())
    small = draws(single)
    assert small.dtype in (torch.float32, torch.int64) and single.log_prob(small).dtype == torch.float32
    assert torch.allclose(single.log_prob(small).double(), d.log_prob(small.to(value)), rtol=1e-3, atol=1e-3)
    if name != "SineBivariateVonMises":  # makes tensors on the default device
        with torch.device("meta"):
            assert torch.allclose(head(phi).log_prob(value), d.log_prob(value))
    assert set(head.state_dict()) <= {setting.split("=")[0] for setting in head._settings}


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


SCIPY = {
    "AffineBeta": lambda d: st.beta(d.concentration1, d.concentration0, -1, 3),
    "AsymmetricLaplace": lambda d: st.laplace_asymmetric(d.asymmetry, d.loc, d.scale),
    "Bernoulli": lambda d: st.bernoulli(d.probs),
    "Beta": lambda d: st.beta(d.concentration1, d.concentration0),
    "BetaBinomial": lambda d: st.betabinom(7, d.concentration1, d.concentration0),
    "Binomial": lambda d: st.binom(7, d.probs),
    "Cauchy": lambda d: st.cauchy(d.loc, d.scale),
    "Chi2": lambda d: st.chi2(d.df),
    "Exponential": lambda d: st.expon(scale=1 / d.rate),
    "FisherSnedecor": lambda d: st.f(d.df1, d.df2),
    "Gamma": lambda d: st.gamma(d.concentration, scale=1 / d.rate),
    "GammaPoisson": lambda d: st.nbinom(d.concentration, d.rate / (1 + d.rate)),
    "GeneralizedPareto": lambda d: st.genpareto(d.concentration, d.loc, d.scale),
    "Geometric": lambda d: st.geom(d.probs, loc=-1),
    "Gumbel": lambda d: st.gumbel_r(d.loc, d.scale),
    "HalfCauchy": lambda d: st.halfcauchy(scale=d.scale),
    "HalfNormal": lambda d: st.halfnorm(scale=d.scale),
    "InverseGamma": lambda d: st.invgamma(d.concentration, scale=d.rate),
    "Laplace": lambda d: st.laplace(d.loc, d.scale),
    "LogNormal": lambda d: st.lognorm(d.scale, scale=d.loc.exp()),
    "Logistic": lambda d: st.logistic(d.loc, d.scale),
    "NegativeBinomial": lambda d: st.nbinom(d.total_count, 1 - d.probs),
    "Normal": lambda d: st.norm(d.loc, d.scale),
    "Pareto": lambda d: st.pareto(d.alpha, scale=d.scale),
    "Poisson": lambda d: st.poisson(d.rate),
    "StudentT": lambda d: st.t(d.df, d.loc, d.scale),
    "Uniform": lambda d: st.uniform(-1, 3),
    "VonMises": lambda d: st.vonmises(d.concentration, d.loc),
    "Weibull": lambda d: st.weibull_min(d.concentration, scale=d.scale),
}


@pytest.mark.parametrize("name", [name for name in SCIPY if name in HEADS])
def test_scipy(name):
    d = HEADS[name](noise(HEADS[name], 5, 3, spread=0.7))
    value = draws(d)
    theirs = SCIPY[name](d)
    theirs = theirs.logpmf(value) if name in DISCRETE else theirs.logpdf(value)
    # torch's Bessel functions of VonMises are good to 1e-7
    assert torch.allclose(
        d.log_prob(value), torch.as_tensor(theirs), rtol=1e-8, atol=1e-6 if name == "VonMises" else 1e-8
    )


def test_scipy_of_larger_vectors():
    head = Parametric(dist.MultivariateNormal, (5,))
    phi = noise(head, 1, 1, spread=0.7)
    d = head(phi)
    value = draws(d)
    factor = torch.diag((10 * torch.tanh(phi[0, 0, 5:10] / 10)).exp())
    factor[torch.tril_indices(5, 5, -1).unbind()] = phi[0, 0, 10:]
    theirs = st.multivariate_normal(phi[0, 0, :5], factor @ factor.T).logpdf(value[0, 0])
    assert abs(float(d.log_prob(value)) - theirs) < 1e-10
    head = Parametric(dist.MultivariateStudentT, (4,), df=3.0)
    d = head(noise(head, 1, 1, spread=0.7))
    value = draws(d)[0, 0]
    theirs = st.multivariate_t(d.loc[0, 0], d.scale_tril[0, 0] @ d.scale_tril[0, 0].T, df=3).logpdf(value)
    assert abs(float(d.log_prob(value)) - theirs) < 1e-10
    head = Parametric(dist.LowRankMultivariateNormal, (5,), rank=2)
    d = head(noise(head, 1, 1, spread=0.7))
    value = draws(d)[0, 0]
    cov = d.cov_factor[0, 0] @ d.cov_factor[0, 0].T + d.cov_diag[0, 0].diag()
    assert abs(float(d.log_prob(value)) - st.multivariate_normal(d.loc[0, 0], cov).logpdf(value)) < 1e-10
    head = Parametric(dist.Dirichlet, (5,))
    d = head(noise(head, 1, 1, spread=0.7))
    value = draws(d)[0, 0]
    assert abs(float(d.log_prob(value)) - st.dirichlet(d.concentration[0, 0]).logpdf(value / value.sum())) < 1e-8
    head = Parametric(dist.Multinomial, (5,), total_count=9)
    d = head(noise(head, 1, 1, spread=0.7))
    value = draws(d)[0, 0]
    assert abs(float(d.log_prob(value)) - st.multinomial(9, d.probs[0, 0]).logpmf(value.long().numpy())) < 1e-10


def test_parameters_follow_the_equation():
    phi = torch.tensor([[[0.4, 1.3]]], dtype=torch.float64)
    d = Normal()(phi)
    assert torch.equal(d.loc, phi[..., 0])
    assert torch.allclose(d.scale, (10 * torch.tanh(phi[..., 1] / 10)).exp())
    df = Parametric(dist.StudentT)(torch.zeros(1, 3)).df
    assert torch.allclose(df, torch.tensor([4.0]))
    d = parametric.MultivariateNormal(2)(torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.5]]))
    assert torch.equal(d.scale_tril, torch.tensor([[[1.0, 0.0], [2.5, 1.0]]]))


def test_vector_sites():
    head = Parametric(dist.Categorical, (3, 4))
    phi = noise(head, 2, 5)
    assert head.site_shape == (3,) and head.num_params == 12
    value = draws(head(phi))
    expected = phi.reshape(2, 5, 3, 4).log_softmax(-1).gather(-1, value[..., None]).sum((-1, -2))
    assert torch.allclose(head(phi).log_prob(value), expected)
    head = Parametric(dist.Binomial, (3,), total_count=torch.tensor([1, 5, 9]))
    assert head.support.check(torch.tensor([1.0, 5.0, 9.0])) and not head.support.check(torch.tensor([2.0, 5.0, 9.0]))
    assert head(noise(head, 2, 5)).log_prob(torch.tensor([1.0, 5.0, 9.0])).shape == (2, 5)


def test_counts_add_up():
    for name in ("Multinomial", "DirichletMultinomial"):
        d, support = HEADS[name](torch.zeros(1, 3)), HEADS[name].support
        values = torch.tensor([[[4.0, 0.0, 0.0]], [[3.0, 0.0, 0.0]], [[2.0, 2.0, 1.0]], [[4.5, -0.5, 0.0]]])
        inside = guarded_log_prob(d, values, support).isfinite().flatten().tolist()
        assert inside == [True, False, False, False]


def test_repaired_log_probs():
    """Where Pyro's own log_prob or its gradient fails."""
    one = torch.ones((), dtype=torch.float64)
    a, x = torch.tensor(2e4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    head = HEADS["Kumaraswamy"]
    assert dist.Kumaraswamy(a, one, validate_args=False).log_prob(x) == -math.inf
    ours = head.family(a, one, validate_args=False).log_prob(x)
    assert torch.allclose(ours, a.log() + (a - 1) * x.log())
    for name in ("Kumaraswamy", "RelaxedBernoulli", "SoftAsymmetricLaplace", "Weibull"):
        head = HEADS[name]
        phi, options = noise(head, 5, 3), head._options()
        ours = head(phi)
        values = {part.name: getattr(ours, part.name) for part in head._plan}
        fixed = {"temperature": 0.7 * one} if name == "RelaxedBernoulli" else {}
        theirs = getattr(dist, name)(**values, **fixed, **options)
        value = draws(theirs)
        assert torch.allclose(ours.log_prob(value), theirs.log_prob(value), rtol=1e-9, atol=1e-9)
    tail = torch.tensor([1e4, -1e4], dtype=torch.float64, requires_grad=True)
    unit_one = HEADS["SoftAsymmetricLaplace"](torch.zeros(1, 4, dtype=torch.float64))
    log_prob = unit_one.log_prob(tail)
    (slope,) = torch.autograd.grad(log_prob.sum(), tail)
    assert torch.allclose(log_prob, torch.tensor(-1e4 + 0.5 - math.log(2), dtype=torch.float64), atol=1e-6)
    assert torch.allclose(slope, torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_short_names():
    short = [
        parametric.Bernoulli((3,)), parametric.Beta(), parametric.Binomial(4), parametric.Categorical(5),
        parametric.Dirichlet(3), parametric.Exponential(), parametric.Gamma(), parametric.Geometric(),
        parametric.Laplace(), parametric.LogNormal(), parametric.MultivariateNormal(3), parametric.NegativeBinomial(),
        parametric.Normal((2,)), parametric.OneHotCategorical(4), parametric.Poisson(), parametric.StudentT(df=4.0),
        parametric.VonMises(), parametric.ZeroInflatedPoisson(),
    ]  # fmt: skip
    assert [h.num_params for h in short] == [3, 2, 1, 5, 3, 1, 2, 1, 2, 2, 9, 2, 4, 4, 1, 2, 2, 2]
    names = {h.name for h in short} | {"Parametric", "families"}
    assert names == set(parametric.__all__)
    assert repr(short[0]) == "Parametric(Bernoulli, shape=(3,))"
    assert repr(parametric.StudentT(df=4.0)) == "Parametric(StudentT, df=4.0)"


def test_a_torch_family_becomes_pyros():
    assert isinstance(Parametric(torch.distributions.Normal)(torch.zeros(1, 2)), dist.Normal)


class Beta(dist.TorchDistribution):
    """A user's own family with one of Pyro's names: the density x / 2 on (0, 2), scaled."""

    arg_constraints = {"width": constraints.greater_than(1.0)}
    support = constraints.positive

    def __init__(self, width, validate_args=None):
        self.width = width
        super().__init__(width.shape, validate_args=validate_args)

    def sample(self, sample_shape=()):
        u = torch.rand(torch.Size(sample_shape) + self.batch_shape, dtype=self.width.dtype)
        return (1 - u).log().neg().sqrt() * self.width

    def log_prob(self, value):
        return (2 * value).log() - 2 * self.width.log() - (value / self.width).square()


def test_a_users_own_family():
    head = Parametric(Beta)
    d = head(torch.zeros(2, 3, 1))
    assert type(d) is Beta and torch.equal(d.width, torch.full((2, 3), 2.0)) and head.support is constraints.positive
    assert abs(mass_above(head(noise(head, 1, 1)), 0.0, math.inf) - 1) < 1e-6


def test_user_random_numbers_are_left_alone():
    before = torch.random.get_rng_state()
    Parametric(dist.Gamma)
    assert torch.equal(before, torch.random.get_rng_state())


def test_moves_with_the_module():
    head = Parametric(dist.StudentT, (2,), df=torch.tensor([3.0, 4.0]))
    assert head.to(torch.float64)._buffers["df"].dtype == torch.float64
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    head.load_state_dict(torch.load(buffer, weights_only=True))


def test_a_fixed_parameter_trains_and_is_saved():
    df = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    head = Parametric(dist.StudentT, df=df)
    assert list(head.state_dict()) == ["df"] and dict(head.named_parameters())["df"] is df
    value = torch.tensor([[0.5]], dtype=torch.float64)
    head(torch.zeros(1, 1, 2, dtype=torch.float64)).log_prob(value).backward()
    step = 1e-5
    slope = (st.t(3 + step).logpdf(0.5) - st.t(3 - step).logpdf(0.5)) / (2 * step)
    assert abs(float(df.grad) - slope) < 1e-8
    assert copy.deepcopy(head)(torch.zeros(1, 2)).df == 3.0


def test_options_follow_the_module():
    shift = dist.transforms.AffineTransform(torch.tensor(1.0, dtype=torch.float64), 2.0)
    head = Parametric(dist.TransformedDistribution, base_distribution=Normal(), transforms=[shift])
    assert head(torch.zeros(1, 2, dtype=torch.float64)).sample().dtype == torch.float64
    twin = copy.deepcopy(head).float()
    d = twin(torch.zeros(1, 2))
    assert d.sample().dtype == torch.float32 and shift.loc.dtype == torch.float64
    assert abs(float(d.log_prob(torch.tensor(2.0))) - st.norm(1, 2).logpdf(2.0)) < 1e-6


class Triangle(torch.distributions.Distribution):
    """A user's own family without Pyro's mixin: 2 (1 - y / width) / width on (0, width)."""

    arg_constraints = {"width": constraints.greater_than(1.0)}
    support = constraints.positive

    def __init__(self, width, validate_args=None):
        self.width = width
        super().__init__(width.shape, validate_args=validate_args)

    def sample(self, sample_shape=()):
        u = torch.rand(torch.Size(sample_shape) + self.batch_shape, dtype=self.width.dtype)
        return self.width * (1 - u.sqrt())

    def log_prob(self, value):
        return (2 / self.width * (1 - value / self.width).clamp(min=1e-300)).log()


def test_a_family_without_pyros_mixin():
    head = Parametric(Triangle, (2,))
    d = head(torch.zeros(3, 2, dtype=torch.float64))
    assert isinstance(d.base_dist, Triangle) and d.batch_shape == (3,) and d.event_shape == (2,)
    value = torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.allclose(d.log_prob(value), torch.tensor(2 * math.log(0.75), dtype=torch.float64))
    with pyro.plate("rows", 3):
        assert pyro.sample("y", d).shape == (3, 2)
    for twin in (pickle.loads(pickle.dumps(head)), copy.deepcopy(head)):
        assert twin.family is head.family
    assert torch.equal(pickle.loads(pickle.dumps(d)).log_prob(value), d.log_prob(value))
    assert Parametric(Triangle)(torch.zeros(3, 1)).expand((2, 3)).sample().shape == (2, 3)


@pytest.mark.parametrize(
    ("family", "shape", "fixed", "error", "text"),
    [
        (dist.StudentT, (), {"df": torch.tensor([1.0, 5.0, 50.0])}, ValueError, "Expected df.shape to broadcast to ()"),
        (dist.StudentT, (2,), {"df": torch.ones(3)}, ValueError, "Expected df.shape to broadcast to (2,), that of a site; got (3,)."),
        (dist.StudentT, (2,), {"df": torch.ones(1, 2)}, ValueError, "got (1, 2)."),
        (dist.MultivariateNormal, (3,), {"loc": torch.zeros(2)}, ValueError, "Expected loc.shape to broadcast to (3,)"),
        (dist.Binomial, (), {"total_count": 2.5}, ValueError, "Expected total_count to satisfy IntegerGreaterThan(lower_bound=0); got 2.5."),
        (dist.Binomial, (), {"total_count": -1}, ValueError, "got -1."),
        (dist.Beta, (), {"concentration1": 0.0}, ValueError, "Expected concentration1 to satisfy GreaterThan(lower_bound=0.0); got 0.0."),
        (dist.Normal, (), {"scale": -1}, ValueError, "Expected scale to satisfy GreaterThan(lower_bound=0.0); got -1."),
        (dist.Normal, (2,), {"scale": torch.tensor([1.0, -2.0])}, ValueError, "got -2.0."),
        (dist.StudentT, (), {"df": -1.0}, ValueError, "Expected df to satisfy"),
        (dist.Normal, (), {"loc": math.nan}, ValueError, "Expected loc to satisfy"),
        (dist.Gamma, (), {"concentration": -0.5}, ValueError, "Expected concentration to satisfy"),
        (dist.MultivariateNormal, (2,), {"scale_tril": torch.ones(2, 2)}, ValueError, "Expected scale_tril to satisfy"),
        (dist.Binomial, (), {"total_count": None}, TypeError, "Expected total_count to be a number, a tensor or a head; got None."),
        (dist.Normal, (), {"scale": "a"}, TypeError, "Expected scale to be a number, a tensor or a head; got 'a'."),
        (dist.Binomial, (), {"total_count": True}, TypeError, "got True."),
    ],
)  # fmt: skip
def test_fixed_parameters_are_checked(family, shape, fixed, error, text):
    with pytest.raises(error) as caught:
        Parametric(family, shape, **fixed)
    assert text in str(caught.value)


def test_fixed_parameters_broadcast():
    for scale in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0])):
        d = Parametric(dist.Normal, (3,), scale=scale)(torch.zeros(5, 3))
        assert torch.equal(d.base_dist.scale, scale.expand(5, 3))
    assert torch.equal(Parametric(dist.MultivariateNormal, (2,), loc=1.0)(torch.zeros(5, 3)).loc, torch.ones(5, 2))


@pytest.mark.parametrize(
    ("family", "shape", "fixed", "text"),
    [
        (dist.OneHotCategoricalStraightThrough, (3,), {}, "the gradient of its samples is biased by design"),
        (dist.Delta, (), {}, "got Delta: a point mass has no density."),
        (dist.Pareto, (), {}, "got Pareto: its support depends on scale: fix it."),
        (dist.Binomial, (), {}, "got Binomial: total_count is an integer, which can't be predicted: fix it."),
        (dist.Uniform, (), {}, "got Uniform: "),
        (dist.NanMaskedNormal, (), {}, "got NanMaskedNormal: missing entries are no values: use Normal."),
        (dist.NanMaskedMultivariateNormal, (2,), {}, "missing entries are no values: use MultivariateNormal."),
        (dist.Wishart, (3,), {}, "got Wishart: its values are matrices."),
        (dist.VonMises3D, (2,), {}, "Expected concentration to have rightmost dim 3"),
        (
            dist.MultivariateNormal,
            (),
            {},
            r"Expected shape to be (k,), the size of loc, scale_tril of MultivariateNormal",
        ),
        (dist.MultivariateNormal, (2, 3), {}, "its values have shape (2, 3), not () or (k,)."),
        (dist.Normal, (0,), {}, "Expected shape to be a sequence of integers >= 1; got (0,)."),
        (dist.Normal, (), {"rate": 1.0}, "Expected arguments of Normal (loc, scale"),
        (dist.LowRankMultivariateNormal, (3,), {}, "got LowRankMultivariateNormal: it needs rank"),
        (dist.SineSkewed, (2,), {"base_dist": VonMises((2,))}, "Expected shape == (1,); got (2,)."),
        (dist.ZeroInflatedDistribution, (), {}, "got ZeroInflatedDistribution: it needs base_dist"),
        (dist.ProjectedNormal, (7,), {}, "got ProjectedNormal: no density or no sampler"),
    ],
)
def test_errors(family, shape, fixed, text):
    with pytest.raises(ValueError) as caught:
        Parametric(family, shape, **fixed)
    assert text in str(caught.value)


def test_errors_of_vmap_are_not_the_familys():
    def density(y):
        return Parametric(dist.Normal)(torch.zeros(1, 2)).log_prob(y)

    with pytest.raises(RuntimeError, match=r"^vmap: called random operation"):
        torch.func.vmap(density)(torch.zeros(3, 1))
    expected = torch.full((3, 1), -math.log(2 * math.pi) / 2)
    assert torch.allclose(torch.func.vmap(density, randomness="different")(torch.zeros(3, 1)), expected)
    head = Parametric(dist.Normal)
    assert torch.allclose(torch.func.vmap(lambda y: head(torch.zeros(1, 2)).log_prob(y))(torch.zeros(3, 1)), expected)


def test_type_errors():
    with pytest.raises(TypeError, match="Expected family to be a distribution class; got Normal"):
        Parametric(dist.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="Expected shape to be a tuple; got 3"):
        Parametric(dist.Normal, 3)
    with pytest.raises(TypeError, match="Expected base_dist to be a head; got a distribution Poisson"):
        Parametric(dist.ZeroInflatedDistribution, base_dist=dist.Poisson(1.0))
