"""Beta-Gaussian distributions: mass, moments, entropy, cdf and loss by quadrature, samples by chi-square, gradients."""

from __future__ import annotations

import itertools
import math

import numpy
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from pyro_genexact.distributions import BetaGaussian, MultivariateBetaGaussian
from pyro_genexact.families.cdf import cdf, icdf
from pyro_genexact.families.fenchel_young import fenchel_young_loss
from support.values import F64, double, sized

ALPHAS = (1.001, 4 / 3, 1.5, 2.0, 3.0)
EVERY = pytest.mark.parametrize("alpha", ALPHAS)
TRIL = double([0.8, 0.0], [-0.5, 1.3])


def made(alpha, loc=0.3, scale=0.7):
    return BetaGaussian(double(loc)[0], double(scale)[0], alpha, validate_args=False)


def on_support(d, steps=20001):
    """Nodes and weights of the trapezoid rule in the angle whose sine is the relative position."""
    angle = torch.linspace(-math.pi / 2, math.pi / 2, steps, dtype=F64)
    return d.loc + d.radius * angle.sin(), d.radius * angle.cos() * (angle[1] - angle[0])


@EVERY
def test_mass_moments_and_entropy_by_quadrature(alpha):
    d = made(alpha)
    y, weights = on_support(d)
    p = d.log_prob(y).exp()
    off = y - d.loc
    assert abs((p * weights).sum() - 1) < 1e-8
    assert abs((p * off * weights).sum()) < 1e-10 and d.mean == d.loc == d.mode
    assert abs((p * off**2 * weights).sum() - d.variance) < 1e-8
    assert abs(-(torch.special.xlogy(p, p) * weights).sum() - d.entropy()) < 1e-8
    assert p.argmax() == 10000


@EVERY
def test_density_is_that_of_the_paper(alpha):
    """A power of a parabola, whose constant tau is minus its value at the ends."""
    d, y = made(alpha), double(-0.1, 0.3, 0.65)
    tau = -(d.radius**2) / (2 * 0.7**2)
    expected = ((alpha - 1) * (-tau - (y - 0.3) ** 2 / (2 * 0.7**2))) ** (1 / (alpha - 1))
    assert torch.allclose(d.log_prob(y).exp(), expected, rtol=1e-9)


def test_known_cases():
    assert math.isclose(made(2.0).radius, (1.5 * 0.7**2) ** (1 / 3), rel_tol=1e-14)  # the truncated paraboloid
    near = made(1 + 1e-8)
    normal, y = dist.Normal(near.loc, 0.7), double(-1.0, 0.0, 1.5)
    assert torch.allclose(near.log_prob(y), normal.log_prob(y), atol=1e-7)
    assert torch.allclose(near.fenchel_young(y), -normal.log_prob(y), atol=1e-7)
    assert torch.allclose(near.entropy(), normal.entropy(), atol=1e-7)
    flat = made(1e6)
    assert torch.allclose(flat.log_prob(near.loc), -(2 * flat.radius).log(), atol=1e-5)


@EVERY
def test_samples_by_chi_square(alpha):
    d = made(alpha)
    for draw in (d.sample, d.rsample):
        y = draw((20000,))
        assert (d.log_prob(y) > -math.inf).all() and d.support.check(y).all()
        counts = torch.histc(d.cdf(y), 40, 0, 1)
        assert st.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1.05, 1.5, 3.0])
def test_cdf_and_quantiles(alpha):
    d, k = made(alpha), 1 / (alpha - 1)
    u = double(1e-9, 1e-3, 0.2, 0.5, 0.9, 1 - 1e-6)
    y = d.icdf(u)
    expected = st.beta(k + 1, k + 1, float(d.loc - d.radius), float(2 * d.radius))
    assert torch.allclose(d.cdf(y), u, rtol=1e-9, atol=0)
    assert torch.allclose(d.cdf(y), torch.from_numpy(expected.cdf(y)), rtol=1e-6, atol=1e-12)
    assert torch.equal(icdf(d, u), y) and torch.equal(cdf(d, y), d.cdf(y))
    ends = double(0.0, 1.0)
    assert torch.allclose(d.icdf(ends), d.loc + d.radius * double(-1.0, 1.0))
    assert torch.equal(d.cdf(double(-1e9, 1e9)), ends)
    assert d.cdf(double(math.nan, 0.3)).isnan().tolist() == [True, False]
    assert d.icdf(double(-0.1, math.nan, 1.1, 0.5)).isnan().tolist() == [True, True, True, False]


def test_gradient_of_quantiles():
    """The position relative to the support does not depend on loc and scale."""
    loc, scale = double(0.3, -0.2).requires_grad_(), double(0.7, 1.2).requires_grad_()
    d = BetaGaussian(loc, scale, 1.5)
    y = d.icdf(double(0.1, 0.8))
    by_loc, by_scale = grad(y.sum(), (loc, scale))
    expected = ((y - loc) / d.radius).detach() * grad(d.radius.sum(), scale)[0]
    assert torch.allclose(by_loc, torch.ones_like(loc)) and torch.allclose(by_scale, expected)


@pytest.mark.parametrize("alpha", [1.2, 2.0])
def test_gradients(alpha):
    """Of every quantity, by finite differences; of samples at the same random numbers."""
    loc, scale = double(0.3, -0.2).requires_grad_(), double(0.7, 1.2).requires_grad_()
    power = double(alpha, alpha).requires_grad_()
    y = double(0.5, 0.1)

    def queries(loc, scale, power):
        d = BetaGaussian(loc, scale, power, validate_args=False)
        return d.log_prob(y), d.entropy(), d.variance, d.radius, d.fenchel_young(y + 3), d.cdf(y)

    assert gradcheck(queries, (loc, scale, power), fast_mode=True)
    assert gradgradcheck(lambda *args: queries(*args)[:-1], (loc, scale, power), fast_mode=True)

    def draws(loc, scale):
        torch.manual_seed(0)
        return BetaGaussian(loc, scale, alpha).rsample((3,))

    assert gradcheck(draws, (loc, scale))


def test_gradient_of_samples_by_alpha():
    """Its mean for (y - loc)^2 is the derivative of the variance."""
    alpha = torch.tensor(1.5, dtype=F64, requires_grad=True)
    d = BetaGaussian(double(0.0)[0], double(1.0)[0], alpha)
    many = alpha.detach().expand(40000).clone().requires_grad_()
    y = BetaGaussian(torch.zeros_like(many), torch.ones_like(many), many).rsample()
    found, expected = grad(y.square().sum(), many)[0], grad(d.variance, alpha)[0]
    assert abs(found.mean() - expected) < 4 * found.std() / 200


def test_zero_outside():
    loc, scale = double(0.0).requires_grad_(), double(1.0).requires_grad_()
    d = BetaGaussian(loc, scale, 1.5, validate_args=False)
    y = double(-math.inf, -1e8, -d.radius.item() - 1e-9, 0.5, 2.0, math.inf, math.nan).requires_grad_()
    lp = d.log_prob(y)
    assert (lp == -math.inf).tolist() == [True, True, True, False, True, True, True]
    assert not any(g.any() for g in grad(lp[[0, 1, 2, 4, 5, 6]].sum(), (loc, scale, y), retain_graph=True))
    assert all(g.isfinite().all() for g in grad(lp.sum(), (loc, scale, y)))
    with pytest.raises(ValueError, match="within the support"):
        BetaGaussian(0.0, 1.0, validate_args=True).log_prob(torch.tensor(3.0))


def natural(theta, alpha):
    """With energy theta_1 y + theta_2 y^2."""
    return BetaGaussian(-theta[0] / (2 * theta[1]), (-0.5 / theta[1]).sqrt(), alpha, validate_args=False)


@EVERY
def test_fenchel_young_loss(alpha):
    """By quadrature of its definition; the gradient by finite differences and as a difference of moments; convexity."""
    theta, values = double(0.6, -1.1).requires_grad_(), double(-4.0, 0.1, 7.0)
    d = natural(theta.detach(), alpha)
    y, weights = on_support(d)
    p, energy = d.log_prob(y).exp(), -((y - d.loc) ** 2) / (2 * d.scale**2)
    negentropy = ((p**alpha * weights).sum() - 1) / (alpha * (alpha - 1))
    expected = (p * energy * weights).sum() - negentropy + (values - d.loc) ** 2 / (2 * d.scale**2)
    assert torch.allclose(d.fenchel_young(values), expected, atol=1e-8)
    assert gradcheck(lambda theta: natural(theta, alpha).fenchel_young(values), theta)
    moments = torch.stack([d.mean, d.variance + d.mean**2])
    for value in values:
        (found,) = grad(natural(theta, alpha).fenchel_young(value), theta)
        assert torch.allclose(found, moments - torch.stack([value, value**2]), rtol=1e-10)
    ends = [torch.stack([sized(50, seed=s), -sized(50, seed=s + 2).exp()]) for s in (0, 1)]
    at = [natural(theta, alpha).fenchel_young(values[:, None]) for theta in (*ends, (ends[0] + ends[1]) / 2)]
    assert (at[2] <= (at[0] + at[1]) / 2 + 1e-12).all()


@EVERY
def test_loss_is_smallest_at_the_moments(alpha):
    data, k = 2 + 0.3 * sized(100), 1 / (alpha - 1)
    radius = ((2 * k + 3) * data.var(correction=0)).sqrt()
    beta = math.lgamma(0.5) + math.lgamma(k + 1) - math.lgamma(k + 1.5)
    scale = (((2 * k + 1) * radius.log() + beta) / k).exp() / (2 * k)
    loc, scale = data.mean().requires_grad_(), scale.sqrt().requires_grad_()
    d = BetaGaussian(loc, scale, alpha, validate_args=False)
    assert torch.allclose(d.variance, data.var(correction=0), rtol=1e-10)
    assert all(abs(g) < 1e-8 for g in grad(d.fenchel_young(data).mean(), (loc, scale)))


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_vectors(alpha):
    """Mass, covariance and entropy by quadrature in polar coordinates; samples by the distribution of the radius."""
    d = MultivariateBetaGaussian(double(1.0, -2.0), TRIL, alpha, validate_args=False)
    nodes, rule = map(torch.from_numpy, numpy.polynomial.legendre.leggauss(80))
    part = math.pi / 4 * (1 + nodes)
    r, angle = d.radius * part.sin(), torch.arange(60, dtype=F64) * (2 * math.pi / 60)
    x = r[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)
    weights = (math.pi / 4 * rule * r * d.radius * part.cos())[:, None] * (2 * math.pi / 60) * TRIL.det()
    y = d.loc + x @ TRIL.T
    p = d.log_prob(y).exp() * weights
    off = y - d.loc
    tol = 1e-8
    assert abs(p.sum() - 1) < tol
    assert torch.allclose(torch.einsum("ij,ijk,ijl->kl", p, off, off), d.covariance_matrix, atol=tol)
    lp = d.log_prob(y)
    assert abs(-(p * torch.where(p > 0, lp, 0)).sum() - d.entropy()) < tol
    draws, k = d.rsample((20000,)), 1 / (alpha - 1)
    z = torch.linalg.solve_triangular(TRIL, (draws - d.loc).T, upper=False)
    assert st.kstest(z.square().sum(0) / d.radius**2, st.beta(1, k + 1).cdf).pvalue > 1e-3
    assert st.kstest(torch.atan2(z[1], z[0]), st.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3
    assert d.support.check(draws).all() and not d.support.check(d.loc + 9)
    assert d.log_prob(d.loc + 9) == -math.inf and d.fenchel_young(d.loc + 9).isfinite()


def test_batches_of_vectors():
    tril = torch.stack([TRIL, 2 * TRIL, TRIL + torch.eye(2)])[:, None].expand(3, 2, 2, 2)
    d = MultivariateBetaGaussian(sized(3, 2, 2), tril, double(1.5, 2.0), validate_args=False)
    y = d.rsample((5,))
    lp, radii = d.log_prob(y), []
    for i, j in itertools.product(range(3), range(2)):
        one = MultivariateBetaGaussian(d.loc[i, j], tril[i, j], d.alpha[i, j])
        radii.append(torch.linalg.solve(tril[i, j], (y[:, i, j] - d.loc[i, j]).T).norm(dim=0) / one.radius)
        assert torch.allclose(torch.stack([one.log_prob(x) for x in y[:, i, j]]), lp[:, i, j])
    assert 0.8 < torch.cat(radii).max() < 1
    assert MultivariateBetaGaussian(torch.zeros(0, 2), TRIL, validate_args=False).rsample((3,)).shape == (3, 0, 2)


def test_one_dim_of_vectors_is_the_univariate_one():
    one = MultivariateBetaGaussian(double(0.3), double([0.7]), 1.5, validate_args=False)
    y = double(-5.0, 0.1, 0.5)
    assert torch.allclose(one.log_prob(y[:, None]), made(1.5).log_prob(y))
    assert torch.allclose(one.fenchel_young(y[:, None]), made(1.5).fenchel_young(y))
    assert torch.allclose(one.entropy(), made(1.5).entropy()) and torch.allclose(one.variance, made(1.5).variance)


def test_loss_of_vectors_matches_moments():
    loc, tril = double(0.5, 0.0).requires_grad_(), TRIL.clone().requires_grad_()
    data = sized(50, 2)

    def loss(loc, tril):
        return MultivariateBetaGaussian(loc, tril, 1.5, validate_args=False).fenchel_young(data).mean()

    assert gradcheck(loss, (loc, tril))
    precision = (TRIL @ TRIL.T).inverse().requires_grad_()
    d = MultivariateBetaGaussian(data.mean(0), torch.linalg.cholesky(precision.inverse()), 1.5, validate_args=False)
    (found,) = grad(d.fenchel_young(data).mean(), precision)
    expected = (data.T.cov(correction=0) - d.covariance_matrix) / 2  # the energy is -tr(precision y y') / 2
    assert torch.allclose((found + found.T) / 2, expected, atol=1e-10)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_other_dtypes(dtype, tol):
    d, exact = BetaGaussian(torch.tensor(0.5, dtype=dtype), torch.tensor(1.0, dtype=dtype), 1.5), made(1.5, 0.5, 1.0)
    y = double(-0.5, 0.5, 1.5).to(dtype)
    for name in ("log_prob", "fenchel_young", "cdf"):
        got = getattr(d, name)(y)
        assert got.dtype == dtype and torch.allclose(got.double(), getattr(exact, name)(y.double()), atol=tol)
    far = BetaGaussian(torch.tensor(1e8, dtype=dtype), torch.tensor(0.1, dtype=dtype), validate_args=False)
    y = far.sample((100,))
    assert y.dtype == dtype and far.log_prob(y).isfinite().all() and far.support.check(y).all()


def test_shapes_and_independent():
    d = BetaGaussian(torch.zeros(3, 1), torch.ones(2), validate_args=False)
    assert d.batch_shape == (3, 2) and d.expand([4, 3, 2]).rsample((5,)).shape == (5, 4, 3, 2)
    y = 9 * torch.ones(3, 2)
    assert torch.allclose(fenchel_young_loss(d.to_event(1), y), d.fenchel_young(y).sum(-1))
    wide = MultivariateBetaGaussian(torch.zeros(2), torch.eye(2), torch.tensor([1.5, 2.0]))
    assert wide.batch_shape == (2,) and wide.expand((3, 2)).sample((4,)).shape == (4, 3, 2, 2)


@pytest.mark.parametrize("bad", [{"alpha": 1.0}, {"alpha": 0.5}, {"scale": 0.0}, {"scale": -1.0}, {"loc": math.nan}])
def test_wrong_parameters(bad):
    with pytest.raises(ValueError, match=f"Expected parameter {next(iter(bad))}"):
        BetaGaussian(**({"loc": 0.0, "scale": 1.0} | bad), validate_args=True)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"Expected loc \(\*batch, n\) and scale_tril .*; got \(3,\) and \(2, 2\)"):
        MultivariateBetaGaussian(torch.zeros(3), torch.eye(2))
    with pytest.raises(ValueError, match=r"broadcast; got loc \(3,\), scale_tril \(\), alpha \(2,\)"):
        MultivariateBetaGaussian(torch.zeros(3, 2), torch.eye(2), torch.tensor([1.5, 2.0]))
    with pytest.raises(ValueError, match=r"Expected value.shape\[-1\] == 2 \(the length of loc\); got \(3,\)"):
        MultivariateBetaGaussian(torch.zeros(2), torch.eye(2), validate_args=False).log_prob(torch.zeros(3))
    d = BetaGaussian(0.0, 1.0, validate_args=False)
    for query in (d.log_prob, d.fenchel_young):
        with pytest.raises(TypeError, match=r"Expected value to have a real dtype; got torch\.complex64"):
            query(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(TypeError, match="Expected value to be of class Tensor; got float"):
            query(0.5)
