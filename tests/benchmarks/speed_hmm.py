"""Speed of hidden Markov models, beside Pyro's DiscreteHMM with the same log_prob, in one process.

    python tests/benchmarks/speed_hmm.py [--rounds 7] [--markdown] [--validate] [--sizes 32x64x8,32x256x23,8x1024x50]

Rows, sites and states B x N x V; normal observations; gradients in the logits and in the observations' means. What Pyro's does
not have (posterior draws, filtering of all sites, Viterbi) stands beside our log_prob + backward.

Medians over interleaved rounds after a warm-up.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from speed import interleave, show
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--sizes", default="32x64x8,32x256x23,8x1024x50")
    options = parser.parse_args()
    pyro.enable_validation(options.validate)
    torch.set_num_threads(1)

    table, more = [], []
    for size in options.sizes.split(","):
        parameters, x = problem(*map(int, size.split("x")))
        sites = x.shape[-1]
        a, b = (make(parameters, sites).log_prob(x) for make in (ours, pyros))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)

        def log_prob(make: object, parameters: list[Tensor] = parameters, x: Tensor = x) -> None:
            with torch.no_grad():
                make(parameters, x.shape[-1]).log_prob(x)  # type: ignore[operator]

        def backward(make: object, parameters: list[Tensor] = parameters, x: Tensor = x) -> None:
            make(parameters, x.shape[-1]).log_prob(x).sum().backward()  # type: ignore[operator]

        work = {"log_prob": log_prob, "log_prob + backward": backward}
        calls = {
            (name, make): lambda call=call, make=make: call(make)
            for name, call in work.items()
            for make in (ours, pyros)
        }
        times = {key: 1e3 * value for key, value in interleave(calls, options.rounds).items()}
        for name in work:
            here, there = times[name, ours], times[name, pyros]
            table.append([size, name, f"{here:.4g}", f"{there:.4g}", f"{there / here:.2f}"])

        def queries(parameters: list[Tensor] = parameters, x: Tensor = x) -> dict[str, object]:
            d = ours([p.detach() for p in parameters], x.shape[-1])
            return {
                "filter": lambda: d.filter(x),
                "smooth": lambda: d.posterior(x).marginals,
                "Viterbi": lambda: d.posterior(x).mode,
                "10 posterior draws": lambda: d.posterior(x).sample((10,)),
                "sample 8": lambda: d.sample((8,)),
            }

        found = interleave(queries(), options.rounds)
        more.append([size, *(f"{1e3 * t:.4g}" for t in (times["log_prob + backward", ours] / 1e3, *found.values()))])
    show(["B x N x V", "operation", "here, ms", "DiscreteHMM, ms", "ratio"], table, options.markdown)
    show(["B x N x V, ms", "log_prob + backward", *queries()], more, options.markdown)


if __name__ == "__main__":
    main()
