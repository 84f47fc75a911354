"""Integrals, against SciPy's quad, with their errors and derivatives."""

from __future__ import annotations

from math import inf, nan

import numpy
import pytest
import scipy.integrate
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_genexact.numerics import ConvergenceError, integrate
from support.values import double as t

pytestmark = pytest.mark.usefixtures("double_by_default")


COUNT = 1000  # functions a family
QUADRATURES = {
    "exponential": lambda m, x, p: m.exp(2 * p[..., 0, None] * x) + p[..., 1, None] * x,
    "oscillating": lambda m, x, p: m.sin(6 * p[..., 0, None] * x + p[..., 1, None]) + p[..., 2, None],
}


@pytest.mark.parametrize("name", QUADRATURES)
def test_integrals_are_those_of_quad(name):
    p, bounds = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(1)).clamp(-2, 2), None
    bounds = 2 * torch.randn(2, COUNT, generator=torch.Generator().manual_seed(2))
    value, error = integrate(lambda x: QUADRATURES[name](torch, x, p), *bounds)
    rows = p.numpy()
    for i in range(COUNT):

        def f(x, i=i):
            return float(QUADRATURES[name](numpy, numpy.asarray([x]), rows[i])[0])

        theirs, uncertain = scipy.integrate.quad(f, *bounds[:, i].tolist(), epsabs=1e-13, epsrel=1e-13)
        assert abs(float(value[i]) - theirs) <= float(error[i]) + uncertain


def test_the_error_of_an_integral_is_not_underestimated():
    a = torch.linspace(-3, 3, 101)
    low, high = torch.full_like(a, -1), torch.full_like(a, 2)

    def wave(x):
        return torch.cos(a[:, None] * x)

    for tol in (1e-2, 1e-5, 1e-12):
        value, error = integrate(wave, low, high, tol=tol)
        exact = torch.where(a == 0, 3.0, ((2 * a).sin() + a.sin()) / torch.where(a == 0, 1, a))
        assert ((value - exact).abs() <= error).all()
    for kink in (0.3, 0.7, 1.21):  # within the tolerance, or an error
        exact = ((1 + kink) ** 2 + (2 - kink) ** 2) / 2
        value, error = integrate(lambda x, kink=kink: (x - kink).abs(), t(-1).squeeze(), t(2).squeeze(), tol=1e-3)
        assert abs(value - exact) < 3 * error
        with pytest.raises(ConvergenceError, match=r"Expected an integral with an error up to 1e-12 of its size; got"):
            integrate(lambda x, kink=kink: (x - kink).abs(), t(-1), t(2))


def test_bounds_of_an_integral():
    low, high = t(0.0, 2.0, 1.0, nan), t(2.0, 0.0, 1.0, 1.0)
    value, error = integrate(torch.exp, low, high)
    assert torch.allclose(value[:2], (high.exp() - low.exp())[:2], rtol=1e-14) and value[2] == 0 == error[2]
    assert value[3].isnan()
    with pytest.raises(ValueError, match="Expected finite bounds of the integral; got infinite ones"):
        integrate(lambda x: torch.exp(-x), t(0.0), t(inf))
    with pytest.raises(ConvergenceError) as caught:
        integrate(lambda x: 1 / x, t(1.0, 0.0), t(2.0, 1.0), doublings=2)
    assert caught.value.index == (1,) and caught.value.bracket == (0.0, 1.0) and caught.value.residual > 1e-12
    with pytest.raises(ConvergenceError):
        integrate(lambda x: x / 0, t(0.0), t(1.0), doublings=1)
    assert integrate(torch.exp, torch.empty(0, 3), torch.empty(3))[0].shape == (0, 3)
    assert integrate(torch.exp, t(0.0).float(), t(1.0).float())[0].dtype == torch.float32


def test_derivatives_of_integrals():
    inputs = (t(0.1, -0.4).requires_grad_(), t(1.3, -1.0).requires_grad_(), t(0.7).requires_grad_())

    def value(low, high, a):
        return integrate(lambda x: torch.exp(a * x).sin(), low, high)[0]

    assert gradcheck(value, inputs) and gradgradcheck(value, inputs)
    assert not integrate(lambda x: inputs[2] * x, *inputs[:2])[1].requires_grad


def test_without_branches_an_integral_is_accurate_or_nan():
    def both(scale):
        return integrate(lambda x: (scale * x.abs()).exp(), -torch.ones_like(scale), torch.full_like(scale, 0.7))[0]

    found = torch.func.vmap(both)(torch.tensor([0.0, 3.0], dtype=torch.float64))
    assert found[0].item() == pytest.approx(1.7, rel=1e-12) and found[1].isnan()
