"""The discretised logistic distribution."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from pyro_genexact.families.discretized_logistic import DiscretizedLogistic
from support.checks import goodness
from support.values import F64, sized


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_discretized_logistic_mass_and_direct_formula(levels):
    loc = torch.cat([sized(200), 3 * sized(20, seed=1), torch.tensor([0.0, 1e4, -1e4, 1e8, -1e8, 1.0], dtype=F64)])
    for scale in (1e-300, 1e-9, 1e-5, 1e-3, 0.03, 0.7, 40.0, 1e4, 1e9):
        d = DiscretizedLogistic(loc, torch.tensor(scale, dtype=F64), levels)
        y = d.enumerate_support()
        lp = d.log_prob(y)
        assert not lp.isnan().any()
        assert (lp.exp().sum(0) - 1).abs().max() < 1e-10
        assert torch.allclose(d.cdf(y), lp.exp().cumsum(0), atol=1e-10)
        assert torch.allclose(d.mean, (lp.exp() * y).sum(0), atol=1e-9)
    d = DiscretizedLogistic(loc[:200], sized(200, seed=5).exp() / 4, levels)
    x, half = y[:, :200] * 2 / (levels - 1) - 1, 1 / (levels - 1)
    above = torch.sigmoid((x + half - d.loc) / d.scale).masked_fill(y[:, :200] == levels - 1, 1.0)
    below = torch.sigmoid((x - half - d.loc) / d.scale).masked_fill(y[:, :200] == 0, 0.0)
    assert torch.allclose(d.log_prob(y[:, :200]).exp(), above - below, atol=1e-13)


def test_discretized_logistic_of_numbers():
    d = DiscretizedLogistic(0.0, 1.0, 4)
    assert d.batch_shape == () and d.loc.dtype == torch.get_default_dtype()
    same = DiscretizedLogistic(torch.tensor(0.0), torch.tensor(1.0), 4)
    assert torch.equal(d.log_prob(d.enumerate_support()), same.log_prob(same.enumerate_support()))
    for d in (DiscretizedLogistic(0.5, sized(3).exp(), 4), DiscretizedLogistic(sized(3), 2, 4)):
        assert d.batch_shape == (3,) and d.loc.dtype == d.scale.dtype == F64
        assert (d.log_prob(d.enumerate_support()).exp().sum(0) - 1).abs().max() < 1e-12
    assert DiscretizedLogistic(sized(3), sized(2, 1).exp(), 4).batch_shape == (2, 3)
    with pytest.raises(ValueError, match="scale"):
        DiscretizedLogistic(0.0, -1.0, 4)


def test_discretized_logistic_far_tails():
    for loc, scale, y in (
        (-1.0, 0.01, 200.0),
        (1.0, 0.004, 3.0),
        (0.3, 0.002, 255.0),
        (0.9, 1e-3, 0.0),
        (0.0, 5.0, 7.0),
    ):
        d = DiscretizedLogistic(torch.tensor(loc, dtype=F64), torch.tensor(scale, dtype=F64), 256)
        c, r = (loc + 1) * 127.5, scale * 127.5
        a, b = (y - 0.5 - c) / r, (y + 0.5 - c) / r
        if y == 255:
            truth = scipy.special.log_expit(-a)
        elif y == 0:
            truth = scipy.special.log_expit(b)
        elif a > 0:  # the mirror image, by survival functions in log space
            hi, lo = scipy.special.log_expit(-a), scipy.special.log_expit(-b)
            truth = hi + np.log1p(-np.exp(lo - hi))
        else:
            hi, lo = scipy.special.log_expit(b), scipy.special.log_expit(a)
            truth = hi + np.log1p(-np.exp(lo - hi))
        assert np.isclose(d.log_prob(torch.tensor(y)).item(), truth, rtol=1e-11), (loc, scale, y)


def test_discretized_logistic_of_cells_narrower_than_rounding():
    d = DiscretizedLogistic(torch.zeros((), dtype=F64), torch.tensor(1e12, dtype=F64), 256)
    assert np.isclose(d.log_prob(torch.tensor(100.0, dtype=F64)).item(), np.log(1 / (4 * 127.5e12)), rtol=1e-12)


def test_discretized_logistic_gradient_values_and_types():
    loc, scale, y = sized(30).requires_grad_(), sized(30, seed=1).exp().requires_grad_(), torch.arange(30) % 6
    assert torch.autograd.gradcheck(lambda m, s: DiscretizedLogistic(m, s, 6).log_prob(y), (loc, scale))
    d = DiscretizedLogistic(loc, scale, 6, validate_args=False)
    assert torch.equal(d.log_prob(y), d.log_prob(y.double()))
    for bad in (-1.0, 6.0, 2.5, float("nan"), float("inf"), -1e8):
        lp = d.log_prob(torch.tensor(bad, dtype=F64))
        assert (lp == -torch.inf).all()
        grads = torch.autograd.grad(lp.sum(), (loc, scale))
        assert all((g == 0).all() for g in grads)
        with pytest.raises(ValueError, match="support"):
            DiscretizedLogistic(loc, scale, 6, validate_args=True).log_prob(torch.tensor(bad, dtype=F64))
    with pytest.raises(ValueError, match="levels to be an integer >= 2; got 1"):
        DiscretizedLogistic(loc, scale, 1)


def test_discretized_logistic_samples_quantiles_and_moments():
    torch.manual_seed(2)
    d = DiscretizedLogistic(torch.tensor([-0.9, 0.2], dtype=F64), torch.tensor([0.3, 0.1], dtype=F64), 16)
    y = d.expand([3, 2]).sample((5000,))
    probs = d.log_prob(d.enumerate_support()).exp()
    assert y.shape == (5000, 3, 2) and y.dtype == F64
    for i in range(2):
        assert goodness(y[..., i].flatten(), probs[:, i]) > 1e-3
    levels = d.enumerate_support()
    assert torch.equal(d.icdf(d.cdf(levels)[:15] - 1e-9), levels[:15])
    assert torch.equal(d.icdf(d.cdf(levels)[:15] + 1e-9), levels[1:])
    assert torch.equal(d.mode, probs.argmax(0).double()) and d.mode[0] == 0
    assert torch.allclose(d.variance, (probs * levels**2).sum(0) - d.mean**2, atol=1e-12)
    assert np.allclose(d.entropy(), scipy.stats.entropy(probs.numpy(), axis=0), atol=1e-12)
