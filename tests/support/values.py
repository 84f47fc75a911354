"""Tensors in float64, modules far from their start, and what is evaluated of them."""

from __future__ import annotations

import math

import torch
from torch import nn

from pyro_genexact.testing import redraw

F64 = torch.float64
DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]  # and tolerances


def sized(*shape, seed=0):
    """Normal numbers, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def double(*values):
    return torch.tensor(values, dtype=F64)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.long)


def built(module):
    """In float64, all parameters far from the identity."""
    return redraw(module.double())


def draws(d, *shape, seed=0):
    """Samples that leave torch's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return d.sample(shape)


def with_ladj(transform, x):
    """y and log|det dy/dx|."""
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def normal_log_prob(x):
    """Of vectors of independent standard normal numbers."""
    return (-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).sum(-1)


class Built(nn.Module):
    """A transform made of parameters, as a module."""

    def __init__(self, make, **values):
        super().__init__()
        self.make, self.values = make, nn.ParameterDict(values)

    def forward(self):
        return self.make(**self.values)


def params_of(module):
    return dict(module.named_parameters())


def normal_weights(flow, scale=0.4):
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0.0, scale)
    return flow.double()


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)
