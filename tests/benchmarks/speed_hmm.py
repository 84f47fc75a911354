"""Speed of hidden Markov models, beside Pyro's DiscreteHMM with the same log_prob, in one process.

    python tests/benchmarks/speed_hmm.py [--rounds 7] [--markdown] [--validate] [--sizes 32x64x8,32x256x23,8x1024x50]
                                         [--sections log_prob,queries]

Rows, sites and states B x N x V; normal observations; gradients in the logits and in the observations' means. What Pyro's does
not have (posterior draws, filtering of all sites, Viterbi) is the second table.

Medians over interleaved rounds after a warm-up.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro.distributions as dist
import torch
from timing import HERE, Call, Measurement, Named, measured, parser, run
from torch import Tensor

import pyro_genexact as gx


def problem(rows: int, sites: int, states: int) -> tuple[list[Tensor], Tensor]:
    """Logits of the first state (V) and of steps (V, V), means (V), and observations (B, N)."""
    torch.manual_seed(0)
    parameters = [torch.randn(states), torch.randn(states, states), 2 * torch.randn(states)]
    return [p.requires_grad_() for p in parameters], torch.randn(rows, sites)


def ours(parameters: list[Tensor], sites: int) -> gx.HiddenMarkov:
    initial, transition, loc = parameters
    return gx.HiddenMarkov(initial, transition, dist.Normal(loc, 1.0), duration=sites)


def pyros(parameters: list[Tensor], sites: int) -> dist.DiscreteHMM:
    """Pyro's steps once before the first observation: here from any state to one of ``initial``."""
    initial, transition, loc = parameters
    states = len(initial)
    steps = torch.cat([initial.expand(1, states, states), transition.expand(sites - 1, states, states)])
    return dist.DiscreteHMM(torch.zeros(states), steps, dist.Normal(loc, 1.0))


def log_prob(options: argparse.Namespace) -> list[Measurement]:
    calls: dict[Named, Call] = {}
    for size in options.sizes.split(","):
        parameters, x = problem(*map(int, size.split("x")))
        a, b = (make(parameters, x.shape[-1]).log_prob(x) for make in WAYS.values())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        for way, make in WAYS.items():

            def score(make: Any = make, parameters: list[Tensor] = parameters, x: Tensor = x) -> Tensor:
                return make(parameters, x.shape[-1]).log_prob(x)

            calls[named(size), "log_prob", way] = torch.no_grad()(score)
            calls[named(size), "log_prob + backward", way] = lambda score=score: score().sum().backward()
    return measured(calls, options.rounds)


def queries(options: argparse.Namespace) -> list[Measurement]:
    calls: dict[Named, Call] = {}
    for size in options.sizes.split(","):
        parameters, x = problem(*map(int, size.split("x")))
        d = ours([p.detach() for p in parameters], x.shape[-1])
        work = {
            "filter": lambda d=d, x=x: d.filter(x),
            "smooth": lambda d=d, x=x: d.posterior(x).marginals,
            "Viterbi": lambda d=d, x=x: d.posterior(x).mode,
            "10 posterior draws": lambda d=d, x=x: d.posterior(x).sample((10,)),
            "sample 8": lambda d=d: d.sample((8,)),
        }
        calls |= {(named(size), name, HERE): call for name, call in work.items()}
    return measured(calls, options.rounds)


def named(size: str) -> str:
    return f"({size.replace('x', ', ')})"


WAYS = {HERE: ours, "Pyro": pyros}


if __name__ == "__main__":
    found = parser(__doc__, [log_prob, queries])
    found.set_defaults(threads=1)
    found.add_argument("--sizes", default="32x64x8,32x256x23,8x1024x50")
    run(found, quick={"sizes": "32x64x8"})
