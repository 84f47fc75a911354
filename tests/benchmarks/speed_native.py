"""Sampling with and without the native operator, beside Pyro and a log_prob, in one process.

    python -m pyro_genexact.native build
    python tests/benchmarks/speed_native.py [--threads 1,2] [--rounds 9] [--only maf,nsf,made] [--markdown]

Medians over interleaved rounds, as in speed.py: without grad, float32, validation off for all.

* maf: the sizes and peers of speed.py.
* nsf: the same sizes with the default bins.
* made: MADE with Bernoulli sites, 784 sites, hidden (500,), batch 100 and 1000.
* rsample: rsample and backward of maf.

The columns: ours with the native operator, ours in Python, log_prob of the same batch, and Pyro's sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pyro
import torch
from speed import RSAMPLE, SIZES, Call, build_genexact, build_pyro, interleave, operations, show

import pyro_genexact as gx
from pyro_genexact import native

COLUMNS = ["native", "python", "log_prob", "pyro"]
MAF, NSF, MADE, GRAD = "maf", "nsf", "made", "rsample"


def with_and_without(call: Call) -> dict[str, Call]:
    def switched(on: bool) -> Call:
        def run() -> None:
            with native.enabled(on):
                call()

        return run

    return {"native": switched(True), "python": switched(False)}


def sampling(module: Callable[[], object], batch: int) -> dict[str, Call]:
    """The calls of a module whose call returns a distribution."""
    sample = torch.no_grad()(lambda: module().sample((batch,)))
    x = sample()
    return {**with_and_without(sample), "log_prob": torch.no_grad()(lambda: module().log_prob(x))}


def calls(only: list[str]) -> dict[tuple[str, str], Call]:
    found: dict[str, dict[str, Call]] = {}
    for features in (8, 64, 784):
        size = SIZES[features]
        label = f"D={size.features}, hidden {size.hidden[0]}, batch {size.batch}, {size.transforms} transforms"
        if MAF in only:
            peer = build_pyro(size)
            found[f"maf {label}"] = sampling(build_genexact(size).module, size.batch)
            found[f"maf {label}"]["pyro"] = torch.no_grad()(lambda peer=peer, size=size: peer.sample(size.batch))
        if NSF in only:
            flow = gx.flows.nsf(size.features, transforms=size.transforms, hidden=size.hidden)
            found[f"nsf {label}"] = sampling(flow, size.batch)
        if GRAD in only:
            found[f"maf rsample + backward {label}"] = with_and_without(operations(build_genexact(size), size)[RSAMPLE])
    for batch in (100, 1000) if MADE in only else ():
        head = gx.heads.Bernoulli()
        net = gx.conditioners.MADE(784, head.num_params, hidden=(500,))
        found[f"MADE of 784 Bernoulli sites, hidden 500, batch {batch}"] = sampling(
            gx.Autoregressive(net, head, (784,)), batch
        )
    return {(label, name): call for label, columns in found.items() for name, call in columns.items()}


def table(timed: dict[tuple[str, str], Call], rounds: int, markdown: bool) -> None:
    times = interleave(timed, rounds)
    rows = []
    for label in dict.fromkeys(label for label, _ in times):
        cells = {name: times.get((label, name)) for name in COLUMNS}
        ratios = [
            f"{cells[a] / cells[b]:.2f}" if cells[a] and cells[b] else "-"  # type: ignore[operator]
            for a, b in (("python", "native"), ("pyro", "native"), ("native", "log_prob"))
        ]
        rows.append([label, *(f"{1e3 * t:.4g}" if t else "-" for t in cells.values()), *ratios])
    header = ["model", *(f"{name}, ms" for name in COLUMNS), "python / native", "pyro / native", "native / log_prob"]
    show(header, rows, markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default=",".join((MAF, NSF, MADE, GRAD)))
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    if not native.is_built():
        parser.error("the native operator is not built: python -m pyro_genexact.native build")
    pyro.enable_validation(False)
    torch.manual_seed(0)
    timed = calls(args.only.split(","))
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"torch {torch.__version__}, {threads} thread(s)\n")
        table(timed, args.rounds, args.markdown)


if __name__ == "__main__":
    main()
