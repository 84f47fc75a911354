"""A conjugate normal model, its guides, and its posterior and evidence in closed form."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from support.values import F64

NORMAL = dist.Normal(torch.zeros((), dtype=F64), 1.0)
DATA = torch.tensor([0.3, 1.9, -0.4, 1.1, 2.2], dtype=F64)
NUM = len(DATA)
VARIANCE = 1 / (1 + NUM / 0.49)
MEAN = VARIANCE * DATA.sum().item() / 0.49


def model(y):
    """mu ~ N(0, 1), y_i ~ N(mu, 0.7^2): the posterior is N(MEAN, VARIANCE)."""
    mu = pyro.sample("mu", NORMAL)
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.7), obs=y)


def guide_of(loc=MEAN, scale=VARIANCE**0.5):
    def guide(y):
        pyro.sample("mu", dist.Normal(torch.tensor(loc, dtype=F64), scale))

    return guide


def two_latents(x, y=None):
    mu = pyro.sample("mu", NORMAL)
    side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(mu + x, 1.0), obs=y)
    return side


def amortised(scale=1.0, shift=0.0):
    """The exact posterior, N(sum(y - x) / 5, 1/5), made narrower or moved."""

    def guide(x, y):
        pyro.sample("mu", dist.Normal((y - x).sum(-1) / 5 + shift, scale * 0.2**0.5))
        pyro.sample("side", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))

    return guide
