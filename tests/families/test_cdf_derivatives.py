"""Derivatives of cumulative distribution functions and of quantiles, against mpmath and finite differences."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from mpmath import mp

from pyro_genexact.families.cdf import cdf, icdf
from pyro_genexact.families.mixture import Mixture
from pyro_genexact.families.special import betainc
from pyro_genexact.heads import Parametric
from support.values import double as t

pytestmark = pytest.mark.usefixtures("double_by_default")


def test_gradients_by_shape_parameters():
    a, b, x = t(0.7, 2.0, 30.0).requires_grad_(), t(3.0).requires_grad_(), t(0.1, 0.6, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(betainc, (a, b, x))
    assert torch.autograd.gradgradcheck(betainc, (a, b, x))
    assert torch.autograd.gradcheck(lambda a, x: betainc(a, a, x), (a, x))  # one tensor, given twice
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
