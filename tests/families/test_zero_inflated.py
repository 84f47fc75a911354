"""Zero-inflated families: densities and gradients of the gate."""

from __future__ import annotations

import math

import mpmath
import pyro.distributions as dist
import pytest
import torch

from pyro_genexact.families.repaired import REPAIRED
from pyro_genexact.heads import Parametric
from support.values import draws, tensor


@pytest.mark.parametrize("logit", [-60.0, -3.0, 0.0, 30.0, 60.0, 400.0])
def test_zero_inflated(logit):
    gate, value = tensor([logit]).requires_grad_(), tensor([0.0, 3.0])
    with mpmath.workdps(400):
        open_, poisson = 1 / (1 + mpmath.exp(-logit)), mpmath.exp(-2) * mpmath.mpf(8) / 6
        exact = [float(mpmath.log(open_ + (1 - open_) * mpmath.exp(-2))), float(mpmath.log((1 - open_) * poisson))]
    d = REPAIRED["ZeroInflatedPoisson"](tensor(2.0), gate_logits=gate)
    for _ in range(2):
        assert torch.allclose(d.log_prob(value), tensor(exact), rtol=1e-13, atol=1e-15)
        (slope,) = torch.autograd.grad(d.log_prob(tensor([3.0])), gate)
        assert (slope + torch.sigmoid(gate)).abs() < 1e-14  # of -softplus
        draws(d), d.mean, d.variance
    assert torch.allclose(d.expand((5, 1)).log_prob(value), tensor(exact).expand(5, 2), rtol=1e-13)


def test_zero_inflated_by_a_fixed_gate():
    head = Parametric(dist.ZeroInflatedPoisson, gate=0.25)
    d = head(tensor([[[0.0]]]))
    for _ in range(2):
        zero, one = math.log(0.25 + 0.75 * math.exp(-1)), math.log(0.75) - 1
        assert torch.allclose(d.log_prob(tensor([0.0, 1.0]).reshape(2, 1, 1)).flatten(), tensor([zero, one]))
        draws(d)
    assert Parametric(dist.ZeroInflatedPoisson, gate=0.0)(tensor([[0.0]])).log_prob(tensor(0.0)) == -1


def zero_inflated_poisson(gate, values):
    gate = torch.nn.Parameter(tensor(gate))
    log_prob = Parametric(dist.ZeroInflatedPoisson, gate=gate)(tensor([[0.0]])).log_prob(tensor(values))
    return gate, log_prob


@pytest.mark.parametrize("gate", [0.0, 1e-300, 1e-9, 0.3, 1 - 1e-9])
def test_gradients_of_a_gate(gate):
    p = math.exp(-1)
    parameter, log_prob = zero_inflated_poisson(gate, [0.0, 3.0])
    zero, three = (float(torch.autograd.grad(lp, parameter, retain_graph=True)[0]) for lp in log_prob)
    assert abs(zero / ((1 - p) / (gate + (1 - gate) * p)) - 1) < 1e-12 and abs(three * (1 - gate) + 1) < 1e-12
    mass = gate + (1 - gate) * p, (1 - gate) * p / 6
    assert torch.allclose(log_prob, tensor(mass).log(), rtol=1e-12)
    if gate == 0.0:
        theirs = tensor(0.0).requires_grad_()
        dist.ZeroInflatedPoisson(tensor(1.0), gate=theirs).log_prob(tensor([0.0, 3.0])).sum().backward()
        assert abs(zero + three - float(theirs.grad)) < 1e-12 and abs(zero + three - 0.7183) < 1e-4


def test_gradients_of_a_gate_of_1():
    gate, log_prob = zero_inflated_poisson(1.0, [0.0])
    assert log_prob == 0 and abs(float(torch.autograd.grad(log_prob.sum(), gate)[0]) - (1 - math.exp(-1))) < 1e-15
    gate, log_prob = zero_inflated_poisson(1.0, [3.0])  # impossible: gradient zero, as outside the support
    assert log_prob == -math.inf and torch.autograd.grad(log_prob.sum(), gate)[0] == 0


@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
def test_a_gate_over_a_mass_that_underflows(gate):
    phi, gate = tensor([[8.0]]).requires_grad_(), torch.nn.Parameter(tensor(gate))
    head = Parametric(dist.ZeroInflatedPoisson, gate=gate)
    log_prob = head(phi).log_prob(tensor([0.0]))  # the base's is -rate
    exact = math.log(float(gate.detach())) if gate > 0 else -math.exp(10 * math.tanh(0.8))
    assert torch.allclose(log_prob, tensor([exact]), rtol=1e-12, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_prob.sum(), (phi, gate)))
