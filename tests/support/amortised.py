"""Models with posteriors in closed form, and quickly fitted amortised guides, for the tests of these."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

import pyro_genexact as gx

Y = torch.tensor([1.0, -0.5])
FAST = {"ensemble": 1, "lr": 3e-3, "progress": False}
SMALL = {"recipe": gx.flows.maf, "hidden": (16,), "transforms": 1}  # exact for Gaussian posteriors


def normal(y=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu, 0.5).to_event(1), obs=y)


EXACT = dist.Normal(Y / 1.25, (0.25 / 1.25) ** 0.5).to_event(1)  # the posterior of ``normal`` given Y


def groups(n=4, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", n if y is None else len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def items(n=10, y=None):
    """N exchangeable numbers."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("items", n if y is None else len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def rows(y, total=None):
    """A linear Gaussian model of each row, whose plate may be a subsample of ``total`` rows."""
    with pyro.plate("data", total or len(y), subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


def fitted(model, *args, observed="y", encoder=None, simulations=2000, epochs=5, ensemble=1, **options):
    guide = gx.guides.Amortized(model, observed, encoder, **{**SMALL, **options})
    gx.fit_amortized(model, guide, *args, simulations=simulations, epochs=epochs, **{**FAST, "ensemble": ensemble})
    return guide


@torch.no_grad()
def kl(guide, data, exact, draws=2000):
    """An estimate of KL(q || exact), for a function of draws that returns their exact log density."""
    z = guide.draws(data, draws)
    return (guide.log_prob(z, data) - exact(z)).mean().item()
