"""The posterior of ``slcp`` by a learned likelihood of one of its four draws, with the amortised guide as the proposal: C2ST.

    python tests/benchmarks/simulators_likelihood.py --data DIR [--simulations 10000] [--draws 4000] [--observations 10]

Both are learned from the same simulations with default settings; ``simulators.py`` describes DIR and C2ST. The draws are resampled from
importance-weighted draws of the guide. Fresh draws of the posterior of the guide alone are scored too.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from simulators import c2st, slcp
from torch import Tensor

import pyro_genexact as gx
from pyro_genexact.inference.simulations import simulate

TARGET = 0.78


def prior() -> Tensor:
    theta: Tensor = pyro.sample("theta", dist.Uniform(-3 * torch.ones(5), 3 * torch.ones(5)).to_event(1))
    return theta


def items(x: Tensor | None = None) -> None:
    """Four draws given theta; their values come from ``slcp``."""
    theta = prior()
    with pyro.plate("items", 4):
        pyro.sample("x", dist.Normal(theta[..., :2], 1.0).to_event(1), obs=x)  # only the shapes are read


def posterior(learned: gx.Likelihood, x: Tensor) -> None:
    theta = prior()
    with pyro.plate("items", 4):
        pyro.sample("x", learned(theta), obs=x)


def evaluate(data: Any, options: argparse.Namespace) -> None:
    found = simulate(slcp, ["theta", "x"], options.simulations, seed=options.seed, vectorize=True)
    split = {"theta": found["theta"], "x": found["x"].unflatten(-1, (4, 2))}
    start = time.perf_counter()
    learned = gx.likelihood(items, observed="x", simulations=split, seed=options.seed, progress=False)
    middle = time.perf_counter()
    guide = gx.guides.Amortized(slcp, observed="x")
    gx.fit_amortized(slcp, guide, simulations=found, seed=options.seed, progress=False)
    end, scores = time.perf_counter(), []
    print(f"likelihood in {(middle - start) / 60:.1f} minutes, guide in {(end - middle) / 60:.1f}", flush=True)
    for x, reference in zip(torch.tensor(data["observations"]), data["reference"], strict=True):
        torch.manual_seed(0)
        proposal = partial(_ignoring, guide, {"x": x})
        found = gx.diagnostics.psis(posterior, proposal, learned, x.reshape(4, 2), num_samples=options.proposals)
        draws = found.resample(options.draws)["theta"].numpy()
        alone = guide.draws({"x": x}, options.draws)["theta"].numpy()
        scores.append([c2st(reference[: options.draws], d) for d in (draws, alone)] if options.c2st else [0.5, 0.5])
        print(f"{found}: C2ST {scores[-1][0]:.3f}, of the guide alone {scores[-1][1]:.3f}", flush=True)
        if len(scores) == options.observations:
            break
    one, other = np.mean(scores, 0)
    print(f"slcp: C2ST {one:.3f} (target {TARGET}), of the guide alone {other:.3f}")


def _ignoring(guide: Any, observations: dict[str, Tensor], *args: Any) -> None:
    guide(observations=observations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--proposals", type=int, default=200_000)
    parser.add_argument("--observations", type=int, default=10, help="the first of the ten, while developing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-c2st", dest="c2st", action="store_false")
    options = parser.parse_args()
    torch.set_num_threads(1)
    evaluate(np.load(options.data / "slcp.npz"), options)


if __name__ == "__main__":
    main()
