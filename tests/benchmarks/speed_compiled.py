"""Training steps of a masked autoregressive flow and of an amortised IAF guide, as they are and compiled, beside peers.

    python tests/benchmarks/speed_compiled.py [--rounds 9] [--sizes 8,64,784] [--threads 1,2] [--markdown]
                                              [--sections flows,guides]

* flows: zero_grad, ``log_prob``, backward, Adam, for the flows of ``speed.py``. Compiled: ``torch.compile(log_prob)``
  with its default backend, for all libraries. What torch cannot compile as a whole runs in parts.
* guides: the step of SVI of ``speed_guides.py``. Compiled: what ``fit_guide(compile=True)`` runs.

float32, validation off, medians over interleaved rounds in one process after a warm-up. A number of threads is set
before the functions are compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from speed import BUILDERS, OURS, SIZES, Call, Size, build_zuko, interleave, label, show

from pyro_genexact.inference.compiled import RecordedGradients


def train(module: torch.nn.Module, log_prob: Any, size: Size) -> Call:
    x = torch.randn(size.batch, size.features)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        (-log_prob(x).mean()).backward()
        optimizer.step()

    return step


def flows(options: argparse.Namespace, libraries: list[str]) -> None:
    rows = []
    for size in (SIZES[int(d)] for d in options.sizes.split(",")):
        print(f"timing D={size.features} ...", file=sys.stderr, flush=True)
        calls: dict[Any, Call] = {}
        for name in libraries:
            model = BUILDERS[name](size)
            calls[name, "eager"] = train(model.module, model.log_prob, size)
            calls[name, "compiled"] = train(model.module, torch.compile(model.log_prob), size)
        times = {key: 1e3 * value for key, value in interleave(calls, options.rounds).items()}
        eager, compiled = (min(times[name, way] for name in libraries if name != OURS) for way in ("eager", "compiled"))
        ours, own = times[OURS, "eager"], times[OURS, "compiled"]
        cells = [f"{times[name, way]:.4g}" for name in libraries for way in ("eager", "compiled")]
        ratios = (own / ours, ours / eager, own / eager, own / compiled)
        rows.append([str(torch.get_num_threads()), label(size), *cells, *(f"{ratio:.3f}" for ratio in ratios)])
        torch._dynamo.reset()
    header = [f"{name}{way}, ms" for name in libraries for way in ("", " compiled")]
    against = ["compiled / ours", "ours / eager peer", "compiled / eager peer", "compiled / compiled peer"]
    show(["threads", "D, hidden, batch, transforms", *header, *against], rows, options.markdown)


def guides(options: argparse.Namespace, libraries: list[str]) -> None:
    import speed_guides

    calls: dict[Any, Call] = {}

    def recorded(model: Any, guide: Any, parameters: Any) -> Call:
        gradients = RecordedGradients(partial(Trace_ELBO().differentiable_loss, model, guide), parameters)
        optimizer = torch.optim.Adam(parameters, lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            gradients()
            optimizer.step()

        return step

    plain = speed_guides.svi
    for name in (OURS, *(name for name in ("pyro", "zuko") if name in libraries)):
        build = speed_guides.BUILDERS[name]
        calls[name] = speed_guides.amortised(build(speed_guides.IAF))
        if name == OURS:
            speed_guides.svi = recorded
            calls[f"{name} compiled"] = speed_guides.amortised(build(speed_guides.IAF))
            speed_guides.svi = plain
    times = {key: 1e3 * value for key, value in interleave(calls, options.rounds).items()}
    rows = [[str(torch.get_num_threads()), key, f"{t:.4g}", f"{t / times['pyro']:.3f}"] for key, t in times.items()]
    show(["threads", "SVI step, amortised IAF", "ms", "of Pyro's"], rows, options.markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", default="8,64,784", help="numbers of features")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--sections", default="flows,guides")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    libraries = [name for name in BUILDERS if importlib.util.find_spec(name)]
    if "zuko" in libraries:
        build_zuko(SIZES[8])  # its import is over before validation is set
    pyro.enable_validation(False)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}\n")
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        for section in options.sections.split(","):
            {"flows": flows, "guides": guides}[section](options, libraries)


if __name__ == "__main__":
    main()
