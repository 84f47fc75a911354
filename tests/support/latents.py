"""Models with latents of many supports, for the tests of guides."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

import pyro_genexact as gx

DOUBLE = {"dtype": torch.float64}
TRIL = torch.tensor([[1.0, 0, 0], [0.5, 0.8, 0], [-0.5, 0.3, 0.6]], **DOUBLE)
MEAN = torch.tensor([1.0, -2, 3], **DOUBLE)


def gaussian():
    pyro.sample("z", dist.MultivariateNormal(MEAN, scale_tril=TRIL))


def plated():
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0, **DOUBLE), 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("z", dist.Normal(torch.zeros((), **DOUBLE), scale))


def numbers(*shape):
    return torch.zeros(shape, **DOUBLE)


def gaussian_of(guide):
    """loc (D,) and L (D, D) of the guide's last transform."""
    affine = guide.flow.transforms[-1]()
    zero = torch.zeros_like(guide.flow.transforms[-1].loc)
    return affine(zero).detach(), torch.func.jacrev(affine)(zero).detach()


def still(D):
    """A flow whose transform has no parameters."""
    return gx.Flow([gx.transforms.Reverse()], dist.Normal(numbers(D), 1.0).to_event(1))
