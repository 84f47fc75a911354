"""Models with much data: what the number of draws per step costs, and the ELBO that a guide reaches in the same time.

    OMP_NUM_THREADS=1 python tests/benchmarks/much_data.py [--models logistic] [--draws 4 64] [--seconds 15] [--lr 0.01]

``logistic`` is a logistic regression of 100,000 rows on 20 coefficients. ``groups`` has 100,000 counts in 998 groups of a Poisson
regression with a mean and a scale, 1000 latents; its guide has ``blocks="groups"``. ``--rows`` changes the number of rows. The guide
is otherwise ``AutoFlow`` with its defaults, and each of its numbers of draws starts from the same guide, whose first call is the warm
start. "here" has the default number of draws of ``fit_guide``. Section ``step`` has the time of one gradient and the peak of its tensors. Section ``fit`` prints the ELBO
(nats) after as many steps as fit into ``--seconds`` of CPU. If the fit has not improved the first weights,
:func:`~pyro_genexact.fit_guide` keeps these, and the table says so.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from timing import HERE, Call, Measurement, measured, measurement, parser, peak_megabytes, run, seconds, show
from torch import Tensor

import pyro_genexact as gx
from pyro_genexact.inference.elbo import default_loss

COEFFICIENTS, GROUPS = 20, 998


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=w @ x.T), obs=y)


def groups(group: Tensor, y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", GROUPS):
        level = pyro.sample("level", dist.Normal(mean, scale))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(level[..., group].exp()), obs=y)


def logistic_rows(size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, COEFFICIENTS)
    return x, torch.bernoulli((x @ torch.randn(COEFFICIENTS)).sigmoid())


def groups_rows(size: int) -> tuple[Tensor, Tensor]:
    group = torch.arange(size) % GROUPS
    return group, torch.poisson((0.5 + 0.7 * torch.randn(GROUPS))[group].exp())


MODELS: dict[str, tuple[Callable[..., None], Callable[[int], tuple[Tensor, Tensor]], dict[str, Any]]] = {
    "logistic": (logistic, logistic_rows, {}),
    "groups": (groups, groups_rows, {"blocks": "groups"}),
}


@cache
def started(name: str, size: int) -> tuple[Any, tuple[Tensor, Tensor], int]:
    """The guide after its warm start, the data, and the default number of draws."""
    model, rows, options = MODELS[name]
    pyro.set_rng_seed(0)
    data = rows(size)
    guide = gx.guides.AutoFlow(model, **options)
    guide(*data)
    return guide, data, default_loss(partial(model, *data), partial(guide, *data), None).num_particles


def steps_of(name: str, options: argparse.Namespace) -> dict[str, tuple[int, Call]]:
    """The number of draws and the gradient of each way."""
    model, (guide, data, default) = MODELS[name][0], started(name, options.rows)
    ways = {HERE: default} | {f"{HERE}, {n} draws": n for n in options.draws if n != default}
    found = {}
    for way, draws in ways.items():
        loss = default_loss(partial(model, *data), partial(guide, *data), draws)
        found[way] = draws, partial(loss.loss_and_grads, model, guide, *data)
    return found


def cases(options: argparse.Namespace) -> dict[str, str]:
    return {
        name: f"{name}, {options.rows} rows, {started(name, options.rows)[2]} draws by default"
        for name in options.models
    }


def step(options: argparse.Namespace) -> list[Measurement]:
    calls, memory = {}, []
    for name, case in cases(options).items():
        for way, (_, call) in steps_of(name, options).items():
            calls[case, "gradient", way] = call
            memory.append(measurement((case, "gradient", way), "MB", [peak_megabytes(call)]))
    return [*measured(calls, options.rounds), *memory]


def fit(options: argparse.Namespace) -> list[Measurement]:
    rows = []
    for name, case in cases(options).items():
        guide, data, _ = started(name, options.rows)
        for way, (draws, call) in steps_of(name, options).items():
            one = statistics.median(seconds(call, clock=time.process_time) for _ in range(4))
            for limit in options.seconds:
                steps, own = max(1, int(limit / one)), copy.deepcopy(guide)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    result = gx.fit_guide(
                        MODELS[name][0], own, *data, steps=steps, num_particles=draws, lr=options.lr, progress=False
                    )
                worse = any("initial weights are kept" in str(w.message) for w in caught)
                rows.append([case, way, f"{limit:g} s, {steps} steps", f"{result.final:.2f}", "no" if worse else "yes"])
                print(rows[-1], file=sys.stderr, flush=True)
    show(["case", "draws", "time", "ELBO", "improved"], rows, options.markdown)
    return []


if __name__ == "__main__":
    found = parser(__doc__, [step, fit])
    found.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    found.add_argument("--rows", type=int, default=100_000)
    found.add_argument("--draws", type=int, nargs="+", default=[4, 64, 256])
    found.add_argument("--seconds", type=float, nargs="+", default=[5, 15])
    found.add_argument("--lr", type=float, default=0.01)
    run(found, quick={"rows": 5000, "draws": [4], "seconds": [0.5]})
