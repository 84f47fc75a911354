"""Guides that are mixtures of flows, on posteriors with two modes in 10 dimensions.

    OMP_NUM_THREADS=1 python tests/benchmarks/modes.py [--targets skewed mirrored] [--recipes iaf] [--mixtures 1 2] [--seeds 5]

Each mode is a correlated normal in 10 dimensions of which one is bent to a parabola and eight have a skewness (sinh-arcsinh). The
modes of ``skewed`` have weights 0.7 and 0.3, different correlations, and are bent and skewed to different sides. Those of
``mirrored`` have weights 0.5 and the densities p(z) and p(-z). The log evidence is 0. Guides have default settings, as does the fit.
The weight is that of the first mode among 20,000 draws of the guide, by the larger of the two densities, and k-hat is that of 2000 draws.
"""

from __future__ import annotations

import argparse
import math
import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_genexact as gx

D = 10


class Modes:
    """A mixture of two modes; ``sides`` are signs of the whole mode, ``bends`` the curvatures, ``skews`` the skewnesses."""

    def __init__(self, weight: float, mirrored: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        roots = [torch.eye(D) + 0.19 * torch.randn(D, D, generator=generator).tril(-1) for _ in range(2)]
        self.weights = (weight, 1 - weight)
        self.roots = [roots[0], roots[0] if mirrored else roots[1]]
        self.bends, self.skews = ((0.5, 0.5), (0.6, 0.6)) if mirrored else ((0.5, -0.3), (0.6, -0.4))
        self.signs = (1.0, -1.0) if mirrored else (1.0, 1.0)

    def log_prob(self, z: Tensor, k: int) -> Tensor:
        center = (-1.0, 1.0)[k] * 8 / D**0.5
        u = (z - center) * self.signs[k]
        bent = u[..., 1:2] - self.bends[k] * (u[..., :1].square() - 1)
        rest = torch.sinh(torch.asinh(u[..., 2:]) - self.skews[k])
        slope = (rest.square().log1p() - u[..., 2:].square().log1p()).sum(-1) / 2
        x = torch.cat([u[..., :1], bent, rest], -1)
        return dist.MultivariateNormal(z.new_zeros(D), scale_tril=self.roots[k].to(z)).log_prob(x) + slope

    def __call__(self) -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (D,)))
        terms = [math.log(w) + self.log_prob(z, k) for k, w in enumerate(self.weights)]
        pyro.factor("density", torch.stack(terms).logsumexp(0))


TARGETS = {"skewed": Modes(0.7, False), "mirrored": Modes(0.5, True)}


def one(target: str, recipe: str, mixture: int, seed: int) -> None:
    model = TARGETS[target]
    pyro.set_rng_seed(seed)
    start = time.process_time()
    guide = gx.guides.AutoFlow(model, getattr(gx.flows, recipe), mixture=mixture)
    result = gx.fit_guide(model, guide, seed=seed, progress=False)
    seconds = time.process_time() - start
    with torch.no_grad():
        z = guide.get_posterior().sample((20_000,))
        weight = (model.log_prob(z, 0) > model.log_prob(z, 1)).double().mean().item()
    weighted = gx.diagnostics.psis(model, guide, num_samples=2000)
    print(
        f"{target:9} {recipe:13} K={mixture} seed {seed}: weight {weight:.3f} of {model.weights[0]}, ELBO {result.final:7.3f}, "
        f"k-hat {weighted.khat:5.2f}, ESS {weighted.ess:5.0f}, {result.steps:5} steps, {seconds:5.1f} s of CPU",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=[*TARGETS])
    parser.add_argument("--recipes", nargs="+", default=["iaf"])
    parser.add_argument("--mixtures", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    for target in options.targets:
        for recipe in options.recipes:
            for mixture in options.mixtures:
                for seed in range(options.seeds):
                    one(target, recipe, mixture, seed)
