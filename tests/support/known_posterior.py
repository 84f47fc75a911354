"""A model whose posterior is known, and normal guides of it."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch

D = {"dtype": torch.float64}


def conjugate():
    """The posterior is Normal(0.8, 0.2**0.5)."""
    z = pyro.sample("z", dist.Normal(torch.zeros((), **D), 1.0))
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0, **D))


EVIDENCE = dist.Normal(torch.zeros((), **D), 1.25**0.5).log_prob(torch.tensor(1.0, **D)).item()


def normal(loc, scale):
    """Returns a guide with parameters, and these."""
    given = [torch.tensor(x, **D, requires_grad=True) for x in (loc, scale)]

    def guide():
        pyro.sample("z", dist.Normal(*given))

    return guide, given


def exact_elbo(loc, scale):
    """The ELBO of a normal guide in closed form."""

    def expected(mean, sd):
        return -0.5 * ((loc - mean) ** 2 + scale**2) / sd**2 - math.log(sd) - 0.5 * math.log(2 * math.pi)

    return expected(0.0, 1.0) + expected(1.0, 0.5) + scale.log() + 0.5 + 0.5 * math.log(2 * math.pi)
