"""Models for tests of fits, with optima in closed form."""

from __future__ import annotations

import functools

import pyro.distributions as dist
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import pyro_genexact as gx


class Gaussian(nn.Module):
    """Full-covariance Gaussian over rows of D numbers."""

    def __init__(self, features=3):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(features, dtype=torch.float64))
        self.raw = nn.Parameter(torch.zeros(features, features, dtype=torch.float64))

    def forward(self):
        return dist.MultivariateNormal(self.loc, scale_tril=self.raw.tril(-1) + self.raw.diagonal().exp().diag())


class Linear(nn.Module):
    """y ~ Normal(x w + b, 1), with dropout where asked; remembers the contexts it was called with."""

    def __init__(self, features=2, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return dist.Normal(self.dropout(x) @ self.weight + self.bias, 1.0, validate_args=False)


class Keywords(Linear):
    """The same with a second input that says how many entries of x count."""

    def forward(self, x, lengths):
        return super().forward(x * (torch.arange(x.shape[-1]) < lengths[:, None]))


quiet = functools.partial(gx.fit, progress=False)


def keep_rate(optimizer, total_steps):
    return LambdaLR(optimizer, lambda step: 1.0)


def gaussian_rows(n=200, features=3):
    torch.manual_seed(1)
    mix = torch.randn(features, features, dtype=torch.float64) + 2 * torch.eye(features)
    return torch.randn(n, features, dtype=torch.float64) @ mix.T + torch.arange(features)


def regression_rows(n=40):
    torch.manual_seed(2)
    x = torch.randn(n, 2)
    return x @ torch.tensor([1.0, -2.0]) + 0.5 + torch.randn(n), x


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])
