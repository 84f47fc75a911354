"""Rosenblatt's transform of autoregressive models: uniform, independent numbers and back."""

import pytest
import torch

from pyro_genexact import conditioners, heads
from support.small_models import real

CONTINUOUS = {
    "Normal": heads.Normal,
    "StudentT": heads.StudentT,
    "Student with fixed df": lambda: heads.StudentT(df=4.0),
    "Laplace": heads.Laplace,
    "Gamma": heads.Gamma,
}


@pytest.mark.parametrize("family", CONTINUOUS)
def test_rosenblatt_of_continuous_heads(family):
    d = real(torch.tensor([2, 0, 1, 3]), head=CONTINUOUS[family]())()
    torch.manual_seed(0)
    y = d.sample((2000,))
    u = d.to_uniform(y)
    assert uniform(u)
    torch.testing.assert_close(d.from_uniform(u), y, rtol=1e-6, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(d.to_uniform, y[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], d.log_prob(y[0]), rtol=1e-6, atol=1e-6)


def uniform(u):
    """Kolmogorov-Smirnov for each site, and no rank correlation between them."""
    n = len(u)
    grid = (torch.arange(n, dtype=u.dtype) + 0.5) / n
    statistic = (u.sort(0)[0] - grid[:, None]).abs().max() * n**0.5
    correlation = torch.corrcoef(u.T) - torch.eye(u.shape[1], dtype=u.dtype)
    return statistic < 2.2 and correlation.abs().max() < 5 / n**0.5


@pytest.mark.parametrize("head", [heads.Bernoulli, heads.Poisson, lambda: heads.DiscretizedLogistic(7, 2)])
def test_rosenblatt_of_discrete_heads(head):
    d = real(head=head())()
    torch.manual_seed(1)
    y = d.sample((2000,))
    u = d.to_uniform(y)
    assert uniform(u)
    assert torch.equal(d.from_uniform(u).to(y.dtype), y)


def test_rosenblatt_of_a_prefix_and_of_padding():
    d = real()(lengths=torch.tensor([4, 2]))
    y = d.sample()
    u = d.to_uniform(y)
    assert u[0].isfinite().all() and u[1, 2:].isnan().all() and u[1, :2].isfinite().all()
    full = real()()
    rest = full.conditional_on_prefix(y[0, :2])
    torch.testing.assert_close(rest.to_uniform(y[0, 2:]), u[0, 2:])
    torch.testing.assert_close(rest.from_uniform(u[0, 2:]), y[0, 2:])


def test_rosenblatt_names_the_family_that_has_none():
    d = real(sites=2, head=heads.MultivariateNormal(2), net=conditioners.MADE(2, 5, site=(2,)))()
    with pytest.raises(NotImplementedError, match=r"cdf; got MultivariateNormal"):
        d.to_uniform(d.sample())
    with pytest.raises(NotImplementedError, match=r"cdf; got MultivariateNormal"):
        d.from_uniform(torch.rand(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="between 0 and 1"):
        real()().from_uniform(torch.full((4,), 1.5, dtype=torch.float64))
