"""The gradient of a model with enumerated latents: all draws in one pass, as by default, and one by one.

    OMP_NUM_THREADS=1 python tests/benchmarks/enumerated.py [--rows 100] [--rounds 10]

The model is a mixture of two normal distributions with unknown weights and means, whose labels are summed out. The guide is
``AutoFlow``. Milliseconds of CPU are medians of the rounds, in which both ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from timing import show

import pyro_genexact as gx
from pyro_genexact.inference.elbo import PARTICLES, default_loss


@config_enumerate
def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    low, high = (pyro.sample(name, dist.Normal(0.0, 3.0)) for name in ("low", "high"))
    with pyro.plate("rows", len(x)):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(torch.where(label == 0, low, high), 1.0), obs=x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    x = torch.randn(options.rows) + 2.0 * torch.arange(options.rows).remainder(2).mul(2).sub(1)
    guide = gx.guides.AutoFlow(mixture)
    guide(x)
    losses = [
        default_loss(partial(mixture, x), partial(guide, x), None),
        TraceEnum_ELBO(num_particles=PARTICLES[0], max_plate_nesting=1),
    ]
    times: list[list[float]] = [[], []]
    for _ in range(options.rounds + 1):  # the first round warms up
        for loss, found in zip(losses, times, strict=True):
            start = time.process_time()
            loss.loss_and_grads(mixture, guide, x)
            found.append(1000 * (time.process_time() - start))
    rows = [
        [
            str(loss.num_particles),
            "one pass" if loss.vectorize_particles else "one by one",
            f"{statistics.median(t[1:]):.1f}",
        ]
        for loss, t in zip(losses, times, strict=True)
    ]
    show(["draws", "way", "ms"], rows, markdown=True)


if __name__ == "__main__":
    main()
