"""Amortised posteriors of four simulators with known posteriors: C2ST (0.5 is exact) after a number of simulations.

    python tests/benchmarks/simulators.py --data DIR [--only two_moons,slcp] [--simulations 10000] [--draws 4000] [--ensemble 1]

DIR holds TASK.npz for the tasks of Lueckmann et al., "Benchmarking simulation-based inference", AISTATS 2021: 10 observations and
10,000 draws of the exact posterior of each. Every task uses the default settings of the guide and of ``fit_amortized``. C2ST is as
published: the accuracy in 5-fold cross-validation of a network that separates draws of the guide from those of the posterior.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import conv1d

import pyro_genexact as gx

TARGETS = {"two_moons": 0.56, "gaussian_linear": 0.54, "bernoulli_glm": 0.64, "slcp": 0.82}


def two_moons() -> None:
    theta = pyro.sample("theta", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
    angle = math.pi * (torch.rand(theta.shape[:-1]) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(theta.shape[:-1])
    one, two = theta.unbind(-1)
    x = radius * angle.cos() + 0.25 - (one + two).abs() / 2**0.5
    pyro.deterministic("x", torch.stack([x, radius * angle.sin() + (two - one) / 2**0.5], -1), event_dim=1)


def slcp() -> None:
    theta = pyro.sample("theta", dist.Uniform(-3 * torch.ones(5), 3 * torch.ones(5)).to_event(1))
    s1, s2, rho = theta[..., 2] ** 2, theta[..., 3] ** 2, theta[..., 4].tanh()
    cross = rho * s1 * s2
    cov = torch.stack([s1**2 + 1e-6, cross, cross, s2**2 + 1e-6], -1).unflatten(-1, (2, 2))
    noise = torch.linalg.cholesky(cov).unsqueeze(-3) @ torch.randn(*theta.shape[:-1], 4, 2, 1)
    x = theta[..., None, :2] + noise.squeeze(-1)
    pyro.deterministic("x", x.flatten(-2), event_dim=1)


def gaussian_linear() -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), 0.1**0.5).to_event(1))
    pyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))


def bernoulli_glm(design: Tensor, stimulus: Tensor) -> Callable[[], None]:
    d = torch.eye(9) - torch.diag(torch.ones(8), -1)
    f = d @ d + torch.diag((torch.arange(9.0) / 9).sqrt())
    precision = torch.block_diag(torch.tensor([[0.5]]), f.T @ f)

    def model() -> None:
        theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(10), precision_matrix=precision))
        spikes = torch.bernoulli((theta @ design.T).sigmoid())
        rows = spikes.reshape(-1, 1, spikes.shape[-1])
        lags = conv1d(rows, stimulus.reshape(1, 1, -1), padding=8)[:, 0, -9:].reshape(*spikes.shape[:-1], 9)
        pyro.deterministic("x", torch.cat([spikes.sum(-1, keepdim=True), lags], -1), event_dim=1)

    return model


def model_of(task: str, data: Any) -> Callable[[], None]:
    if task == "bernoulli_glm":
        return bernoulli_glm(torch.tensor(data["design_matrix"]), torch.tensor(data["stimulus_I"]))
    return {"two_moons": two_moons, "slcp": slcp, "gaussian_linear": gaussian_linear}[task]


def evaluate(task: str, data: Any, options: argparse.Namespace) -> None:
    model = model_of(task, data)
    guide = gx.guides.Amortized(model, observed="x")
    start = time.perf_counter()
    # vectorize=True, since the simulators draw numbers outside of sample sites, so that two runs cannot be compared
    result = gx.fit_amortized(
        model, guide, simulations=options.simulations, ensemble=options.ensemble, vectorize=True, seed=options.seed,
        progress=False,
    )  # fmt: skip
    minutes, found = (time.perf_counter() - start) / 60, []
    start = time.perf_counter()
    count = options.observations
    for observation, reference in zip(data["observations"][:count], data["reference"][:count], strict=True):
        torch.manual_seed(0)
        draws = guide.draws({"x": torch.tensor(observation)}, options.draws)["theta"]
        if options.c2st:
            found.append(gx.diagnostics.c2st(torch.tensor(reference[: options.draws]), draws))
    with torch.no_grad():
        nats = [
            float(guide.log_prob({"theta": torch.tensor(r)}, {"x": torch.tensor(o)}).mean())
            for o, r in zip(data["observations"], data["reference"], strict=True)
        ]
    print(
        f"{task}: C2ST {np.mean(found) if found else math.nan:.3f} (target {TARGETS[task]}) of {[round(x, 3) for x in found]}, "
        f"nats of the posterior's draws {np.mean(nats):.3f}, validation {max(result.validation):.3f}, {len(result.train)} epochs, "
        f"best {result.best_epoch}, {minutes:.1f} minutes, scored in {(time.perf_counter() - start) / 60:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(TARGETS))
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--observations", type=int, default=10, help="the first of the ten, while developing")
    parser.add_argument("--ensemble", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-c2st", dest="c2st", action="store_false", help="only the nats, which are faster")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.only.split(","):
        evaluate(task, np.load(options.data / f"{task}.npz"), options)


if __name__ == "__main__":
    main()
