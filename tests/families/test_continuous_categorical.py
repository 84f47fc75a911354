"""The continuous categorical distribution, against exact arithmetic, quadrature and finite differences."""

from __future__ import annotations

import pickle
from itertools import pairwise
from math import factorial, inf, lgamma, log

import mpmath
import numpy
import pytest
import scipy.stats as st
import torch

from pyro_genexact.families.continuous_categorical import ContinuousCategorical, _Break, _log_mean_exp, _log_means
from pyro_genexact.heads import ContinuousCategorical as Head
from support.values import F64
from support.values import double as t

SPREADS = (0.0, 1e-9, 1e-3, 0.5, 2.0, 5.0, 8.0, 20.0, 100.0, 1e3, 1e8)


def divided_difference(nodes):
    """Of exp, by the textbook recurrence in 400 digits, tied nodes set 1e-40 apart."""
    with mpmath.workdps(400):
        nodes = [mpmath.mpf(x) + i * mpmath.mpf(10) ** -40 for i, x in enumerate(sorted(nodes))]
        table = [mpmath.exp(x) for x in nodes]
        for m in range(1, len(nodes)):
            table = [(b - a) / (nodes[i + m] - nodes[i]) for i, (a, b) in enumerate(pairwise(table))]
        return table[0]


def logits_of(k, spread):
    """Spread evenly at random, half of them tied, and two clusters with near ties."""
    tied = spread * torch.rand(k, dtype=F64)
    tied[: (k + 1) // 2] = tied[0]
    clusters = spread * (torch.rand(k, dtype=F64) < 0.5) + 1e-9 * torch.rand(k, dtype=F64)
    eta = torch.stack([spread * torch.rand(k, dtype=F64), tied, clusters])
    return eta - eta.amax(-1, keepdim=True)  # representable numbers, which log_prob subtracts without rounding


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_density_and_mean_are_exact(k):
    for spread in SPREADS:
        eta = logits_of(k, spread).requires_grad_()
        d = ContinuousCategorical(eta)
        truth = [divided_difference(row) for row in eta.tolist()]
        mean = t(
            *(
                [float(divided_difference([*row, x]) / z) for x in row]
                for row, z in zip(eta.tolist(), truth, strict=True)
            )
        )
        assert torch.allclose(d.log_normalizer, t(*(float(mpmath.log(z)) for z in truth)), rtol=0, atol=1e-13)
        corner = torch.eye(k, dtype=F64)[0]
        assert torch.allclose(d.log_prob(corner), eta[:, 0] - d.log_normalizer, rtol=1e-15, atol=1e-13)
        assert torch.allclose(d.mean, mean, rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(d.log_normalizer.sum(), eta)
        assert torch.allclose(grad, mean, rtol=1e-12, atol=0)


def test_many_coordinates():
    for spread in (1.0, 15.0, 30.0, 60.0, 1e3):
        row = torch.linspace(-spread, 0, 25, dtype=F64)
        expected = float(mpmath.log(divided_difference(row.tolist())))
        assert abs(ContinuousCategorical(row).log_normalizer.item() - expected) < 1e-12 * max(1, abs(expected))


def test_huge_gap_in_closed_form():
    d = ContinuousCategorical(t(0.0, -1e8))
    assert abs(d.log_normalizer.item() - log(1e-8)) < 1e-14
    assert torch.allclose(d.mean, t(1 - 1e-8, 1e-8), rtol=1e-14, atol=0)
    assert torch.allclose(d.variance, t(1e-16, 1e-16), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
def test_finite_at_huge_logits(size, dtype):
    eta = size * torch.randn(60, 6, dtype=dtype)
    eta[:20] = size * eta[:20].sign()
    eta.requires_grad_()
    d = ContinuousCategorical(eta)
    x = d.rsample()
    assert d.support.check(x).all() and x.dtype == dtype
    grads = torch.autograd.grad(x.square().sum() + d.log_prob(x.detach()).sum() + d.entropy().sum(), eta)
    for value in (d.log_prob(x), d.log_prob(torch.full((6,), 1 / 6, dtype=dtype)), d.variance, d.entropy(), *grads):
        assert value.isfinite().all()


def test_derivatives_of_every_order():
    eta = t(0.3, -1.0, 2.0, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(_log_mean_exp, eta)
    assert torch.autograd.gradgradcheck(_log_mean_exp, eta)
    assert torch.autograd.gradcheck(lambda e: ContinuousCategorical(e).log_prob(t(0.1, 0.2, 0.3, 0.4)), eta)
    hessian = torch.autograd.functional.hessian(_log_mean_exp, eta)
    assert torch.allclose(hessian.diagonal(), ContinuousCategorical(eta).variance, rtol=1e-12)


def test_two_coordinates_are_the_continuous_bernoulli():
    logit = t(-7.0, -1.3, 0.4, 3.0)
    d = ContinuousCategorical(torch.stack([torch.zeros_like(logit), logit], -1))
    truth = torch.distributions.ContinuousBernoulli(logits=logit)
    x = torch.rand(9, 4, dtype=F64)
    assert torch.allclose(d.log_prob(torch.stack([1 - x, x], -1)), truth.log_prob(x), atol=1e-12)
    assert torch.allclose(d.mean[:, 1], truth.mean, atol=1e-12)
    assert torch.allclose(d.variance[:, 1], truth.variance, atol=1e-10)
    assert torch.allclose(d.entropy(), truth.entropy(), atol=1e-11)
    for i, sample in enumerate(d.sample((2000,))[..., 1].unbind(-1)):
        one = torch.distributions.ContinuousBernoulli(logits=logit[i])
        assert st.kstest(sample.numpy(), lambda v, one=one: one.cdf(torch.as_tensor(v)).numpy()).pvalue > 1e-3


def test_total_mass_and_moments_by_quadrature():
    eta = t(1.0, -2.0, 4.0)
    nodes, weights = map(torch.as_tensor, numpy.polynomial.legendre.leggauss(40))
    u, w = (nodes + 1) / 2, weights / 2
    x1, left = u[:, None].expand(40, 40), 1 - u[:, None]
    x = torch.stack([x1, left * u, left * (1 - u)], -1)
    d = ContinuousCategorical(eta)
    mass = d.log_prob(x).exp() * left * w[:, None] * w
    mean = (mass[..., None] * x).sum((0, 1))
    assert abs(mass.sum().item() - 1) < 1e-13
    assert torch.allclose(d.mean, mean, atol=1e-13)
    assert torch.allclose(d.variance, (mass[..., None] * (x - mean) ** 2).sum((0, 1)), atol=1e-13)
    assert torch.allclose(d.entropy(), -(mass * d.log_prob(x)).sum(), atol=1e-13)


def test_break_solves_for_every_uniform_number():
    log_u = torch.cat([-torch.logspace(-12, 0, 30, dtype=F64), -torch.linspace(1, 36.8, 40, dtype=F64)])
    for m in (1, 2, 4, 7):
        for spread in (0.0, 1.0, 5.0, 15.0, 30.0, 60.0, 200.0, 1e4, 1e8):
            for z in logits_of(m + 1, spread):
                z = (z - z.min()).sort().values.expand(len(log_u), -1)
                w = _Break.apply(z, log_u)
                start, _ = _log_means(z.T)
                whole, _ = _log_means(z.T * torch.exp(-w))
                log_s = -m * w + z[:, -1] * torch.expm1(-w) + whole - start
                assert torch.allclose(log_s, log_u, rtol=1e-13, atol=1e-13), (m, spread)


@pytest.mark.parametrize(
    "eta", [(0.0, 0.0, 0.0), (3.0, 3.0, -2.0, 0.5), (0.0, -40.0, 1.0), (2.0, 1.0, 0.0, -1.0, -2.0)]
)
def test_samples_have_the_closed_marginals(eta):
    d = ContinuousCategorical(t(*eta))
    x = d.sample((1000,))
    assert x.shape == (1000, len(eta)) and d.support.check(x).all()
    k = len(eta)
    for i in range(k):
        rest = [*eta[:i], *eta[i + 1 :]]

        def density(a, i=i, rest=rest):
            part = divided_difference([(1 - a) * r for r in rest]) / divided_difference(eta)
            return float(mpmath.exp(eta[i] * a) * (1 - a) ** (k - 2) * part)

        def survival(a, i=i):
            part = divided_difference([(1 - a) * e for e in eta]) / divided_difference(eta)
            return float(mpmath.exp(eta[i] * a) * (1 - a) ** (k - 1) * part)

        assert abs((survival(0.3 - 1e-5) - survival(0.3 + 1e-5)) / 2e-5 - density(0.3)) < 1e-6
        cdf = [1 - survival(a) for a in x[:200, i].tolist()]
        assert st.kstest(cdf, "uniform").pvalue > 1e-3
    spread = (d.variance / 1000).sqrt()
    assert ((x.mean(0) - d.mean).abs() < 4 * spread).all()


def test_reparameterised_gradients():
    eta = t(0.5, -1.0, 2.0, 0.5).requires_grad_()

    def draw(e):
        torch.manual_seed(3)
        return ContinuousCategorical(e).rsample((3,))

    # pathwise: of the same uniform numbers; ties are broken by the sort, so they are set apart here
    apart = (eta.detach() + t(0, 0, 0, 0.1)).requires_grad_()
    assert torch.autograd.gradcheck(draw, apart)
    assert torch.autograd.gradgradcheck(draw, apart)
    # and in expectation: E x_i^2 = variance + mean^2
    torch.manual_seed(0)
    weight = t(1.0, 2.0, -1.0, 0.5)
    d = ContinuousCategorical(eta)
    per_sample = eta.detach().expand(4000, 4).clone().requires_grad_()
    each = ContinuousCategorical(per_sample)
    (grads,) = torch.autograd.grad((each.rsample() ** 2 @ weight).sum(), per_sample)
    (truth,) = torch.autograd.grad((d.variance + d.mean**2) @ weight, eta)
    assert ((grads.mean(0) - truth).abs() < 4 * grads.std(0) / 4000**0.5).all()


def test_outside_of_the_simplex():
    outside = t([0.5, 0.5, 0.5], [-0.1, 0.6, 0.5], [torch.nan, 0.5, 0.5], [inf, 0.0, 0.0])
    eta = t(0.1, 0.2, 0.3).requires_grad_()
    log_prob = ContinuousCategorical(eta, validate_args=False).log_prob(outside)
    assert torch.equal(log_prob, torch.full((4,), -inf, dtype=F64))
    (grad,) = torch.autograd.grad(log_prob.sum(), eta)
    assert torch.equal(grad, torch.zeros(3, dtype=F64))
    with pytest.raises(ValueError, match="within the support"):
        ContinuousCategorical(eta, validate_args=True).log_prob(outside)
    with pytest.raises(ValueError, match=r"Expected value.shape\[-1\] == 3 \(the number of logits\); got \(2,\)."):
        ContinuousCategorical(eta, validate_args=False).log_prob(t(0.5, 0.5))
    with pytest.raises(ValueError, match=r"Expected logits.shape\[-1\] >= 2; got \(4, 1\)."):
        ContinuousCategorical(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="Expected parameter logits"):
        ContinuousCategorical(t(0.0, torch.nan), validate_args=True)
    assert ContinuousCategorical(t(0.0, 1.0)).log_prob(t([0.0, 1.0], [1.0, 0.0])).isfinite().all()  # the border is in


def test_shapes_expand_and_copies():
    d = ContinuousCategorical(torch.randn(2, 1, 4, dtype=F64))
    wide = d.expand([2, 3])
    assert wide.batch_shape == (2, 3) and d.batch_shape == (2, 1) and wide.event_shape == (4,)
    x = wide.sample((5,))
    assert x.shape == (5, 2, 3, 4)
    assert torch.equal(wide.log_prob(x), d.log_prob(x)) and wide.log_prob(x[0, 0, 0]).shape == (2, 3)
    again = pickle.loads(pickle.dumps(d))
    assert torch.equal(again.log_prob(x), d.log_prob(x))
    assert torch.equal(d.mode, torch.nn.functional.one_hot(d.logits.argmax(-1), 4).double())
    shifted = ContinuousCategorical(d.logits + 5)
    assert torch.allclose(shifted.log_prob(x), d.log_prob(x), atol=1e-12)


def test_head_starts_uniform():
    head = Head(4)
    assert (head.num_params, head.site_shape, head.support.event_dim) == (4, (4,), 1)
    d = head(torch.zeros(7, 2, 4))
    assert d.batch_shape == (7, 2) and d.event_shape == (4,)
    assert torch.allclose(d.log_prob(d.sample()), torch.full((7, 2), lgamma(4)))
    assert d.log_prob(torch.eye(4)[0]).exp()[0, 0].item() == pytest.approx(factorial(3))
    with pytest.raises(ValueError, match="Expected k to be an integer >= 2; got 1"):
        Head(1)
    assert head(torch.tensor([[[0.0, 50.0, 0.0, 0.0]]])).mean[0, 0, 1].item() == pytest.approx(0.94, abs=1e-3)


def test_factories_follow_the_inputs_device():
    logits = torch.randn(3, 4, dtype=F64)
    with torch.device("meta"):
        d = ContinuousCategorical(logits, validate_args=False)
        for value in (d.rsample(), d.log_prob(torch.full_like(logits, 0.25)), d.mean, d.variance, d.entropy(), d.mode):
            assert value.device == logits.device
