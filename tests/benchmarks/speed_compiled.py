"""Training steps of a masked autoregressive flow and of an amortised IAF guide, as they are and compiled, beside peers.

    python tests/benchmarks/speed_compiled.py [--rounds 9] [--sizes 8,64,784] [--threads 1] [--markdown]
                                              [--sections flows,guides]

* flows: zero_grad, ``log_prob``, backward, Adam, for the flows of ``speed.py``. Compiled: what ``fit(compile=True)`` runs, and
  ``torch.compile(log_prob)`` with the default options for the peers. What torch cannot compile as a whole runs in parts. The peers stand once as they
  are and once compiled.
* guides: the step of SVI of ``speed_guides.py``. Compiled: what ``fit_guide(compile=True)`` runs.

float32, validation off, medians over interleaved rounds in one process after a warm-up.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from functools import partial
from typing import Any

import speed_guides
import torch
from pyro.infer import Trace_ELBO
from speed import BUILDERS, SIZES, TRAIN, Size, label
from timing import HERE, Call, Measurement, Named, measured, parser, run

from pyro_genexact.inference.compiled import Compiled, RecordedGradients

COMPILED = f"{HERE}, compiled"


def train(module: torch.nn.Module, log_prob: Any, size: Size) -> Call:
    x = torch.randn(size.batch, size.features)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        (-log_prob(x).mean()).backward()
        optimizer.step()

    return step


def flows(options: argparse.Namespace) -> list[Measurement]:
    found = []
    libraries = [name for name in BUILDERS if name == HERE or importlib.util.find_spec(name.lower())]
    for size in (SIZES[int(d)] for d in options.sizes.split(",")):
        case, of_peers, calls = label(size), f"{TRAIN}, all compiled", dict[Named, Call]()
        for name in libraries:
            model = BUILDERS[name](size)
            compiled = (case, TRAIN, COMPILED) if name == HERE else (case, of_peers, name)
            calls[case, TRAIN, name] = train(model.module, model.log_prob, size)
            log_prob = Compiled(model.log_prob) if name == HERE else torch.compile(model.log_prob)
            calls[compiled] = train(model.module, log_prob, size)
        times = measured(calls, options.rounds)
        found += times + [m._replace(operation=of_peers) for m in times if m.way == COMPILED]
        torch._dynamo.reset()
    return found


def guides(options: argparse.Namespace) -> list[Measurement]:
    def recorded(model: Any, guide: Any, parameters: Any) -> Call:
        gradients = RecordedGradients(partial(Trace_ELBO().differentiable_loss, model, guide), parameters)
        optimizer = torch.optim.Adam(parameters, lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            gradients()
            optimizer.step()

        return step

    plain, calls = speed_guides.svi, dict[Named, Call]()
    case, operation = speed_guides.title(speed_guides.IAF), "SVI step, amortised IAF"
    for name in (HERE, "Pyro", "zuko"):
        build = speed_guides.BUILDERS[name]
        calls[case, operation, name] = speed_guides.amortised(build(speed_guides.IAF))
        if name == HERE:
            speed_guides.svi = recorded
            calls[case, operation, COMPILED] = speed_guides.amortised(build(speed_guides.IAF))
            speed_guides.svi = plain
    return measured(calls, options.rounds)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = parser(__doc__, [flows, guides], rounds=9)
    found.add_argument("--sizes", default="8,64,784", help="numbers of features")
    run(found, quick={"sizes": "8"})
