"""The posterior of ``slcp`` by a learned likelihood of one of its four draws, with the amortised guide as the proposal: C2ST.

    python tests/benchmarks/simulators_likelihood.py --data DIR [--simulations 10000] [--draws 4000] [--observations 10]

Both are learned from the same simulations with default settings; ``simulators.py`` describes DIR and C2ST. The draws are resampled from
importance-weighted draws of the guide. ``--guide`` also scores draws of the guide itself.
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
from pyro_genexact.simulation.simulations import simulate

TARGET = 0.78
CHUNK = 20_000  # draws that are evaluated at once


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
    end = time.perf_counter()
    scores: list[list[float]] = []
    print(f"likelihood in {(middle - start) / 60:.1f} minutes, guide in {(end - middle) / 60:.1f}", flush=True)
    for x, reference in zip(torch.tensor(data["observations"]), data["reference"], strict=True):
        torch.manual_seed(0)
        weighted = importance(learned, guide, x, options.proposals)
        samples = [weighted.resample(options.draws)["theta"]]
        samples += [guide.draws({"x": x}, options.draws)["theta"]] if options.guide else []
        scores.append([c2st(reference[: options.draws], sample.numpy()) for sample in samples])
        print(f"{weighted}: C2ST {[round(score, 3) for score in scores[-1]]}", flush=True)
        if len(scores) == options.observations:
            break
    print(f"slcp: mean C2ST {[round(score, 3) for score in np.mean(scores, 0)]} (target {TARGET})")


def importance(learned: gx.Likelihood, guide: Any, x: Tensor, proposals: int) -> gx.diagnostics.Importance:
    """Returns weighted draws of the guide, made in chunks that limit the memory."""
    proposal = partial(_ignoring, guide, {"x": x})
    parts = [
        gx.diagnostics.psis(posterior, proposal, learned, x.reshape(4, 2), num_samples=min(CHUNK, proposals))
        for _ in range(max(1, proposals // CHUNK))
    ]
    theta = torch.cat([part.draws["theta"] for part in parts])
    return gx.diagnostics.Importance(torch.cat([part.log_ratios for part in parts]), {"theta": theta})


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
    parser.add_argument("--guide", action="store_true", help="also score draws of the guide")
    options = parser.parse_args()
    torch.set_num_threads(1)
    evaluate(np.load(options.data / "slcp.npz"), options)


if __name__ == "__main__":
    main()
