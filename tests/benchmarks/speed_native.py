"""Sampling with and without the native operator, beside Pyro and a log_prob, in one process.

    python -m pyro_genexact.native build
    python tests/benchmarks/speed_native.py [--sections maf,nsf,made,rsample] [--rounds 9] [--threads 1] [--markdown]

* maf: the sizes and peers of speed.py.
* nsf: the same sizes with the default bins.
* made: MADE with Bernoulli sites, 784 sites, hidden (500,), batch 100 and 1000.
* rsample: rsample and backward of maf.

float32, validation off for all, medians over interleaved rounds. The way "here" is the loop in Python. A ``log_prob`` of the same batch is
the second row of each case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from speed import RSAMPLE, SIZES, build_genexact, build_pyro, label, operations
from timing import HERE, Call, Measurement, Named, measured, parser, run, with_native

import pyro_genexact as gx
from pyro_genexact import native


def both(case: str, operation: str, call: Call) -> dict[Named, Call]:
    """A call with and without the operator."""
    return {(case, operation, HERE): call, (case, operation, f"{HERE}, native"): with_native(call)}


def sampling(case: str, module: Callable[[], Any], batch: int) -> dict[Named, Call]:
    """The calls of a module whose call returns a distribution."""
    sample = torch.no_grad()(lambda: module().sample((batch,)))
    x = sample()
    score = torch.no_grad()(lambda: module().log_prob(x))
    return {**both(case, "sample", sample), (case, "log_prob", HERE): score}


def sizes(options: argparse.Namespace) -> list[Any]:
    return [SIZES[int(features)] for features in options.sizes.split(",")]


def maf(options: argparse.Namespace) -> list[Measurement]:
    calls: dict[Named, Call] = {}
    for size in sizes(options):
        case, peer = f"maf, {label(size)}", build_pyro(size)
        calls |= sampling(case, build_genexact(size).module, size.batch)
        calls[case, "sample", "Pyro"] = torch.no_grad()(lambda peer=peer, size=size: peer.sample(size.batch))
    return measured(calls, options.rounds)


def nsf(options: argparse.Namespace) -> list[Measurement]:
    calls: dict[Named, Call] = {}
    for size in sizes(options):
        flow = gx.flows.nsf(size.features, transforms=size.transforms, hidden=size.hidden)
        calls |= sampling(f"nsf, {label(size)}", flow, size.batch)
    return measured(calls, options.rounds)


def made(options: argparse.Namespace) -> list[Measurement]:
    calls, head = dict[Named, Call](), gx.heads.Bernoulli()
    for batch in (100, 1000):
        net = gx.conditioners.MADE(784, head.num_params, hidden=(500,))
        case = f"784 binary sites, MADE(500), batch {batch}"
        calls |= sampling(case, gx.Autoregressive(net, head, (784,)), batch)
    return measured(calls, options.rounds)


def rsample(options: argparse.Namespace) -> list[Measurement]:
    calls: dict[Named, Call] = {}
    for size in sizes(options):
        calls |= both(f"maf, {label(size)}", RSAMPLE, operations(build_genexact(size), size)[RSAMPLE])
    return measured(calls, options.rounds)


if __name__ == "__main__":
    found = parser(__doc__, [maf, nsf, made, rsample], rounds=9)
    found.add_argument("--sizes", default="8,64,784", help="numbers of features")
    if not native.is_built():
        found.error("the native operator is not built: python -m pyro_genexact.native build")
    run(found, quick={"sizes": "8"})
