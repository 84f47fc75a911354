"""Cumulative distribution functions and their inverses, against SciPy."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats as st
import torch
from mpmath import mp

from pyro_genexact import Autoregressive
from pyro_genexact.conditioners import MADE
from pyro_genexact.families import special
from pyro_genexact.families.cdf import cdf, icdf, probability_integral
from pyro_genexact.families.mixture import Mixture
from pyro_genexact.families.special import betainc
from pyro_genexact.heads import Mixture as MixtureHead
from pyro_genexact.heads.parametric import Parametric
from pyro_genexact.numerics import ConvergenceError

F64 = torch.float64


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def t(*values):
    return torch.tensor(values, dtype=F64)


CONTINUOUS = {
    "student": lambda: (dist.StudentT(3.5, 0.3, 2.0), st.t(3.5, 0.3, 2.0)),
    "student_wide": lambda: (dist.StudentT(0.4), st.t(0.4)),
    "beta": lambda: (dist.Beta(0.4, 2.5), st.beta(0.4, 2.5)),
    "gamma": lambda: (dist.Gamma(0.7, 2.0), st.gamma(0.7, scale=0.5)),
    "chi2": lambda: (dist.Chi2(3.0), st.chi2(3.0)),
    "inverse_gamma": lambda: (dist.InverseGamma(2.5, 1.5), st.invgamma(2.5, scale=1.5)),
    "fisher": lambda: (dist.FisherSnedecor(3.0, 5.0), st.f(3.0, 5.0)),
    "lognormal": lambda: (dist.LogNormal(0.2, 0.7), st.lognorm(0.7, scale=2.718281828459045**0.2)),
    "weibull": lambda: (dist.Weibull(2.0, 1.5), st.weibull_min(1.5, scale=2.0)),
    "half_normal": lambda: (dist.HalfNormal(1.5), st.halfnorm(scale=1.5)),
    "uniform": lambda: (dist.Uniform(-1.0, 2.0), st.uniform(-1.0, 3.0)),
    "pareto": lambda: (dist.Pareto(0.5, 2.0), st.pareto(2.0, scale=0.5)),
    "normal": lambda: (dist.Normal(0.3, 1.2), st.norm(0.3, 1.2)),
    "laplace": lambda: (dist.Laplace(0.3, 1.2), st.laplace(0.3, 1.2)),
    "cauchy": lambda: (dist.Cauchy(0.3, 1.2), st.cauchy(0.3, 1.2)),
    "half_cauchy": lambda: (dist.HalfCauchy(1.2), st.halfcauchy(0, 1.2)),
    "exponential": lambda: (dist.Exponential(1.2), st.expon(0, 1 / 1.2)),
    "soft_laplace": lambda: (dist.SoftLaplace(t(0.3), t(1.2)), st.hypsecant(0.3, 1.2)),
    "logistic": lambda: (dist.Logistic(0.3, 1.2), st.logistic(0.3, 1.2)),
    "skew_logistic": lambda: (dist.SkewLogistic(t(0.3), t(1.2), t(0.1)), st.genlogistic(0.1, 0.3, 1.2)),
    "generalized_pareto": lambda: (dist.GeneralizedPareto(0.3, 1.2, 0.4), st.genpareto(0.4, 0.3, 1.2)),
    "ended_pareto": lambda: (dist.GeneralizedPareto(0.3, 1.2, -0.4), st.genpareto(-0.4, 0.3, 1.2)),
    "generalized_pareto_without_power": lambda: (dist.GeneralizedPareto(0.3, 1.2, 0.0), st.genpareto(0, 0.3, 1.2)),
    "gumbel": lambda: (dist.Gumbel(0.3, 1.2), st.gumbel_r(0.3, 1.2)),
    "falling_student": lambda: (
        dist.TransformedDistribution(dist.StudentT(3.0), dist.transforms.AffineTransform(1.0, -2.0)),
        st.t(3.0, 1.0, 2.0),
    ),
}
DISCRETE = {
    "poisson": lambda: (dist.Poisson(3.5), st.poisson(3.5)),
    "bernoulli": lambda: (dist.Bernoulli(0.3), st.bernoulli(0.3)),
    "binomial": lambda: (dist.Binomial(6, 0.35), st.binom(6, 0.35)),
    "negative_binomial": lambda: (dist.NegativeBinomial(2.5, 0.6), st.nbinom(2.5, 0.4)),
    "gamma_poisson": lambda: (dist.GammaPoisson(2.5, 0.7), st.nbinom(2.5, 0.7 / 1.7)),
    "geometric": lambda: (dist.Geometric(0.2), st.geom(0.2, loc=-1)),
    "categorical": lambda: (dist.Categorical(t(0.1, 0.6, 0.3)), st.rv_discrete(values=([0, 1, 2], [0.1, 0.6, 0.3]))),
    "beta_binomial": lambda: (dist.BetaBinomial(1.5, 0.7, 5), st.betabinom(5, 1.5, 0.7)),
}


if not hasattr(dist, "GeneralizedPareto"):  # before torch 2.8
    for _name in ("generalized_pareto", "ended_pareto", "generalized_pareto_without_power"):
        del CONTINUOUS[_name]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_cdf_is_scipys_also_outside_of_the_support(name):
    d, truth = CONTINUOUS[name]()
    value = torch.cat([torch.linspace(-4, 6, 101), t(-torch.inf, torch.inf, -1e9, 1e9), t(1e-4, 0.01, 0.999)])
    ours = cdf(d, value)
    assert torch.allclose(ours, torch.as_tensor(truth.cdf(value.numpy())), rtol=1e-10, atol=1e-14)
    assert ours.min() >= 0 and ours.max() <= 1
    assert cdf(d, t(torch.nan)).isnan()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_icdf_inverts_the_cdf(name):
    d, truth = CONTINUOUS[name]()
    # a falling transform goes by 1 - u, which no longer tells small u apart
    u = torch.cat([t(1e-4 if name.startswith("falling") else 1e-10), torch.linspace(0.01, 0.99, 40)])
    value = icdf(d, u)
    assert torch.allclose(value, torch.as_tensor(truth.ppf(u.numpy())), rtol=1e-7, atol=1e-9)
    assert torch.allclose(cdf(d, value), u, rtol=1e-9, atol=1e-12)
    ends = icdf(d, t(0, 1))
    assert torch.equal(ends, torch.as_tensor(truth.ppf([0.0, 1.0])))


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_cdf_and_icdf_are_scipys(name):
    d, truth = DISCRETE[name]()
    value = torch.arange(-2.0, 40.0)
    ours = cdf(d, value)
    assert torch.allclose(ours, torch.as_tensor(truth.cdf(value.numpy())), rtol=1e-11, atol=1e-14)
    assert torch.equal(cdf(d, value + 0.5), ours)
    u = torch.linspace(0.0005, 0.9995, 300)
    assert torch.equal(icdf(d, u).double(), torch.as_tensor(truth.ppf(u.numpy())))


LEFT_TAILS = {  # against mpmath, at z of a standard member
    "normal": (lambda: dist.Normal(0.0, 1.0), mp.ncdf, (-35, -9, -1.5, -0.1)),
    "log_normal": (lambda: dist.LogNormal(0.0, 1.0), lambda z: mp.ncdf(mp.log(z)), (1e-15, 1e-5, 0.3)),
    "half_normal": (lambda: dist.HalfNormal(1.0), lambda z: mp.erf(z / mp.sqrt(2)), (1e-300, 1e-20, 1e-9, 0.3)),
    "laplace": (lambda: dist.Laplace(0.0, 1.0), lambda z: mp.exp(z) / 2, (-650, -45, -1.5, -0.1)),
    "cauchy": (lambda: dist.Cauchy(0.0, 1.0), lambda z: mp.atan2(1, -z) / mp.pi, (-1e250, -1e20, -9, -0.1)),
    "half_cauchy": (lambda: dist.HalfCauchy(1.0), lambda z: 2 * mp.atan(z) / mp.pi, (1e-300, 1e-20, 0.3, 9)),
    "soft_laplace": (lambda: dist.SoftLaplace(t(0), t(1)), lambda z: 2 * mp.atan(mp.exp(z)) / mp.pi, (-650, -45, -1.5)),
    "skewed": (lambda: dist.SkewLogistic(t(0), t(1), t(0.125)), lambda z: (1 + mp.exp(-z)) ** -0.125, (-4e3, -9)),
    "weibull": (lambda: dist.Weibull(1.0, 1.5), lambda z: -mp.expm1(-(z**1.5)), (1e-180, 1e-9, 0.3)),
    "generalized_pareto": (lambda: dist.GeneralizedPareto(0.0, 1.0, 0.5), lambda z: 1 - (1 + z / 2) ** -2, (1e-30, 1)),
    "kumaraswamy": (lambda: dist.Kumaraswamy(t(1.5), t(0.5)), lambda z: 1 - mp.sqrt(1 - z**1.5), (1e-25, 1e-9, 0.3)),
    "gumbel": (lambda: dist.Gumbel(0.0, 1.0), lambda z: mp.exp(-mp.exp(-z)), (-6, -1.5, -0.1)),
}
if not hasattr(dist, "GeneralizedPareto"):
    del LEFT_TAILS["generalized_pareto"]


@pytest.mark.parametrize("name", LEFT_TAILS)
def test_left_tails_are_relative_and_turn_back(name):
    family, truth, value = LEFT_TAILS[name]
    d = family()
    with mp.workdps(50):
        expected = t(*[float(truth(mp.mpf(y))) for y in value])
    assert torch.allclose(cdf(d, t(*value)), expected, rtol=1e-10, atol=0)
    assert torch.allclose(icdf(d, expected), t(*value), rtol=1e-10, atol=0)
    u = t(1e-305, 1e-20, 1e-17, 1e-3, 0.5, 0.9)
    assert torch.allclose(cdf(d, icdf(d, u)), u, rtol=1e-10, atol=0)


@pytest.mark.parametrize("logits", [-800.0, -3.0, -1e-3, -1e-5, 0.0, 1e-5, 1e-3, 3.0, 800.0])
def test_continuous_bernoulli_near_and_far_from_a_half(logits):
    d = dist.ContinuousBernoulli(logits=t(logits))
    value = (1e-9, 0.01, 0.3, 0.5, 0.9, 1.0)
    with mp.workdps(50):
        slope = mp.mpf(logits or 1e-30)
        expected = t(*[float(mp.expm1(slope * y) / mp.expm1(slope)) for y in value])
    assert torch.allclose(cdf(d, t(*value)), expected, rtol=1e-11, atol=1e-300)
    u = t(1e-9, 0.2, 0.7)
    assert torch.allclose(cdf(d, icdf(d, u)), u, rtol=1e-10, atol=1e-13)


def test_mixtures_with_gaps_between_their_supports():
    value, u = t(-1, 0.5, 1, 3, 5.5, 7), t(0, 0.25, 0.5, 0.500001, 0.75, 1)
    expected, quantiles = t(0, 0.25, 0.5, 0.5, 0.75, 1), t(0, 0.5, 1, 5.000002, 5.5, 6)
    stack = dist.Uniform(t(0, 5), t(1, 6))
    parts = [dist.Uniform(0.0, 1.0), dist.Uniform(5.0, 6.0)]
    for d in (
        Mixture(torch.zeros(2), parts, validate_args=True),
        Mixture(torch.zeros(2), stack),
        Mixture(torch.zeros(3, 1, 2), [Mixture(torch.zeros(1), parts[:1]), Mixture(torch.zeros(1), parts[1:])]),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), stack, validate_args=True),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 1, 2)), stack.expand((3, 1, 2))),
    ):
        assert torch.allclose(cdf(d, value), expected)
        assert torch.allclose(icdf(d, u), quantiles, rtol=1e-12)
        assert cdf(d, t(torch.nan)).isnan().all()
        assert torch.allclose(probability_integral(d, value), expected)


def test_mixtures_of_different_counts():
    value = torch.arange(-1.0, 9.0)
    poisson, binomial, bernoulli = dist.Poisson(3.0), dist.Binomial(4, 0.4), dist.Bernoulli(0.3)
    truths = {poisson: st.poisson(3), binomial: st.binom(4, 0.4), bernoulli: st.bernoulli(0.3)}
    u = torch.linspace(0.01, 0.98, 60)
    for parts in ([bernoulli, poisson], [poisson, binomial], [bernoulli, binomial]):
        expected = torch.as_tensor(sum(truths[part].cdf(value.numpy()) for part in parts)) / 2
        d = Mixture(torch.zeros(2), parts)
        assert torch.allclose(cdf(d, value), expected, atol=1e-14)
        assert torch.equal(icdf(d, u), (expected[1:, None] < u).sum(0).double())
        assert torch.allclose(probability_integral(d, value[1:], torch.ones(9)), expected[1:])


def test_zero_inflated_and_mixtures():
    value = torch.arange(-1.0, 9.0)
    inflated = dist.ZeroInflatedPoisson(2.0, gate=torch.tensor(0.3))
    expected = torch.as_tensor(st.poisson(2.0).cdf(value.numpy())) * 0.7 + 0.3 * (value >= 0)
    assert torch.allclose(cdf(inflated, value), expected, atol=1e-14)
    u = torch.linspace(0.01, 0.99, 50)
    assert torch.equal(icdf(inflated, u), (expected[1:, None] < u).sum(0).double())
    weights = t(0.2, 0.8)
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.StudentT(t(2.0, 5.0), t(-1.0, 1.0), t(1.0, 0.5)))
    expected = 0.2 * st.t(2.0, -1.0).cdf(value.numpy()) + 0.8 * st.t(5.0, 1.0, 0.5).cdf(value.numpy())
    assert torch.allclose(cdf(mixture, value), torch.as_tensor(expected), atol=1e-14)
    assert torch.allclose(cdf(mixture, icdf(mixture, u)), u, atol=1e-14)
    counts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Poisson(t(1.0, 5.0)))
    expected = torch.as_tensor(0.2 * st.poisson(1).cdf(value.numpy()) + 0.8 * st.poisson(5).cdf(value.numpy()))
    assert torch.allclose(cdf(counts, value), expected, atol=1e-14)
    assert torch.equal(icdf(counts, t(0.05, 0.5)), t(0.0, 4.0))


def test_batches_broadcast_and_independent_is_unwrapped():
    d = dist.StudentT(t(1.0, 4.0), 0.0, 1.0)
    value = torch.randn(5, 2)
    assert torch.equal(cdf(d.to_event(1), value), cdf(d, value))
    rate = t(0.5, 4.0, 50.0)
    u = torch.rand(7, 3)
    assert torch.equal(icdf(dist.Poisson(rate), u), torch.as_tensor(st.poisson(rate.numpy()).ppf(u.numpy())))
    sizes = dist.BetaBinomial(t(1.0, 2.0), t(2.0, 1.0), t(3.0, 6.0))  # of several sizes: no table
    expected = st.betabinom([3, 6], [1, 2], [2, 1]).cdf([[2, 2], [5, 6]])
    assert torch.allclose(cdf(sizes, t([2, 2], [5, 6])), torch.as_tensor(expected), atol=1e-14)
    assert torch.equal(icdf(sizes, t([0.99, 0.1], [1.0, 1.0])), t([3, 1], [3, 6]))


def test_left_tails_of_student_are_relative():
    z = t(-1e30, -1e12, -1e6, -300.0, -20.0, -8.0)
    for df in (0.5, 1.0, 7.0, 300.0):
        # the leading terms of the tail are not enough near 0: SciPy's survival function of the other side is
        expected = torch.as_tensor(st.t(df).sf((-z).numpy()))
        assert torch.allclose(cdf(dist.StudentT(df), z), expected, rtol=1e-10, atol=1e-300)


def test_betainc_over_twelve_decades():
    a, b = 10 ** (torch.rand(2, 3000) * 8 - 2)
    mean = a / (a + b)
    x = (mean + (mean * (1 - mean) / (a + b + 1)).sqrt() * 4 * torch.randn(3000)).clamp(1e-9, 1 - 1e-9)
    truth = torch.as_tensor(scipy.special.betainc(a.numpy(), b.numpy(), x.numpy()))
    ours = betainc(a, b, x)
    seen = truth > 1e-290
    assert ((ours - truth).abs() / truth)[seen].max() < 5e-12
    assert torch.equal(betainc(t(2.0), t(3.0), t(0, 1)), t(0, 1))


def test_gradients_by_shape_parameters():
    a, b, x = t(0.7, 2.0, 30.0).requires_grad_(), t(3.0).requires_grad_(), t(0.1, 0.6, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(betainc, (a, b, x))
    assert torch.autograd.gradgradcheck(betainc, (a, b, x))
    y = t(-3.0, 0.0, 1.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda df, y: cdf(dist.StudentT(df), y), (a, y))
    positive = t(0.2, 3.0, 25.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, y: cdf(dist.Gamma(a, b), y), (a, b, positive))
    assert torch.autograd.gradgradcheck(lambda a, b, y: cdf(dist.Gamma(a, b), y), (a, b, positive))
    assert torch.autograd.gradcheck(lambda a, b, y: cdf(dist.InverseGamma(a, b), y), (a, b, positive))


def _beta(a, b, x, y):
    return mp.betainc(a, b, 0, x, regularized=True) if x < y else 1 - mp.betainc(b, a, 0, y, regularized=True)


def _odds(a, b, ratio):
    return _beta(a, b, ratio / (1 + ratio), 1 / (1 + ratio))


BY_SHAPE = {  # where 1 - x knows little of the complement: of parameters, then the value
    "fisher": (dist.FisherSnedecor, lambda m, n, v: _odds(m / 2, n / 2, m * v / n), (2.0, 0.18, 8e14)),
    "fisher_further": (dist.FisherSnedecor, lambda m, n, v: _odds(m / 2, n / 2, m * v / n), (0.3, 0.18, 8e20)),
    "student": (dist.StudentT, lambda n, z: 1 - _odds(n / 2, mp.mpf(1) / 2, n / z**2) / 2, (0.3, 1e20)),
    "student_centre": (dist.StudentT, lambda n, z: 1 - _odds(n / 2, mp.mpf(1) / 2, n / z**2) / 2, (3.0, 1e-9)),
    "beta": (dist.Beta, lambda a, b, x: _beta(a, b, x, 1 - x), (2.0, 0.1, 1 - 2**-53)),
    "negative_binomial": (
        lambda n, p: dist.NegativeBinomial(n, logits=p),
        lambda n, p, k: _odds(n, k + 1, mp.exp(-p)),
        (0.3, -32.0, 2.0),
    ),
    "gamma_poisson": (dist.GammaPoisson, lambda a, b, k: _odds(a, k + 1, b), (0.3, 1e12, 1.0)),
    "binomial": (lambda p: dist.Binomial(5, logits=p), lambda p, k: _odds(5 - k, k + 1, mp.exp(-p)), (-40.0, 0.0)),
    "kumaraswamy": (dist.Kumaraswamy, lambda a, b, y: 1 - (1 - y**a) ** b, (0.527, 0.02, 1 - 2.5e-13)),
    "kumaraswamy_left": (dist.Kumaraswamy, lambda a, b, y: 1 - (1 - y**a) ** b, (0.527, 0.02, 1e-30)),
}


@pytest.mark.parametrize("name", BY_SHAPE)
def test_derivatives_in_the_tails(name):
    family, truth, point = BY_SHAPE[name]
    values = [t(v).squeeze().requires_grad_() for v in point]
    grads = torch.autograd.grad(cdf(family(*values[:-1]), values[-1]), values, allow_unused=True)
    with mp.workdps(80):
        place = tuple(mp.mpf(v) for v in point)
        for i, grad in enumerate(grads):
            if i < len(point) - 1 or not family(*values[:-1]).support.is_discrete:
                expected = float(mp.diff(truth, place, tuple(int(i == j) for j in range(len(point)))))
                assert abs(float(grad) - expected) < 1e-10 * abs(expected)


def test_mixed_derivatives_see_the_complement_move():
    a, b = t(2.0).requires_grad_(), t(0.18).requires_grad_()
    logit = t(-3.0, 0.1, 36.0).requires_grad_()
    (by_b,) = torch.autograd.grad(betainc(a, b, logit.sigmoid(), (-logit).sigmoid()).sum(), b, create_graph=True)
    (mixed,) = torch.autograd.grad(by_b.sum(), logit)
    with mp.workdps(60):
        for found, at in zip(mixed.tolist(), logit.tolist(), strict=True):
            expected = mp.diff(lambda b, s: _odds(mp.mpf(2), b, mp.exp(s)), (mp.mpf(0.18), mp.mpf(at)), (1, 1))
            assert abs(found - float(expected)) < 1e-9 * abs(float(expected))


def test_the_slope_of_kumaraswamys_cdf_is_its_density():
    y = t(1 - 2.5e-13, 0.9, 1e-20).requires_grad_()
    d = Parametric(dist.Kumaraswamy).family(t(0.527), t(0.02))
    (slope,) = torch.autograd.grad(cdf(d, y).sum(), y)
    assert torch.allclose(slope, d.log_prob(y.detach()).exp(), rtol=1e-12, atol=0)
    a, b = t(0.5).requires_grad_(), t(0.5).requires_grad_()
    ends = cdf(dist.Kumaraswamy(a, b), t(0.0, 1.0))
    assert torch.equal(ends, t(0.0, 1.0)) and not any(g.any() for g in torch.autograd.grad(ends.sum(), (a, b)))


def test_betainc_that_does_not_converge_says_where(monkeypatch):
    monkeypatch.setattr("pyro_genexact.families.special._FRACTION_STEPS", 20)
    with pytest.raises(
        ConvergenceError, match=r"Expected the continued fraction .* to converge in 20 steps; got .* a=1000"
    ):
        betainc(t(1e6), t(1e6), t(0.5))
    a = t(3.0, 1e6).requires_grad_()
    below = special.gammainc(a, t(2.0, 1e6))
    with pytest.raises(
        ConvergenceError, match=r"series of gammainc to converge in 20 steps; got .* a=1000000.0, x=1"
    ) as caught:
        below.sum().backward()
    assert caught.value.index == (1,) and caught.value.residual > 1e-3 and caught.value.bracket == (0.0, 1e6)


def test_nan_parameters_have_no_quantile():
    with pytest.raises(ConvergenceError, match=r"Expected a root of f\(x\) = y; got .* nan at index \(1,\)"):
        icdf(dist.Gamma(t(3.0, torch.nan), t(1.0), validate_args=False), t(0.3))


def test_gradients_by_value_and_parameters():
    value, loc, scale = t(-0.3, 2.0).requires_grad_(), t(0.5).requires_grad_(), t(1.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda *p: cdf(dist.StudentT(3.0, p[1], p[2]), p[0]), (value, loc, scale))
    u = t(0.2, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda *p: icdf(dist.StudentT(3.0, p[1], p[2]), p[0]), (u, loc, scale))
    assert torch.autograd.gradcheck(lambda r: cdf(dist.Poisson(r), t(0.0, 3.0)), t(2.5).requires_grad_())
    logits = t(0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: cdf(dist.NegativeBinomial(2.0, logits=p), t(0.0, 3.0)), logits)


ROOTS = {
    "student": (lambda df, loc: dist.StudentT(df, loc), (4.0, 0.3)),
    "beta": (lambda a, b: dist.Beta(a, b), (1.4, 2.0)),
    "gamma": (lambda a, b: dist.Gamma(a, b), (1.4, 2.0)),
    "inverse_gamma": (lambda a, b: dist.InverseGamma(a, b), (1.4, 2.0)),
    "mixture": (lambda a, b: Mixture(torch.stack([a, b]), [dist.Normal(a, 1.0), dist.Logistic(0.0, b)]), (0.7, 1.3)),
    "same_family": (
        lambda a, b: dist.MixtureSameFamily(dist.Categorical(torch.stack([a, b])), dist.Normal(t(1, -1) * b, 0.8)),
        (0.7, 1.3),
    ),
}


@pytest.mark.parametrize("name", ROOTS)
def test_quantiles_that_are_searched_for_are_differentiable_twice(name):
    family, parameters = ROOTS[name]
    inputs = (t(0.3).requires_grad_(), *[t(p).squeeze().requires_grad_() for p in parameters])
    assert torch.autograd.gradcheck(lambda u, *p: icdf(family(*p), u), inputs, rtol=1e-5)
    assert torch.autograd.gradgradcheck(lambda u, *p: icdf(family(*p), u), inputs, rtol=1e-5)
    assert torch.autograd.gradgradcheck(lambda y, *p: cdf(family(*p), y), inputs, rtol=1e-5)  # Student's at its centre


def test_higher_derivatives_of_the_quantile_function():
    u = t(0.2, 0.7).requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda u: icdf(dist.StudentT(3.0), u).sum() + (u**2).sum(), u)
    y = torch.as_tensor(st.t(3).ppf([0.2, 0.7]))
    density = torch.as_tensor(st.t(3).pdf(y.numpy()))
    slope = -4 * y / (3 + y**2)  # of the log density; y'' = -f'(y) / f(y)^3
    assert torch.allclose(hessian, torch.diag(2 - slope / density**2), rtol=1e-9)
    # Beta(2, 1): F = y^2, y = sqrt(u)
    y = icdf(dist.Beta(t(2.0).squeeze(), 1.0), u)
    for order, factor in enumerate((1 / 2, -1 / 4, 3 / 8, -15 / 16), 1):
        (y,) = torch.autograd.grad(y.sum(), u, create_graph=True)
        assert torch.allclose(y, factor * u ** (0.5 - order), rtol=1e-7)


def test_quantile_gradients_at_the_ends_leave_parameters_alone():
    df = t(3.0).requires_grad_()
    middle, all_three = (
        torch.autograd.grad(icdf(dist.StudentT(df), u).sum(), df)[0] for u in (t(0.4), t(0.0, 0.4, 1.0))
    )
    assert torch.allclose(all_three, middle, rtol=1e-9) and middle != 0


def _mixture(family):
    first, second = torch.tensor([1.0, -1.0]).expand(3, 2), torch.tensor([0.5, 2.0]).expand(3, 2)
    return lambda a, b: dist.MixtureSameFamily(
        dist.Categorical(logits=a[:, None] * first),
        family(b[:, None] * second + (first if family is dist.Normal else 0), second),
    )


ROUND_TRIPS = {
    "normals": _mixture(dist.Normal),
    "gammas": _mixture(dist.Gamma),
    "several": lambda a, b: Mixture(torch.stack([a, b], -1), [dist.Normal(a, 0.1), dist.StudentT(3.0, 4 * b)]),
    "student": lambda a, b: dist.StudentT(1 + b, a, b),
    "beta": lambda a, b: dist.Beta(1.2 + a**2, b),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_from_uniform_goes_through_the_solver_and_back(name):
    """A site after another, with gradients; the mixtures have no closed quantile function."""
    a, b = t(0.4, -1.0, 2.0).requires_grad_(), t(1.0, 0.3, 2.5).requires_grad_()
    u = torch.cat([torch.rand(20, 3), t([1e-9, 0.5, 1 - 1e-9])]).requires_grad_()
    d = ROUND_TRIPS[name](a, b)
    y = icdf(d, u)
    assert torch.allclose(cdf(d, y), u, rtol=1e-9, atol=0)
    assert torch.allclose(icdf(d, cdf(d, y)), y, rtol=1e-6)
    density = d.log_prob(y.detach()).exp().detach()
    by_u, by_a, by_b = torch.autograd.grad(y.sum(), (u, a, b), create_graph=True)
    assert torch.allclose(by_u, 1 / density, rtol=1e-9)
    for found, parameter in ((by_a, a), (by_b, b)):
        (moved,) = torch.autograd.grad(cdf(ROUND_TRIPS[name](a, b), y.detach()), parameter, -1 / density)
        assert torch.allclose(found, moved, rtol=1e-9) and found.all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(by_a.sum() + by_b.sum(), (u, a, b)))


@pytest.mark.parametrize(
    "head",
    [
        Parametric(dist.StudentT),
        Parametric(dist.Beta),
        MixtureHead(Parametric(dist.Normal), 3),
        MixtureHead(Parametric(dist.Gamma), 2),
    ],
)
def test_from_uniform_of_an_autoregressive_distribution(head):
    model = Autoregressive(MADE(3, head.num_params, hidden=(8,)), head, (3,)).double()
    u = 0.02 + 0.96 * torch.rand(5, 3)
    u.requires_grad_()
    y = model().from_uniform(u)
    assert torch.allclose(model().to_uniform(y), u, rtol=1e-9, atol=0)
    grads = torch.autograd.grad(y.sum(), [u, *model.parameters()], allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in grads) and (grads[0] > 0).any()


def _halves(family, *parameters):
    return dist.MixtureSameFamily(
        dist.Categorical(t(0.5, 0.5)), family(*[t(*p) for p in parameters], validate_args=False)
    )


NEEDLES = {  # and an interval of u where the cdf is that of the second half
    "normal 1e3, 1e-6": (lambda: _halves(dist.Normal, (0.0, 1e3), (1.0, 1e-6)), (0.56, 0.99)),
    "normal 1e5, 1e-6": (lambda: _halves(dist.Normal, (0.0, 1e5), (1.0, 1e-6)), (0.56, 0.99)),
    "normal 1e5, 1e-4": (lambda: _halves(dist.Normal, (0.0, 1e5), (1.0, 1e-4)), (0.56, 0.99)),
    "normal -3e5, 1e-3": (lambda: _halves(dist.Normal, (0.0, -3e5), (1.0, 1e-3)), (0.01, 0.45)),
    "gamma 1e10, 1e5": (lambda: _halves(dist.Gamma, (2.0, 1e10), (1.0, 1e5)), (0.56, 0.99)),
}


@pytest.mark.parametrize("name", NEEDLES)
def test_quantiles_are_right_to_the_last_bit(name):
    """The number before has a cdf below u; of the gamma family two, since rounding of its cdf is as large as that."""
    make, ends = NEEDLES[name]
    d, u = make(), torch.linspace(*ends, 44)
    x = icdf(d, u)
    before = x.nextafter(t(-torch.inf))
    if name.startswith("gamma"):
        before = before.nextafter(t(-torch.inf))
    assert (cdf(d, x) >= u).all() and (cdf(d, before) < u).all()


@pytest.mark.parametrize("name", ["student", "gamma", "beta", "inverse_gamma", "fisher"])
def test_quantiles_are_the_first_to_reach_u(name):
    d, _ = CONTINUOUS[name]()
    u = torch.cat([t(1e-100, 1e-20, 1e-9), torch.linspace(0.01, 0.99, 99), t(1 - 1e-9, 1 - 1e-15)])
    x = icdf(d, u)
    blur = torch.finfo(F64).eps * (64 * u / d.log_prob(x).exp() + 2 * x.abs())  # the rounding of these cdfs, and of x
    assert (cdf(d, x) >= u).all() and (cdf(d, x - blur) < u).all()


def test_the_quantile_at_a_flat_part_is_where_it_begins():
    for low, high in ((t(0, 2), t(1, 3)), (t(-1, 1e-9), t(0, 3)), (t(-1e5, 7), t(1e-3, 8))):
        d = _halves(dist.Uniform, low.tolist(), high.tolist())
        rounding = 4 * torch.finfo(F64).eps * (high - low)[0]  # of the cdf, and of x
        assert (icdf(d, t(0.5)) - high[0]).abs() <= rounding and cdf(d, icdf(d, t(0.5))) >= 0.5


def test_quantiles_take_few_evaluations(monkeypatch):
    calls = []
    plain = special.plain_betainc
    monkeypatch.setattr(special, "plain_betainc", lambda *args: calls.append(1) or plain(*args))
    u = torch.linspace(0.001, 0.999, 50)
    for d in (dist.StudentT(3.0), dist.Beta(2.0, 3.0), dist.FisherSnedecor(3.0, 5.0)):
        calls.clear()
        icdf(d, u)
        assert len(calls) < 25  # bisection takes 64


def test_values_of_discrete_families_have_no_gradient():
    for d in (
        lambda p: dist.Poisson(p),
        lambda p: dist.GammaPoisson(p, 0.5),
        lambda p: dist.NegativeBinomial(p, 0.5),
        lambda p: dist.Binomial(4, p / 4),
        lambda p: Mixture(torch.zeros(2), [dist.Poisson(p), dist.Bernoulli(p / 4)]),
    ):
        value, p = t(1.0, 2.5).requires_grad_(), t(1.5).squeeze().requires_grad_()
        by_value, by_p = torch.autograd.grad(cdf(d(p), value).sum(), (value, p), allow_unused=True)
        assert by_value is None or not by_value.any()
        (truth,) = torch.autograd.grad(cdf(d(p), value.detach()).sum(), p)
        assert torch.equal(by_p, truth) and truth != 0


def test_gradients_of_the_closed_forms():
    y, u = t(-1.5, 0.2, 3.0).requires_grad_(), t(0.1, 0.45, 0.8).requires_grad_()
    a, b = t(0.3).requires_grad_(), t(1.7).requires_grad_()
    for family in (dist.Normal, dist.Laplace, dist.Cauchy, dist.SoftLaplace, dist.Gumbel):
        assert torch.autograd.gradcheck(lambda y, a, b, family=family: cdf(family(a, b), y), (y, a, b))
        assert torch.autograd.gradcheck(lambda u, a, b, family=family: icdf(family(a, b), u), (u, a, b))
    for family in (dist.HalfNormal, dist.HalfCauchy, dist.Exponential):
        assert torch.autograd.gradcheck(lambda u, b, family=family: icdf(family(b), cdf(family(b + 1), u)), (u, b))
    assert torch.autograd.gradcheck(lambda u, b: cdf(dist.ContinuousBernoulli(logits=b), u), (u, b))
    assert torch.autograd.gradcheck(lambda u, b: icdf(dist.ContinuousBernoulli(logits=b), u), (u, b))
    assert torch.autograd.gradcheck(
        lambda b: cdf(dist.ContinuousBernoulli(logits=b), u.detach()), t(0).requires_grad_()
    )


def test_float32_is_rounded_from_float64():
    value = torch.linspace(-30, 30, 601, dtype=torch.float32)
    for family, truth in (
        (lambda p: dist.StudentT(p), lambda p: st.t(p)),
        (lambda p: dist.Gamma(p * 100, p), lambda p: st.gamma(p * 100, scale=1 / p)),
        (lambda p: dist.Beta(p, 2 * p), lambda p: st.beta(p, 2 * p)),
        (lambda p: dist.Normal(0 * p, p), lambda p: st.norm(0, p)),
    ):
        ours = cdf(family(torch.tensor(2.5, dtype=torch.float32)), value)
        assert ours.dtype == torch.float32
        expected = torch.as_tensor(truth(2.5).cdf(value.double().numpy()))
        assert torch.allclose(ours.double(), expected, rtol=6e-8, atol=1e-44)


def test_quantiles_in_float32_are_rounded_from_float64():
    u = torch.linspace(0.001, 0.999, 200, dtype=torch.float32)
    loc, scale = torch.tensor([1000.0, -2000.0]).float(), torch.tensor([0.1, 10.0]).float()
    for family in (
        lambda loc, scale: dist.MixtureSameFamily(dist.Categorical(torch.ones_like(loc)), dist.Normal(loc, scale)),
        lambda loc, scale: dist.StudentT(scale[1], loc[1], scale[0]),
        lambda loc, scale: dist.Gamma(scale[1], scale[0]),
    ):
        y = icdf(family(loc, scale), u)
        assert y.dtype == torch.float32
        assert torch.allclose(y, icdf(family(loc.double(), scale.double()), u.double()).float(), rtol=3e-7)


@pytest.mark.parametrize("family", ["StudentT", "Beta", "Poisson", "Bernoulli", "Categorical"])
def test_probability_integral_is_uniform(family):
    parameters = {"Beta": (0.5, 0.7), "Categorical": (t(0.5, 0.3, 0.2),)}
    d = getattr(dist, family)(*parameters.get(family, (0.3,)))
    u = probability_integral(d, d.sample((4000,)))
    assert u.shape == (4000,) and st.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_probability_integral_of_counts_spans_the_step():
    d = dist.Poisson(2.0)
    value = torch.arange(5.0)
    low, high = (probability_integral(d, value, torch.full((5,), v)) for v in (0.0, 1.0))
    assert torch.allclose(low[1:], high[:-1]) and low[0] == 0
    assert torch.allclose(high, cdf(d, value))


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    "d",
    [
        lambda v: dist.VonMises(t(0.0), t(1.0), validate_args=v),
        lambda v: dist.MultivariateNormal(torch.zeros(2), torch.eye(2), validate_args=v),
        lambda v: dist.Dirichlet(torch.ones(2), validate_args=v),
    ],
)
def test_families_without_a_cdf_are_named(d, validate):
    d = d(validate)
    for function in (cdf, icdf, probability_integral):
        with pytest.raises(NotImplementedError) as error:
            function(d, torch.full((2,), 0.5))
        assert str(error.value) == f"Expected a family with a cdf; got {type(d).__name__}."


def test_u_outside_of_the_unit_interval():
    with pytest.raises(ValueError, match=r"Expected u to lie in \[0, 1\]; got values from 0.5 to 1.5"):
        icdf(dist.Normal(0.0, 1.0), t(0.5, 1.5))


def test_factories_follow_the_inputs_device():
    one = torch.ones(2, device="cpu")
    with torch.device("meta"):
        families = [
            dist.StudentT(3 * one, 0 * one, one, validate_args=False),
            dist.Beta(one, one, validate_args=False),
            dist.Binomial(3 * one, 0.5 * one, validate_args=False),
            dist.NegativeBinomial(3 * one, 0.5 * one, validate_args=False),
            dist.GammaPoisson(one, one, validate_args=False),
            dist.Gumbel(one, one, validate_args=False),
        ]
        for d in families:
            assert {cdf(d, one).device, icdf(d, 0.7 * one).device, probability_integral(d, one).device} == {one.device}
