"""The von Mises-Fisher distribution in three dimensions, against 60 digits."""

from __future__ import annotations

import math

import mpmath
import numpy
import pytest
import scipy.stats as st
import torch

from pyro_genexact.families.repaired import REPAIRED
from support.values import draws, tensor

MEAN = [2 / 7, -3 / 7, 6 / 7]


def langevin(kappa):
    with mpmath.workdps(40):
        return float(mpmath.coth(kappa) - 1 / mpmath.mpf(kappa)) if kappa else 0.0


@pytest.mark.parametrize("kappa", [0.0, 1e-300, 1e-20, 1e-6, 0.3, 0.5, 0.58, 0.59, 1.0, 30.0, 1e4, 1e8])
def test_von_mises_in_three_dimensions(kappa):
    """log_prob against 60 digits; its gradient is x - (coth kappa - 1 / kappa) mean."""
    mean = tensor(MEAN)
    phi = (kappa * mean).requires_grad_()
    values = torch.stack([mean, -mean, tensor([0.6, 0.0, 0.8]), tensor([0.0, 1.0, 0.0])])
    for value in values:
        log_prob = REPAIRED["VonMises3D"](phi).log_prob(value)
        (grad,) = torch.autograd.grad(log_prob, phi)
        with mpmath.workdps(60):
            p, x = ([mpmath.mpf(float(v)) for v in vector] for vector in (phi.detach(), value))
            k, size = mpmath.sqrt(sum(v * v for v in p)), mpmath.sqrt(sum(v * v for v in x))
            norm = mpmath.log(k / mpmath.sinh(k)) if k else 0
            exact = float(sum(a * b for a, b in zip(p, x, strict=True)) / size + norm - mpmath.log(4 * mpmath.pi))
        assert abs(float(log_prob.detach()) - exact) < 1e-14 * max(1, abs(exact))
        assert torch.allclose(grad, value - langevin(kappa) * mean, rtol=0, atol=1e-14)


def test_von_mises_in_three_dimensions_in_float32():
    """At the mode, where phi . x - kappa would cancel, and beyond the range of squares."""
    d = REPAIRED["VonMises3D"](torch.tensor(MEAN) * 1e8)
    assert abs(float(d.log_prob(torch.tensor(MEAN))) - math.log(1e8 / 2 / math.pi)) < 1e-4
    phi = torch.full((3,), 1e30, requires_grad=True)
    log_prob = REPAIRED["VonMises3D"](phi).log_prob(torch.tensor([0.6, 0.0, 0.8]))
    (grad,) = torch.autograd.grad(log_prob, phi)
    assert log_prob.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kappa", [0.0, 1e-9, 1e-6, 0.1, 1.0, 30.0, 1e4, 1e8])
def test_samples_of_von_mises_in_three_dimensions(kappa, dtype):
    mean = tensor(MEAN)
    d = REPAIRED["VonMises3D"]((kappa * mean).to(dtype))
    x = draws(d, 10000)
    assert x.dtype == dtype and d.support.check(x).all()
    x = x.double()
    across = x - (x @ mean)[:, None] * mean
    t = (x - mean).square().sum(-1) / 2  # 1 - the cosine, without cancellation
    exact = langevin(kappa)
    variance = 1 - exact**2 - 2 * exact / kappa if kappa > 1e-3 else 1 / 3
    assert abs(float(1 - t.mean()) - exact) < 4.5 * math.sqrt(max(variance, kappa and kappa**-2) / 10000)
    if dtype == torch.float64 or kappa < 1e8:  # then the numbers of float32 near the mean are few
        cdf = (lambda t: -numpy.expm1(-kappa * t) / -math.expm1(-2 * kappa)) if kappa else (lambda t: t / 2)
        assert st.kstest(t.numpy(), cdf).pvalue > 1e-3
        first = tensor([3.0, 2.0, 0.0]) / math.sqrt(13)
        angle = torch.atan2(across @ torch.linalg.cross(mean, first), across @ first)
        assert st.kstest(angle.numpy(), st.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3


@pytest.mark.parametrize("kappa", [0.0, 1e-9, 1e-3, 1.0, 20.0])
def test_pathwise_gradients_of_von_mises_in_three_dimensions(kappa):
    """Of the mean, A mean with A = coth kappa - 1 / kappa: A' along it, A / kappa across; also at 0, where both are 1 / 3."""
    mean = tensor(MEAN)
    phi = (kappa * mean).expand(20000, 3).clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = REPAIRED["VonMises3D"](phi).rsample()
    rows = torch.stack([torch.autograd.grad(x[:, i].sum(), phi, retain_graph=True)[0] for i in range(3)], 1)
    a = langevin(kappa)
    slope, ratio = (1 - a * a - 2 * a / kappa, a / kappa) if kappa > 1e-6 else (1 / 3, 1 / 3)
    exact = slope * torch.outer(mean, mean) + ratio * (torch.eye(3).double() - torch.outer(mean, mean))
    assert ((rows.mean(0) - exact).abs() < 4.5 * rows.std(0) / math.sqrt(20000) + 1e-9).all()
