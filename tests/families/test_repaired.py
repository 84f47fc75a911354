"""Repaired families: finite, exact and unbiased where torch's and Pyro's own classes are not."""

from __future__ import annotations

import copy
import math

import mpmath
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch

from pyro_genexact import Head
from pyro_genexact.families.continuous_bernoulli import ContinuousBernoulli
from pyro_genexact.families.in_support import contains
from pyro_genexact.families.repaired import REPAIRED
from pyro_genexact.heads import Parametric
from pyro_genexact.testing import distribution_head
from support import families
from support.values import draws, tensor

HEADS = {name: copy.deepcopy(head) for name, head in families.HEADS.items() if head.num_params}
del HEADS["StableWithLogProb"]  # another name of Stable
FRAMES = ("TransformedDistribution",)  # of the user's own making
SLOW = ("SineBivariateVonMises", "Stable")
EVERY = pytest.mark.parametrize("name", HEADS)


def wide(head, rows, spread, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (spread * torch.randn(rows, 2, head.num_params, generator=generator)).to(dtype).requires_grad_()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_law(name, dtype):
    head = copy.deepcopy(HEADS[name]).to(dtype)
    if name == "Gumbel":
        return  # exp(-exp(1e4)) is no number
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        distribution_head(head, sites=2, dtype=dtype, tol=1e-9 if dtype == torch.float64 else 2e-4)


class Torch(Head):
    """A family as torch or Pyro has it."""

    def __init__(self, name):
        super().__init__()
        self.made = copy.deepcopy(HEADS[name])
        self.made.family = getattr(dist, name)
        self.num_params, self.site_shape, self.support = self.made.num_params, self.made.site_shape, self.made.support

    def forward(self, phi, first=0):
        return self.made(phi)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("MixtureOfDiagNormals", torch.float64, "standard errors from the score function's"),
        ("SoftAsymmetricLaplace", torch.float64, "expand"),
        ("ZeroInflatedPoisson", torch.float64, "log_prob after a sample"),
        ("ZeroInflatedNegativeBinomial", torch.float64, "log_prob after a sample"),
        ("MultivariateNormal", torch.float32, "gradient at phi"),
        ("MultivariateStudentT", torch.float32, "at phi"),
    ],
)
def test_law_has_power(name, dtype, message):
    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError, match=message):
        torch.manual_seed(0)
        distribution_head(Torch(name), dtype=dtype, tol=1e-9 if dtype == torch.float64 else 2e-4)


@EVERY
@pytest.mark.parametrize("spread", [5.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_own_samples(name, spread, dtype):
    if name in FRAMES:
        return
    head = copy.deepcopy(HEADS[name]).to(dtype)
    phi = wide(head, 10 if name in SLOW else 200, spread, dtype)
    d = head(phi)
    value = draws(d)
    assert contains(head.support, value).all()
    log_prob = d.log_prob(value)
    (grad,) = torch.autograd.grad(log_prob.sum(), phi)
    assert log_prob.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("name", [n for n in REPAIRED if n in HEADS])
def test_validation(name):
    head = HEADS[name]
    d = head(torch.zeros(2, head.num_params, dtype=torch.float64))
    inside = draws(d).double()
    low = getattr(d.support, "lower_bound", None)
    outside = inside * math.nan if low is None else torch.as_tensor(low) - 1 + 0 * inside
    for value in [outside] + [torch.full_like(inside, end) for end in (0.0, 1.0) if name == "Kumaraswamy"]:
        d._validate_args = True
        assert d.log_prob(inside).isfinite().all()
        with pytest.raises(ValueError, match="within the support"):
            d.log_prob(value)


def exact_continuous_bernoulli(logit, x):
    with mpmath.workdps(60):
        logit, x = mpmath.mpf(logit), mpmath.mpf(x)
        return float(logit * x - (mpmath.log(mpmath.expm1(logit) / logit) if logit else 0))


LOGITS = [0.0, 1e-9, -1e-3, 0.05, -0.0999, 0.1001, 1.0, -5.0, 20.0, 40.0, -100.0, 700.0, -1e4]


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli(logit):
    x = torch.linspace(0, 1, 9, dtype=torch.float64)
    logits = tensor(logit).requires_grad_()
    d = ContinuousBernoulli(logits=logits)
    exact = tensor([exact_continuous_bernoulli(logit, float(v)) for v in x])
    assert torch.allclose(d.log_prob(x), exact, rtol=1e-14, atol=1e-13)
    single = ContinuousBernoulli(logits=tensor(logit).float()).log_prob(x.float())
    assert torch.allclose(single.double(), exact, rtol=2e-7, atol=2e-6)
    size = max(abs(logit), 1e-300)
    if size >= 0.1:  # SciPy's own forms cancel below
        theirs = st.truncexpon(size, scale=1 / size)
        flip = (lambda v: 1 - v) if logit > 0 else (lambda v: v)
        assert abs(float(d.mean.detach()) - flip(theirs.mean())) < 1e-12
        assert abs(float(d.variance.detach()) - theirs.var()) < 1e-10
        assert size > 700 or abs(float(d.entropy().detach()) - theirs.entropy()) < 1e-9  # where SciPy overflows
        assert torch.allclose(d.icdf(x[1:-1]), tensor(flip(theirs.ppf(flip(x[1:-1])))), rtol=1e-12)
    assert torch.allclose(d.cdf(d.icdf(x)), x, rtol=1e-9, atol=1e-12)
    samples = draws(d, 4000)
    spread, mean = float(d.variance.detach().sqrt()), float(d.mean.detach())
    assert abs(float(samples.mean()) - mean) < 4.5 * spread / math.sqrt(4000) and samples.dtype == torch.float64
    # the log normaliser's derivatives are the mean and the variance
    (slope,) = torch.autograd.grad(d.log_prob(tensor(0.25)), logits, create_graph=True)
    assert abs(float(slope.detach()) - (0.25 - mean)) < 1e-12
    (curvature,) = torch.autograd.grad(slope, logits)
    assert abs(float((curvature + d.variance).detach())) < 1e-8


def test_continuous_bernoulli_of_twenty():
    assert abs(float(draws(ContinuousBernoulli(logits=torch.tensor(20.0)), 4000).mean()) - 0.95) < 0.004


@pytest.mark.parametrize("size", [5.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mass_of_continuous_bernoulli(size, dtype):
    nodes = torch.linspace(-6, 0, 20001, dtype=torch.float64).expm1() / math.expm1(-6) * -1 + 1  # dense near 0
    for sign in (-1, 1):
        x = nodes if sign < 0 else 1 - nodes
        logits = torch.tensor(sign * size, dtype=dtype)
        p = ContinuousBernoulli(logits=logits).log_prob(x.to(dtype)).double().exp()
        assert abs(abs(float(torch.trapezoid(p, x))) - 1) < (1e-4 if dtype == torch.float64 else 1e-3)


def test_expand_of_the_soft_asymmetric_laplace():
    d = HEADS["SoftAsymmetricLaplace"](wide(HEADS["SoftAsymmetricLaplace"], 3, 0.5).detach())
    d._validate_args = True
    for shape in ((4, 3, 2), [4, 3, 2], torch.Size((4, 3, 2))):
        many = d.expand(shape)
        assert type(many) is type(d) and many.batch_shape == (4, 3, 2) and d.batch_shape == (3, 2)
        assert many._validate_args and draws(many, 5).shape == (5, 4, 3, 2)
        for value in (many.mean, many.variance, many.log_prob(tensor(0.3))):
            assert value.shape == (4, 3, 2)
        assert torch.equal(many.log_prob(tensor(0.3))[1], d.log_prob(tensor(0.3)))


def test_skew_logistic_quantiles_invert_the_cdf():
    d = REPAIRED["SkewLogistic"](tensor(0.3), tensor(2.0), tensor(1.7))
    u = tensor([1e-300, 1e-8, 0.3, 1 - 1e-9])
    assert torch.allclose(d.cdf(d.icdf(u)), u, rtol=1e-9, atol=0)


def test_mixtures_are_not_reparameterised():
    for name in ("MixtureOfDiagNormals", "MixtureOfDiagNormalsSharedCovariance"):
        head = HEADS[name]
        d = head(torch.zeros(2, head.num_params).requires_grad_())
        assert not head.has_rsample and not d.has_rsample and not d().requires_grad
        with pytest.raises(NotImplementedError):
            d.rsample()


def test_counts_stay_counts():
    d = Parametric(dist.NegativeBinomial)(tensor([5.0, 40.0]))
    samples = draws(d, 4000)
    total, odds = math.exp(10 * math.tanh(0.5)), math.exp(10 * math.tanh(4))
    mean, variance = total * odds, total * odds * (1 + odds)
    assert samples.min() >= 0 and abs(float(samples.mean()) - mean) < 4.5 * math.sqrt(variance / 4000)
    d = Parametric(dist.Geometric)(torch.tensor([-100.0]))
    p = 1 / (1 + math.exp(10))
    assert abs(float(draws(d, 4000).mean()) - (1 / p - 1)) < 4.5 / p / math.sqrt(4000)


def test_weibull_far_out():
    d = Parametric(dist.Weibull)(tensor([-100.0, 100.0]))
    theirs = st.weibull_min(d.concentration, scale=d.scale).logpdf(1.0)
    assert abs(float(d.log_prob(tensor(1.0))) / theirs - 1) < 1e-12
    phi = torch.tensor([-100.0, 100.0], requires_grad=True)
    log_prob = Parametric(dist.Weibull)(phi).log_prob(torch.tensor(1.0))
    (grad,) = torch.autograd.grad(log_prob, phi)
    assert log_prob == -math.inf and theirs < -3.5e38 and torch.equal(grad, torch.zeros(2))


def test_gumbel_far_out():
    loc = tensor(1e4).requires_grad_()
    log_prob = REPAIRED["Gumbel"](loc, tensor(1.0)).log_prob(tensor(0.0))
    (grad,) = torch.autograd.grad(log_prob, loc)
    assert log_prob == -math.inf and grad == 0
    z = torch.linspace(-5, 30, 50, dtype=torch.float64)
    assert torch.allclose(REPAIRED["Gumbel"](tensor(0.0), tensor(1.0)).log_prob(z), tensor(st.gumbel_r.logpdf(z)))


def student(z, df):
    with mpmath.workdps(50):
        z, df = mpmath.mpf(z), mpmath.mpf(df)
        norm = mpmath.loggamma((df + 1) / 2) - mpmath.loggamma(df / 2) - mpmath.log(df * mpmath.pi) / 2
        return float(norm - (df + 1) / 2 * mpmath.log1p(z * z / df))


@pytest.mark.parametrize("df", [0.1, 1.0, 4.0, 200.0, 1e6])
def test_student(df):
    z = tensor([0.0, 1e-9, 0.3, -2.0, 50.0, -1e10, 1e200, -1e300]).requires_grad_()
    log_prob = REPAIRED["StudentT"](tensor(df), tensor(0.0), tensor(1.0)).log_prob(z)
    exact = tensor([student(v, df) for v in z.tolist()])
    assert torch.allclose(log_prob, exact, rtol=1e-12, atol=1e-9)
    (slope,) = torch.autograd.grad(log_prob.sum(), z)
    inverse = 1 / torch.where(z == 0, 1, z.detach())
    assert torch.allclose(slope, torch.where(z == 0, 0, -(df + 1) * inverse / (1 + df * inverse * inverse)), rtol=1e-12)
    single = torch.tensor([1e25, -1e38])
    d = REPAIRED["StudentT"](torch.tensor(df), torch.tensor(0.0), torch.tensor(1.0))
    assert torch.allclose(d.log_prob(single).double(), tensor([student(float(v), df) for v in single]), rtol=1e-5)


def test_multivariate_student_far_out():
    phi = torch.full((10,), -100.0)  # df, three of loc, six of the factor
    d = Parametric(dist.MultivariateStudentT, (3,))(phi)
    exact = Parametric(dist.MultivariateStudentT, (3,))(phi.double())
    value = torch.ones(3)
    y = torch.linalg.inv(exact.scale_tril) @ (value.double() - exact.loc)
    df, log_det = float(exact.df), float(exact.scale_tril.logdet())
    norm = math.lgamma((df + 3) / 2) - math.lgamma(df / 2) - 1.5 * math.log(df * math.pi) - log_det
    theirs = norm - (df + 3) / 2 * math.log1p(float(y.square().sum()) / df)
    assert abs(float(exact.log_prob(value.double())) - theirs) < 1e-8
    assert abs(float(d.log_prob(value)) - theirs) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multivariate_student_beyond_squares(dtype):
    phi = torch.full((1 + 20 + 210,), -1e4, dtype=dtype).requires_grad_()  # y to 1e160 and more
    d = Parametric(dist.MultivariateStudentT, (20,))(phi)
    log_prob = d.log_prob(torch.ones(20, dtype=dtype))
    (grad,) = torch.autograd.grad(log_prob, phi)
    with mpmath.workdps(400):
        factor, df = mpmath.matrix(d.scale_tril.tolist()), mpmath.mpf(float(d.df.detach()))
        y = mpmath.lu_solve(factor, mpmath.matrix([1 - v for v in d.loc.tolist()]))
        square, log_det = sum(v * v for v in y), sum(mpmath.log(factor[i, i]) for i in range(20))
        norm = mpmath.loggamma((df + 20) / 2) - mpmath.loggamma(df / 2) - 10 * mpmath.log(df * mpmath.pi) - log_det
        exact = float(norm - (df + 20) / 2 * mpmath.log1p(square / df))
    assert square > 1e300 and grad.isfinite().all()
    assert abs(float(log_prob.detach()) / exact - 1) < (1e-12 if dtype == torch.float64 else 1e-6)


def test_low_rank_normal_does_not_cancel():
    """A factor far above the diagonal: torch's own density is off by a nat in float32, ours by its rounding."""
    factor, diagonal = torch.tensor([[43.0], [-73.0]]), torch.tensor([6e-4, 2e-4])
    value = factor[:, 0] * torch.tensor([-2.0, 0.3, 3.0]).unsqueeze(-1) + torch.tensor([0.01, -0.02])
    parts = torch.zeros(2), factor, diagonal
    exact = dist.LowRankMultivariateNormal(*(p.double() for p in parts)).log_prob(value.double())
    found = REPAIRED["LowRankMultivariateNormal"](*parts).log_prob(value).double()
    assert torch.allclose(found, exact, rtol=1e-6)
    assert (dist.LowRankMultivariateNormal(*parts).log_prob(value) - exact).abs().max() > 0.5


def test_normals_have_derivatives_of_all_kinds():
    for family in (dist.MultivariateNormal, dist.MultivariateStudentT, dist.LowRankMultivariateNormal):
        rank = {"rank": 1} if family is dist.LowRankMultivariateNormal else {}
        head, value = Parametric(family, (2,), **rank), tensor([0.3, -1.0])
        phi = (0.1 * torch.arange(head.num_params)).double().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda phi: head(phi).log_prob(value), phi)  # noqa: B023
        reverse = torch.func.jacrev(lambda phi: head(phi).log_prob(value))(phi)  # noqa: B023
        assert torch.allclose(torch.func.jacfwd(lambda phi: head(phi).log_prob(value))(phi), reverse)  # noqa: B023


@pytest.mark.parametrize(
    ("name", "phi"), [("Logistic", [0.0, 0.0]), ("SoftLaplace", [0.0, 0.0]), ("SkewLogistic", [0.0, 0.0, 0.0])]
)
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_uniform_numbers_at_the_ends(name, phi, u, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *ends: self.fill_(u))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(-math.log1p(-u)))
    assert HEADS[name](torch.tensor(phi)).rsample().isfinite()


@pytest.mark.parametrize("value", [1e-300, 1e-20, 1e-3, 2.0, 1e20, 1e300])
def test_far_tails(value):
    """Against 50 digits."""
    with mpmath.workdps(50):
        x, log = mpmath.mpf(value), mpmath.log
        a, b = mpmath.mpf(1) / 2, mpmath.mpf(3)
        beta = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(a + b)
        fisher = a * log(a / b) + (a - 1) * log(x) - (a + b) * mpmath.log1p(a / b * x) - beta
        pareto = log(a) - 3 * mpmath.log1p(a * x) - log(1)
        skewed = log(b) - b * mpmath.log1p(mpmath.exp(x)) - mpmath.log1p(mpmath.exp(-x)) if value < 1e3 else None
    d = REPAIRED["FisherSnedecor"](tensor(1.0), tensor(6.0))
    assert abs(float(d.log_prob(tensor(value))) / float(fisher) - 1) < 1e-12
    if "GeneralizedPareto" in REPAIRED:  # since torch 2.8
        d = REPAIRED["GeneralizedPareto"](tensor(0.0), tensor(2.0), tensor(1.0))
        assert abs(float(d.log_prob(tensor(value))) - float(-2 * mpmath.log1p(x / 2) - log(2))) < 1e-11
        d = REPAIRED["GeneralizedPareto"](tensor(0.0), tensor(1.0), tensor(0.5))
        assert abs(float(d.log_prob(tensor(value))) - float(pareto - log(a))) < 1e-11
    if skewed is not None:
        d = REPAIRED["SkewLogistic"](tensor(0.0), tensor(1.0), tensor(3.0))
        assert abs(float(d.log_prob(tensor(-value))) - float(skewed)) < 1e-13
    if value > 1:
        assert abs(float(REPAIRED["Pareto"](tensor(1.0), tensor(0.5)).log_prob(tensor(value))) - float(log(a) - 1.5 * log(x))) < 1e-10  # fmt: skip


@pytest.mark.parametrize(
    ("name", "phi", "theirs"),
    [
        ("Kumaraswamy", [1.0, 0.5], None),
        ("SkewLogistic", [0.5, 0.2, 1.0], lambda d: st.genlogistic(d.asymmetry, d.loc, d.scale)),
        ("Logistic", [0.5, 0.2], lambda d: st.logistic(d.loc, d.scale)),
        *(
            [("GeneralizedPareto", [0.3, -1.0], lambda d: st.genpareto(d.concentration, d.loc, d.scale))]
            if "GeneralizedPareto" in HEADS
            else []
        ),
        ("Pareto", [0.3], lambda d: st.pareto(d.alpha, scale=d.scale)),
        ("Weibull", [0.3, 0.6], lambda d: st.weibull_min(d.concentration, scale=d.scale)),
        ("FisherSnedecor", [0.3, 0.6], lambda d: st.f(d.df1, d.df2)),
        ("LogNormal", [0.3, 0.6], lambda d: st.lognorm(d.scale, scale=d.loc.exp())),
        ("StudentT", [0.3, 0.6, 0.1], lambda d: st.t(d.df, d.loc, d.scale)),
        ("ContinuousBernoulli", [-3.0], lambda d: st.truncexpon(3, scale=1 / 3)),
    ],
)
def test_samples(name, phi, theirs):
    d = HEADS[name](tensor(phi))
    cdf = theirs(d).cdf if theirs else lambda x: 1 - (1 - x ** float(d.concentration1)) ** float(d.concentration0)
    assert st.kstest(draws(d, 3000).numpy(), cdf).pvalue > 1e-3


if hasattr(dist, "GeneralizedPareto"):  # since torch 2.8

    def test_generalized_pareto_has_a_cdf_in_float64():
        """Torch's own has one in the default dtype alone."""
        d = Parametric(dist.GeneralizedPareto, loc=0.5)(torch.zeros(3, 2, dtype=torch.float64))
        value = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
        c = d.concentration
        torch.testing.assert_close(d.cdf(value), 1 - (1 + c * (value - 0.5) / d.scale) ** (-1 / c))


def test_gradients_of_large_draws_of_the_inverse_gamma():
    concentration = torch.full((4000,), 0.02, requires_grad=True)
    d = HEADS["InverseGamma"].family(concentration, torch.ones(4000))
    x = d.rsample()
    (grad,) = torch.autograd.grad(x.log().sum(), concentration)
    assert (x > 1e30).any() and grad.isfinite().all() and (grad[x > 1e30] == 0).all() and (grad[x < 1e15] != 0).all()
