"""Amortised posteriors of four simulators with known posteriors: C2ST (0.5 is exact) after a number of simulations.

    python tests/benchmarks/simulators.py --data DIR [--only two_moons,slcp] [--simulations 10000] [--draws 4000] [--sbi]

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
from pyro_genexact.simulation.simulations import simulate

TASKS = ("two_moons", "gaussian_linear", "bernoulli_glm", "slcp")
TARGETS = {
    **{(task, 10_000): value for task, value in zip(TASKS, (0.56, 0.54, 0.64, 0.82), strict=True)},
    ("two_moons", 100_000): 0.52,
    ("bernoulli_glm", 100_000): 0.56,
}


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


def conditional(
    task: str, model: Callable[[], None], simulations: dict[str, Tensor], options: argparse.Namespace
) -> Any:
    """Trains the guide. Returns a function from an observation and S to draws (S, P), the guide, and a description."""
    guide = gx.guides.Amortized(model, observed="x")
    result = gx.fit_amortized(
        model, guide, simulations=simulations, ensemble=options.ensemble, seed=options.seed, progress=False
    )
    text = f"validation {max(result.validation):.3f}, {len(result.train)} epochs, best {result.best_epoch}"
    return lambda x, num: guide.draws({"x": x}, num)["theta"], lambda t, x: guide.log_prob({"theta": t}, {"x": x}), text


def peer(task: str, model: Callable[[], None], simulations: dict[str, Tensor], options: argparse.Namespace) -> Any:
    """The same with the NPE of ``sbi``, with its defaults and a neural spline flow."""
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    prior = pyro.poutine.trace(model).get_trace().nodes["theta"]["fn"]
    if task in ("two_moons", "slcp"):
        prior = BoxUniform(prior.base_dist.low, prior.base_dist.high)
    torch.manual_seed(options.seed)
    npe = NPE(prior=prior, density_estimator="nsf", show_progress_bars=False)
    npe.append_simulations(simulations["theta"], simulations["x"]).train()
    posterior = npe.build_posterior()
    return (
        lambda x, num: posterior.sample((num,), x=x, show_progress_bars=False),
        lambda t, x: posterior.log_prob(t, x=x, norm_posterior=False),
        f"{npe.summary['epochs_trained'][-1]} epochs",
    )


WAYS = {"here": conditional, "sbi": peer}


def evaluate(task: str, data: Any, options: argparse.Namespace) -> None:
    model = model_of(task, data)
    # vectorised, since the simulators draw numbers outside of sample sites, so that two runs cannot be compared
    simulations = simulate(
        model, ["theta", "x"], options.simulations, seed=options.seed, vectorize=True, num_workers=0, progress=False
    )
    for way in ("here", "sbi") if options.sbi else ("here",):
        start, cpu = time.perf_counter(), time.process_time()
        draw, log_prob, text = WAYS[way](task, model, simulations, options)
        minutes, cpu = (time.perf_counter() - start) / 60, (time.process_time() - cpu) / 60
        found, nats = [], []
        start = time.perf_counter()
        observations = torch.tensor(data["observations"][: options.observations])
        for x, reference in zip(observations, data["reference"], strict=False):
            torch.manual_seed(0)
            if options.c2st:
                found.append(gx.diagnostics.c2st(torch.tensor(reference[: options.draws]), draw(x, options.draws)))
            with torch.no_grad():
                nats.append(log_prob(torch.tensor(reference), x).mean().item())
        mean, target = np.mean(found) if found else math.nan, TARGETS.get((task, options.simulations), math.nan)
        print(
            f"{task} {way}: C2ST {mean:.3f} (target {target}) of {[round(x, 3) for x in found]}, nats of the posterior's draws "
            f"{np.mean(nats):.3f}, {text}, {minutes:.1f} minutes ({cpu:.1f} of CPU), scored in {(time.perf_counter() - start) / 60:.1f}",
            flush=True,
        )
        if way == "here" and task == "two_moons":
            print(support_of(draw, log_prob, observations), flush=True)


@torch.no_grad()
def support_of(draw: Any, log_prob: Any, observations: Tensor) -> str:
    """Describes the mass of the guide's density on the prior's support, and a million draws."""
    per = 1_000_000 // len(observations)
    outside = sum(int((draw(x, per).abs() > 1).any(-1).sum()) for x in observations)
    far = abs(mass(lambda t: log_prob(t, observations[0])) - 1)
    return (
        f"two_moons: {outside} of {per * len(observations)} draws outside of the support, |mass - 1| is {far:.1e} for the "
        "first observation"
    )


def mass(log_prob: Callable[[Tensor], Tensor], cells: int = 256, nodes: int = 8) -> float:
    """The integral of a density over [-1, 1]^2, by Gauss-Legendre quadrature in cells^2 squares."""
    node, weight = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(nodes))
    edges = (2 * torch.arange(cells, dtype=torch.float64) + 1) / cells - 1
    points = (edges[:, None] + node / cells).flatten()
    weights = (weight / cells).repeat(cells)
    rows = [
        (log_prob(torch.stack([one.expand_as(points), points], -1).float()).double().exp() * weights).sum() * w
        for one, w in zip(points, weights, strict=True)
    ]
    return float(sum(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(TASKS))
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--observations", type=int, default=10, help="the first of the ten, while developing")
    parser.add_argument("--ensemble", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sbi", action="store_true", help="also the NPE of sbi, on the same simulations")
    parser.add_argument("--no-c2st", dest="c2st", action="store_false", help="only the nats, which are faster")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.only.split(","):
        evaluate(task, np.load(options.data / f"{task}.npz"), options)


if __name__ == "__main__":
    main()
