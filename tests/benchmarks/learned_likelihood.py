"""NUTS in a hierarchical model with a learned likelihood and with the exact one: posterior means, sds and times.

    python tests/benchmarks/learned_likelihood.py [--simulations 10000] [--draws 4000] [--groups 8] [--rows 20]

The likelihood of a row is a skew logistic distribution with location and scale of its group and a common asymmetry. It is
learned from simulations of a single row. The hierarchical model has several groups, whose locations and scales have hyperpriors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyro_genexact as gx


def exact(mu: Tensor, sigma: Tensor, asymmetry: Tensor) -> Any:
    return dist.SkewLogistic(mu, sigma, asymmetry)


def simulator() -> None:
    """One row of one group; its output has no density that a program could read."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-0.5, 0.8))
    asymmetry = pyro.sample("asymmetry", dist.LogNormal(0.0, 0.7))
    pyro.deterministic("y", exact(mu, sigma, asymmetry).sample())


def hierarchy(likelihood: Callable[..., Any], groups: int, rows: int, y: Tensor | None = None) -> None:
    centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
    between = pyro.sample("between", dist.LogNormal(0.0, 0.5))
    log_scale = pyro.sample("log_scale", dist.Normal(-0.5, 0.5))
    spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.3))
    asymmetry = pyro.sample("asymmetry", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", groups, dim=-1):
        mu = pyro.sample("mu", dist.Normal(centre, between))
        sigma = pyro.sample("sigma", dist.LogNormal(log_scale, spread))
        with pyro.plate("rows", rows, dim=-2):
            pyro.sample("y", likelihood(mu, sigma, asymmetry), obs=y)


def run(likelihood: Callable[..., Any], y: Tensor, draws: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """Returns draws by latent, and the seconds; Pyro's compilation makes both runs several times faster."""
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    kernel = NUTS(hierarchy, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, draws, warmup_steps=500, disable_progbar=True)
    mcmc.run(likelihood, y.shape[-1], y.shape[-2], y)
    return mcmc.get_samples(), time.perf_counter() - start


def gradient(likelihood: Callable[..., Any], y: Tensor, repeats: int = 50) -> float:
    """Returns the median milliseconds of the log-likelihood and its gradient."""
    times = []
    for _ in range(repeats):
        mu, sigma = (torch.ones(y.shape[-1]).requires_grad_() for _ in range(2))
        start = time.perf_counter()
        likelihood(mu, sigma, torch.tensor(1.2)).log_prob(y).sum().backward()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--rows", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    learned = gx.likelihood(simulator, simulations=options.simulations, vectorize=True, progress=False)
    print(f"learned from {options.simulations} simulations in {time.perf_counter() - start:.0f} s", flush=True)
    pyro.set_rng_seed(1)
    truth = {
        "centre": torch.tensor(1.0),
        "between": torch.tensor(1.0),
        "log_scale": torch.tensor(-0.5),
        "spread": torch.tensor(0.35),
    }
    condition = pyro.condition(hierarchy, {**truth, "asymmetry": torch.tensor(1.6)})
    y = pyro.poutine.trace(condition).get_trace(exact, options.groups, options.rows).nodes["y"]["value"]
    print(f"ms per gradient: exact {gradient(exact, y):.2f}, learned {gradient(learned, y):.2f}", flush=True)
    runs = {
        name: run(*given, y, options.draws, 2) for name, given in {"exact": (exact,), "learned": (learned,)}.items()
    }
    print("seconds of NUTS: " + ", ".join(f"{name} {seconds:.0f}" for name, (_, seconds) in runs.items()))
    reference, found = (runs[name][0] for name in ("exact", "learned"))
    worst = [0.0, 0.0]
    for name, value in reference.items():
        sd = value.std(0)
        shift, ratio = (found[name].mean(0) - value.mean(0)) / sd, found[name].std(0) / sd
        worst = [max(worst[0], shift.abs().max().item()), max(worst[1], (ratio - 1).abs().max().item())]
        print(f"{name:<10} shifts {[round(x, 3) for x in shift.reshape(-1).tolist()]}")
        print(f"{'':<10} sd ratios {[round(x, 3) for x in ratio.reshape(-1).tolist()]}")
    print(
        f"largest shift of a mean {worst[0]:.3f} reference sds (target 0.1), largest change of an sd {worst[1]:.3f} (0.1)"
    )


if __name__ == "__main__":
    main()
