"""Seconds of simulation-based calibration with 1000 simulations: many posteriors at once, and one at a time.

    OMP_NUM_THREADS=1 python tests/benchmarks/sbc.py [--simulations 1000] [--few 50] [--rounds 5]

The posterior is an ``Amortized`` guide of three latents. ``batched`` passes the guide itself. ``Pyro guide`` calls the same guide as
a Pyro guide for each simulation, and ``draws`` calls its method ``draws`` for each; both are measured with a few simulations, and
scaled. Ways take turns in each round, and the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import pyro_genexact as gx


def model(y: Any = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(mu, sd.unsqueeze(-1)).to_event(1), obs=y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--few", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    guide = gx.guides.Amortized(model)
    gx.fit_amortized(model, guide, simulations=2000, epochs=2, progress=False)
    ways: dict[str, tuple[Any, int]] = {
        "batched": (guide, options.simulations),
        "Pyro guide": (lambda y: guide(y=y), options.few),
        "draws": (lambda y, num_samples: guide.draws({"y": y}, num_samples), options.few),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(options.rounds + 1):
        for name, (posterior, size) in ways.items():
            start = time.perf_counter()
            gx.diagnostics.sbc_ranks(model, posterior, observed="y", num_simulations=size)
            if i:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) * options.simulations / size)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in found.items():
        print(f"{name}: {median:.2f} s, {median / found['batched']:.1f} times that of batched")


if __name__ == "__main__":
    main()
