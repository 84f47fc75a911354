"""Cumulative distribution functions and their inverses, against SciPy and in the tails."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats as st
import torch
from mpmath import mp

from pyro_genexact.families import special
from pyro_genexact.families.cdf import cdf, icdf, probability_integral
from pyro_genexact.families.mixture import Mixture
from pyro_genexact.families.special import betainc
from pyro_genexact.numerics import ConvergenceError
from support.values import F64
from support.values import double as t

pytestmark = pytest.mark.usefixtures("double_by_default")


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
if not hasattr(dist, "GeneralizedPareto"):  # before torch 2.8
    for _name in ("generalized_pareto", "ended_pareto", "generalized_pareto_without_power"):
        del CONTINUOUS[_name]
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


@pytest.mark.parametrize("name", ["student", "gamma", "beta", "inverse_gamma", "fisher"])
def test_quantiles_are_the_first_to_reach_u(name):
    d, _ = CONTINUOUS[name]()
    u = torch.cat([t(1e-100, 1e-20, 1e-9), torch.linspace(0.01, 0.99, 99), t(1 - 1e-9, 1 - 1e-15)])
    x = icdf(d, u)
    blur = torch.finfo(F64).eps * (64 * u / d.log_prob(x).exp() + 2 * x.abs())  # the rounding of these cdfs, and of x
    assert (cdf(d, x) >= u).all() and (cdf(d, x - blur) < u).all()


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


class Triangle(dist.Uniform):
    """The density 2 y on (0, 1), with a cdf that is registered."""

    def log_prob(self, value):
        return (2 * value).log()


cdf.register(Triangle, lambda d, value, support=None: value.clamp(0, 1) ** 2)


def test_a_registered_cdf():
    d, u = Triangle(t(0.0), 1.0), t(0.0, 0.09, 0.64, 1.0)
    assert torch.equal(cdf(d, t(-1.0, 0.5, 3.0)), t(0.0, 0.25, 1.0))
    assert torch.equal(cdf(d.expand((2,)).to_event(1), t(0.5, 2.0)), t(0.25, 1.0))
    mixture = Mixture(torch.zeros(2).double(), [d, dist.Normal(t(0.0), 1.0)])
    assert torch.allclose(cdf(mixture, t(0.5)), (0.25 + cdf(dist.Normal(t(0.0), 1.0), t(0.5))) / 2)
    assert torch.allclose(probability_integral(d, u.sqrt()), u)
