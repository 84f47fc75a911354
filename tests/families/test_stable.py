"""Stable distributions: the density against closed forms, SciPy, Fourier integrals in 60 digits, and samples."""

from __future__ import annotations

import copy
import math
import pickle

import mpmath as mp
import numpy
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch

from pyro_genexact.families import stable
from pyro_genexact.families.stable import Stable
from pyro_genexact.heads import Parametric
from pyro_genexact.numerics import ConvergenceError
from support.values import double


def log_prob(x, alpha, beta):
    x, alpha, beta = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (x, alpha, beta)))
    return Stable(alpha, beta).log_prob(x)


def on_a_ray(x, alpha, beta, digits=60):
    """log of the Fourier integral along a straight ray, by the trapezoidal rule in log t: it cancels, in enough digits."""
    mp.mp.dps = digits
    x, alpha, beta = mp.mpf(x), mp.mpf(alpha), mp.mpf(beta)
    zeta = mp.mpf(0) if alpha == 1 else -beta * mp.tan(mp.pi * alpha / 2)
    if x < zeta:
        x, beta, zeta = -x, -beta, -zeta
    start = mp.atan(zeta) / alpha
    angle = (max(0, start) + min(mp.pi / 2, start + mp.pi / (2 * alpha))) / 2 if alpha != 1 else mp.mpf("0.3")
    turn, step, total = mp.exp(-1j * angle), mp.mpf(1) / 32, mp.mpf(0)
    for k in range(-3200, 300):
        t = mp.exp(k * step) * turn
        psi = t + 2j * beta / mp.pi * t * mp.log(t) if alpha == 1 else t**alpha * (1 + 1j * zeta) - 1j * zeta * t
        total += (mp.exp(-1j * t * x - psi) * t).real
    return float(mp.log(total * step / mp.pi))


def test_closed_forms():
    x = double(-1e30, -1e8, -1e3, -2.0, -0.3, 0.0, 1e-9, 0.7, 5.0, 1e5, 1e8)
    assert torch.allclose(log_prob(x, 1.0, 0.0), dist.Cauchy(0.0, double(1.0)).log_prob(x), rtol=0, atol=1e-10)
    assert torch.allclose(
        log_prob(x, 2.0, 0.3), dist.Normal(0.0, double(2.0).sqrt()).log_prob(x), rtol=1e-12, atol=1e-11
    )
    y = double(0.01, 0.1, 1.0, 10.0, 1e4, 1e8)
    assert torch.allclose(log_prob(y - 1, 0.5, 1.0), torch.as_tensor(st.levy.logpdf(y)), rtol=1e-11, atol=1e-11)
    assert torch.allclose(log_prob(1 - y, 0.5, -1.0), torch.as_tensor(st.levy.logpdf(y)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("x", "alpha", "beta"),
    [
        (0.3, 1 + 1e-7, 0.5),
        (-40.0, 1.0, 0.5),
        (1e6, 1 - 1e-5, -0.7),
        (2.0, 1 - 1e-9, 1e-9),
        (-3.0, 1.05, 0.99),
        (50.0, 1.9, -0.9),
        (1e8, 1.999, 0.2),
        (-8.0, 1.6, 0.9999),
        (1.0, 0.6, -0.8),
        (-10.0, 1.99995496, 0.98050929),
        (-9.0, 1.999, 0.9999),  # 24 panels are too few for these two
        (-8.5, 1.99321, 0.99990),
    ],
)
def test_digits(x, alpha, beta):
    assert abs(float(log_prob(x, alpha, beta)) - on_a_ray(x, alpha, beta)) < 1e-9


def test_power_tails():
    """f -> α sin(πα/2) Γ(α) / π (1 + β) |x|^{-1-α}, and its slope."""
    for alpha, beta in ((0.4, 0.3), (1.0, -0.5), (1.5, 0.9), (1.95, -0.99)):
        x = double(1e12).requires_grad_()
        f = log_prob(x, alpha, beta)
        tail = alpha * math.sin(math.pi * alpha / 2) * math.gamma(alpha) / math.pi * (1 + beta)
        assert abs(float(f.detach()) - math.log(tail) + (1 + alpha) * math.log(1e12)) < 3e-5
        (slope,) = torch.autograd.grad(f.sum(), x)
        assert abs(float(slope) * 1e12 + 1 + alpha) < 3e-5


def test_light_tails():
    """log f is near -(α - 1) (|x - ζ| / α)^{α/(α-1)} |cos(πα/2)|^{1/(α-1)}.

    SciPy 1.17 says -105 and -124 of the first two.
    """
    for alpha in (1.5, 1.9, 1.2, 1.05):
        half = math.pi * alpha / 2
        gap = 20 - math.tan(half)
        leading = (alpha - 1) * (gap / alpha) ** (alpha / (alpha - 1)) * abs(math.cos(half)) ** (1 / (alpha - 1))
        f = float(log_prob(-20.0, alpha, 1.0))
        assert abs(f / -leading - 1) < 0.03 and f < -100


def test_scipy():
    grid = torch.cartesian_prod(double(0.4, 0.9, 1.3, 1.8), double(-0.9, 0.0, 0.5), double(-9.0, -0.4, 0.1, 3.0))
    alpha, beta, x = grid.unbind(-1)
    before, st.levy_stable.parameterization = st.levy_stable.parameterization, "S0"
    theirs = st.levy_stable.logpdf(x.numpy(), alpha.numpy(), beta.numpy())
    st.levy_stable.parameterization = before
    assert torch.allclose(log_prob(x, alpha, beta), torch.as_tensor(theirs), rtol=0, atol=1e-9)


def test_continuous_at_1_and_at_zolotarevs_point():
    for beta in (0.0, 1e-5, 0.4, -0.99):
        near = log_prob(0.7, 1 + double(-1e-7, -1e-10, 0.0, 1e-10, 1e-7), beta)
        assert (near - near[2]).abs().max() < 1e-6 and (near[1:4] - near[2]).abs().max() < 1e-9
    for alpha in (0.4, 0.8, 1.3, 1.9):
        zeta = -0.6 * math.tan(math.pi * alpha / 2)
        theta, a = math.atan(-zeta) / alpha, 1 / alpha
        log_f = math.lgamma(1 + a) + math.log(math.cos(theta) / math.pi) - math.log(1 + zeta * zeta) * a / 2
        assert (log_prob(zeta + double(-1e-14, 0.0, 1e-14), alpha, 0.6) - log_f).abs().max() < 1e-9


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    alpha = torch.cat([0.3 + 1.5 * torch.rand(30, generator=generator).double(), double(1.0, 1.0, 1 + 1e-12, 1 - 1e-6)])
    beta = 1.8 * torch.rand(34, generator=generator).double() - 0.9
    beta[30] = 0.0
    values = [3 * torch.randn(34, generator=generator).double(), alpha, beta, torch.ones_like(alpha), 0 * alpha]
    values = [v.requires_grad_() for v in values]

    def f(x, *parameters):
        return Stable(*parameters).log_prob(x)

    grads = torch.autograd.grad(f(*values).sum(), values)
    for i, grad in enumerate(grads):
        with torch.no_grad():
            moved = [f(*(v + k * 1e-3 * (i == j) for j, v in enumerate(values))) for k in (-2, -1, 1, 2)]
        difference = (moved[0] - 8 * moved[1] + 8 * moved[2] - moved[3]) / 12e-3
        assert torch.allclose(grad, difference, rtol=1e-6, atol=1e-6)


def test_finite_at_extremes():
    x = double(-1e30, -1e8, -1e4, 0.0, 1e-300, 1e4, 1e8, 1e30)
    for alpha in (0.2001, 0.7, 1.0, 1.0001, 1.7, 1.9999):
        for beta in (-0.9999, 0.0, 0.3):
            values = [x.clone().requires_grad_(), *(torch.full_like(x, v).requires_grad_() for v in (alpha, beta))]
            f = log_prob(*values)
            assert f.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(f.sum(), values))


def test_one_sided():
    values = [
        double(-4.0, -1.0, 0.5).requires_grad_(),
        torch.full((3,), 0.5).double().requires_grad_(),
        double(1.0, 1.0, 1.0),
    ]
    f = log_prob(*values)
    assert f[0] == -math.inf and f[2].isfinite()
    assert torch.autograd.grad(f[0], values[:1])[0].abs().max() == 0


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.5, 0.7), (0.999, -0.9), (1.0, 0.9), (1.006, 0.9), (1.7, -0.5), (2.0, 0.0)]
)
def test_samples(alpha, beta):
    """By the distribution function: the integral of the density, in x = sinh u. Near 1 Pyro's own interpolate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        samples = Stable(double(alpha), double(beta)).sample((20000,)).flatten()
    u = torch.linspace(-20, 20, 2001, dtype=torch.float64)
    density = log_prob(torch.sinh(u), alpha, beta).exp() * torch.cosh(u)
    cdf = torch.cumulative_trapezoid(density, u)
    test = st.kstest(torch.asinh(samples).numpy(), lambda v: numpy.interp(v, u[1:].numpy(), cdf.numpy()))
    assert test.pvalue > 1e-3


def test_reparameterised():
    with torch.random.fork_rng(devices=[]):
        for alpha in (0.7, 1.0, 1 + 1e-6, 1.5):
            values = [double(alpha).requires_grad_(), double(0.4).requires_grad_()]
            torch.manual_seed(0)
            grads = torch.autograd.grad(Stable(*values).rsample((50,)).atan().sum(), values)
            for i, grad in enumerate(grads):
                moved = []
                for k in (-1, 1):
                    torch.manual_seed(0)
                    moved.append(
                        Stable(*(v.detach() + 1e-5 * k * (i == j) for j, v in enumerate(values))).rsample((50,))
                    )
                difference = float((moved[1].atan().sum() - moved[0].atan().sum()) / 2e-5)
                assert abs(float(grad) - difference) < 1e-5 * (1 + abs(difference))


def test_as_a_distribution():
    d = Stable(double(1.5, 0.8), double(0.2, -0.3), double(2.0, 3.0), double(1.0, -1.0))
    wide = d.expand([4, 2])
    x = wide.sample((3,))
    assert type(wide) is Stable and x.shape == (3, 4, 2) and wide.log_prob(x).shape == (3, 4, 2)
    assert torch.allclose(d.log_prob(x), wide.log_prob(x))
    shift = d.scale * d.skew * (math.pi / 2 * d.stability).tan()
    other = Stable(d.stability, d.skew, d.scale, d.loc - shift, coords="S")
    assert torch.allclose(other.log_prob(x), d.log_prob(x), rtol=0, atol=1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = d.sample((5,))
        torch.manual_seed(3)
        assert torch.allclose(other.expand((2,)).sample((5,)), first)
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert torch.equal(twin.log_prob(x), d.log_prob(x))
    single = Stable(*(getattr(d, n).float() for n in ("stability", "skew", "scale", "loc")))
    assert single.sample().dtype == torch.float32 and single.log_prob(x.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="Expected coords to be 'S0' or 'S'; got 'S1'"):
        Stable(1.5, 0.0, coords="S1")
    with pytest.raises(ValueError):
        Stable(double(1.5), double(0.0), validate_args=True).log_prob(double(math.nan))


def test_infinite_values_and_nan():
    value = double(1.0, math.inf, -math.inf, -1e300).requires_grad_()
    parameters = [double(v).requires_grad_() for v in (1.5, 0.3, 1e-10, 0.0)]  # -1e300 / scale overflows
    for coords in ("S", "S0"):
        f = Stable(*parameters, coords=coords, validate_args=True).log_prob(value)
        assert torch.equal(f[1:], torch.full_like(f[1:], -math.inf))
        grads = torch.autograd.grad(f[1:].sum(), [value, *parameters])
        assert not any(g.any() for g in grads)
    f = Stable(1.5, double(0.0), validate_args=False).log_prob(double(1.0, math.nan, math.inf))
    assert f[1].isnan() and f[2] == -math.inf
    assert abs(float(f[0]) - on_a_ray(1.0, 1.5, 0.0)) < 1e-9  # beside them


def test_values_that_need_more_panels_get_them(monkeypatch):
    values = [double(1.0, -9.0, 0.4), double(1.5, 1.999, 0.8), double(0.2, 0.9999, -0.5)]
    expected = double(*(on_a_ray(*map(float, row)) for row in zip(*values, strict=True)))
    used = []
    integral = stable._integral
    monkeypatch.setattr(stable, "_integral", lambda x, *rest: used.append((len(x), rest[-1])) or integral(x, *rest))
    inputs = [v.requires_grad_() for v in values]
    f = log_prob(*inputs)
    assert torch.allclose(f, expected, rtol=0, atol=1e-9) and used == [(3, 24), (1, 48)]
    grads = torch.autograd.grad(f.sum(), inputs)
    monkeypatch.setattr(stable, "_PANELS", 96)
    for grad, finer in zip(grads, torch.autograd.grad(log_prob(*inputs).sum(), inputs), strict=True):
        assert torch.allclose(grad, finer, rtol=1e-7, atol=1e-9)


def test_an_unresolved_integral_is_an_error(monkeypatch):
    for end in (-1.0, 1.0):  # of the support: the exponent is rounded away
        alpha, beta = double(0.9), double(-end)
        x = math.nextafter(-float(Stable._shift(alpha, beta)), math.inf * -end)
        with pytest.raises(ConvergenceError, match=r"Expected quadrature rules .* less than 1e-05 .* got inf"):
            log_prob(x, alpha, beta)
    monkeypatch.setattr(stable, "_PANELS", 1)
    monkeypatch.setattr(stable, "_DOUBLINGS", 1)
    with pytest.raises(ConvergenceError, match="Expected quadrature rules to differ by less than 1e-05"):
        log_prob(0.3, 1.2, 0.5)


def test_head():
    for family in (dist.Stable, dist.StableWithLogProb):
        head = Parametric(family)
        d = head(torch.zeros(1, 4, dtype=torch.float64))
        assert head.family is Stable and head.has_rsample
        assert torch.allclose(torch.cat([d.stability, d.skew, d.scale, d.loc]), double(1.5, 0.0, 1.0, 0.0))


def test_values_too_far_for_the_integral():
    d = Stable(torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    with pytest.raises(ConvergenceError, match=r"Expected \|value - loc\| / scale <= 1e\+60.*got 1e\+100"):
        d.log_prob(torch.tensor(1e100, dtype=torch.float64))
