"""Exact draws after the fit of a guide: the methods of ``sample_posterior`` and plain NUTS, by effective draws a second.

    OMP_NUM_THREADS=1 python tests/benchmarks/sample_posterior.py [--steps N] [--draws 1000] [--nuts-draws 250] [--rounds 3] [--markdown]

Posteriors: the eight schools, non-centred, and Neal's funnel (v ~ Normal(0, 3) and x_1 ... x_9 ~ Normal(0, exp(v / 2))). The guide is
``AutoFlow`` with its defaults, fitted until the ELBO is flat or for ``--steps``. Plain NUTS is Pyro's, compiled, without a guide. Rounds
have different seeds, and all ways run in each round. Least is the smallest bulk effective sample size of the latents, the median of the
rounds; a second is one of CPU on one thread, without and with the fit. The last columns are the errors of the mean and the sd of one
latent (mu of the schools, v of the funnel), in exact standard deviations, as root mean squares over rounds. The exact ones of mu are
those of a grid over mu and tau.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from neutra import funnel
from posteriors.models import eight_schools
from pyro.infer import MCMC, NUTS
from timing import show

import pyro_genexact as gx

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def moments_of_mu() -> tuple[float, float]:
    """The exact posterior mean and sd of mu, by a grid over mu and log tau."""
    mu, log_tau = torch.meshgrid(
        torch.linspace(-30, 40, 701).double(), torch.linspace(-12, 6, 721).double(), indexing="ij"
    )
    tau = log_tau.exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    log_p = log_p + dist.Normal(mu[..., None], (tau[..., None] ** 2 + SIGMA**2).sqrt()).log_prob(Y).sum(-1)
    p = log_p.flatten().softmax(0).reshape(mu.shape)
    mean = (p * mu).sum()
    return mean.item(), (p * (mu - mean) ** 2).sum().sqrt().item()


class Posterior(NamedTuple):
    model: Callable[..., Any]
    args: tuple[Any, ...]
    latent: str
    moments: Callable[[], tuple[float, float]]


POSTERIORS = {
    "eight schools": Posterior(eight_schools, (Y, SIGMA), "mu", moments_of_mu),
    "funnel": Posterior(funnel, (), "v", lambda: (0.0, 3.0)),
}


class Result(NamedTuple):
    ess: float
    seconds: float
    mean: float  # error in exact sds
    sd: float


def scored(data: Any, posterior: Posterior, seconds: float) -> Result:
    mean, sd = posterior.moments()
    values = np.asarray(data[posterior.latent])
    ess = az.ess(data, method="bulk")
    least = min(float(np.asarray(ess[name]).min()) for name in ess.data_vars)
    return Result(least, seconds, (values.mean() - mean) / sd, values.std() / sd - 1)


def plain(posterior: Posterior, chains: int, draws: int, warmup: int, seed: int) -> Any:
    pyro.set_rng_seed(seed)
    found = []
    for _ in range(chains):
        kernel = NUTS(posterior.model, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, draws, warmup_steps=warmup, disable_progbar=True)
        mcmc.run(*posterior.args)
        found.append(mcmc.get_samples())
    stacked = {name: np.stack([one[name].numpy() for one in found]) for name in found[0]}
    return az.convert_to_dataset(stacked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of the fit; by default until the ELBO is flat")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=1000, help="per chain of the methods without gradients")
    parser.add_argument("--nuts-draws", type=int, default=250)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--proposals", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[*POSTERIORS], help="one posterior")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = []
    for title in [options.only] if options.only else POSTERIORS:
        posterior = POSTERIORS[title]
        torch.manual_seed(0)
        guide = gx.guides.AutoFlow(posterior.model)
        begin = time.process_time()
        fit = gx.fit_guide(posterior.model, guide, *posterior.args, steps=options.steps, progress=False)
        spent = time.process_time() - begin
        khat = gx.diagnostics.psis(posterior.model, guide, *posterior.args, num_samples=10_000).khat
        print(f"{title}: ELBO {fit.final:.3f}, {fit.steps} steps, {spent:.1f} s, k-hat {khat:.2f}", file=sys.stderr)

        def drawn(method: str, seed: int, posterior: Posterior = posterior, guide: Any = guide) -> Any:
            if method == "plain NUTS":
                return plain(posterior, options.chains, options.nuts_draws, options.warmup, seed)
            size = {"draws": options.nuts_draws if method == "nuts" else options.draws, "chains": options.chains}
            kind = {"method": method, "proposals": options.proposals, "warmup": options.warmup, "progress": False}
            data = gx.sample_posterior(posterior.model, guide, *posterior.args, seed=seed, **size, **kind)
            return data["posterior"]

        found: dict[str, list[Result]] = {name: [] for name in ("metropolis", "importance", "nuts", "plain NUTS")}
        for seed in range(options.rounds):
            for name, results in found.items():
                begin = time.process_time()
                data = drawn(name, seed)
                results.append(scored(data, posterior, time.process_time() - begin))
                print(f"{title}, round {seed}, {name}: {results[-1]}", file=sys.stderr, flush=True)
        for name, results in found.items():
            ess, seconds = (statistics.median(getattr(r, key) for r in results) for key in ("ess", "seconds"))
            whole = seconds + spent * (name != "plain NUTS")
            errors = [f"{statistics.fmean(getattr(r, key) ** 2 for r in results) ** 0.5:.3f}" for key in ("mean", "sd")]
            table.append(
                [
                    f"{title}, {name}",
                    f"{seconds:.1f}",
                    f"{ess:.0f}",
                    f"{ess / seconds:.3g}",
                    f"{ess / whole:.3g}",
                    *errors,
                ]
            )
    names = ["draws, s", "least bulk ESS", "ESS a second", "with the fit", "error of mean", "error of sd"]
    show([f"{options.chains} chains", *names], table, options.markdown)


if __name__ == "__main__":
    main()
