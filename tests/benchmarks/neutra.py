"""NUTS on Neal's funnel, plain and through a fitted flow (``NeuTraReparam``): effective draws a second.

    python tests/benchmarks/neutra.py [--chains 4] [--draws 250] [--warmup 200] [--steps N] [--recipes iaf] [--markdown]

The funnel: v ~ Normal(0, 3) and x_1 ... x_9 ~ Normal(0, exp(v / 2)). The guide is ``AutoFlow`` with its defaults, fitted by
``fit_guide`` until the ELBO is flat or for ``--steps``. Chains have different seeds and run one after another, plain and through the
flow in turn. Least is the smallest bulk effective sample size of v and x_1 ... x_9 over all chains; a second is one of warm-up and
draws, of draws alone, and of the guide's fit, warm-up and draws. Errors of the mean and standard deviation of v are against 0 and 3.

Reference: Hoffman et al., "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport", 2019.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam
from timing import show
from torch import Tensor

import pyro_genexact as gx


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("sites", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


class Chain(NamedTuple):
    values: Tensor  # (draws, 10): v and x
    warmup: float  # seconds
    sampling: float
    divergences: int


class Sampler(NamedTuple):
    model: Callable[[], Any]
    values: Callable[[dict[str, Tensor]], Tensor]  # from what NUTS draws
    fit: float  # seconds


def plain() -> Sampler:
    return Sampler(funnel, lambda drawn: torch.cat([drawn["v"][:, None], drawn["x"]], 1), 0.0)


def transported(recipe: str, steps: int | None) -> Sampler:
    guide = gx.guides.AutoFlow(funnel, getattr(gx.flows, recipe))
    result = gx.fit_guide(funnel, guide, steps=steps, progress=False)
    print(
        f"{recipe}: ELBO {result.final:.3f} of at most 0, {result.steps} steps, {result.seconds:.1f} s", file=sys.stderr
    )
    neutra = NeuTraReparam(guide.requires_grad_(False))

    def values(drawn: dict[str, Tensor]) -> Tensor:
        (latent,) = drawn.values()
        with torch.no_grad():
            sites = neutra.transform_sample(latent[:, None])
        return torch.cat([sites["v"].reshape(-1, 1), sites["x"]], 1)

    return Sampler(poutine.reparam(funnel, config=lambda _: neutra), values, result.seconds)


def run(sampler: Sampler, seed: int, options: argparse.Namespace) -> Chain:
    starts: dict[str, float] = {}

    def note(kernel: Any, samples: Any, stage: str, i: int) -> None:
        starts.setdefault("sampling" if stage == "Sample" else "warmup", time.perf_counter())

    pyro.set_rng_seed(seed)
    mcmc = MCMC(NUTS(sampler.model), options.draws, warmup_steps=options.warmup, disable_progbar=True, hook_fn=note)
    begin = time.perf_counter()
    mcmc.run()
    end, middle = time.perf_counter(), starts["sampling"]
    divergences = sum(map(len, mcmc.diagnostics()["divergences"].values()))
    return Chain(sampler.values(mcmc.get_samples()), middle - begin, end - middle, divergences)


def least_ess(values: np.ndarray) -> float:
    """The smallest bulk effective sample size of values (chains, draws, coordinates)."""
    return min(float(az.ess(values[..., i], method="bulk")) for i in range(values.shape[-1]))


def errors(v: np.ndarray, truth: float, method: str) -> str:
    """The error of the mean or sd of v (chains, draws), with what Monte Carlo makes it by its effective sample size."""
    found = v.mean() if method == "mean" else v.std()
    return f"{found - truth:.3f} ± {float(az.mcse(v, method=method)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=250)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--steps", type=int, help="of the fit; by default until the ELBO is flat")
    parser.add_argument("--recipes", default="iaf")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samplers = {"plain": plain(), **{name: transported(name, options.steps) for name in options.recipes.split(",")}}
    chains: dict[str, list[Chain]] = {name: [] for name in samplers}
    for seed in range(options.chains):
        for name, sampler in samplers.items():
            chains[name].append(run(sampler, seed, options))
            last = chains[name][-1]
            print(f"chain {seed}, {name}: {last.warmup:.1f} + {last.sampling:.1f} s", file=sys.stderr, flush=True)
    rows, rates = [], {}
    for name, found in chains.items():
        values = torch.stack([chain.values for chain in found]).numpy()
        warmup, sampling = sum(chain.warmup for chain in found), sum(chain.sampling for chain in found)
        ess, v = least_ess(values), values[..., 0]
        rates[name] = [ess / t for t in (warmup + sampling, sampling, samplers[name].fit + warmup + sampling)]
        ratios = [f"{rate:.3g} ({rate / base:.2f})" for rate, base in zip(rates[name], rates["plain"], strict=True)]
        seconds = [f"{t:.1f}" for t in (samplers[name].fit, warmup, sampling)]
        divergences = str(sum(chain.divergences for chain in found))
        rows.append([name, *seconds, f"{ess:.0f}", *ratios, errors(v, 0, "mean"), errors(v, 3, "sd"), divergences])
    times = ["fit, s", "warm-up, s", "draws, s"]
    rate_names = ["a second of warm-up and draws (ratio)", "of draws", "with the fit"]
    names = ["error of mean of v", "of sd", "divergences"]
    title = f"{options.chains} chains of {options.draws} draws"
    show([title, *times, "least bulk ESS", *rate_names, *names], rows, options.markdown)


if __name__ == "__main__":
    main()
