"""What suits this machine: threads, batch sizes, and the time of default fits.

    python tests/benchmarks/your_machine.py [--rounds 7] [--only threads,batches,fits] [--device cuda]

* threads: milliseconds of a training step, a ``log_prob`` and a sample of flows of three sizes, by the number of threads.
* batches: rows per second of a training step, by the batch size.
* fits: seconds and epochs of ``gx.fit(..., validation=0.2)`` with its defaults, by recipe, rows and features, on one thread. The
  data are a random smooth bend of normal noise.

Threads and batch sizes are medians over interleaved rounds after a warm-up. The tables are Markdown.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

import torch
from measurements import lines, summary
from timing import Call, interleaved
from torch import Tensor

import pyro_genexact as gx

SIZES = {"8 features, hidden 64": (8, 64), "32, 256": (32, 256), "64, 512": (64, 512)}
FITS = [
    ("maf", 1_000, 4),
    ("nsf", 1_000, 4),
    ("maf", 10_000, 8),
    ("nsf", 10_000, 8),
    ("maf", 50_000, 32),
    ("naf", 10_000, 8),
]


def bent(rows: int, features: int) -> Tensor:
    torch.manual_seed(0)
    noise, mix = torch.randn(rows, features), torch.randn(features, features) / features**0.5
    return noise + torch.sin(2 * noise @ mix)


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call."""
    return {name: summary(times)[0] for name, times in interleaved(calls, rounds).items()}


def step(flow: gx.Flow, optimizer: torch.optim.Optimizer, rows: Tensor) -> None:
    optimizer.zero_grad()
    (-flow().log_prob(rows).mean()).backward()
    optimizer.step()


@torch.no_grad()
def score(flow: gx.Flow, rows: Tensor) -> Tensor:
    return flow().log_prob(rows)


@torch.no_grad()
def draw(flow: gx.Flow) -> Tensor:
    return flow().sample((256,))


def training(features: int, hidden: int, rows: int, device: str) -> tuple[gx.Flow, Tensor, Call]:
    flow = gx.flows.maf(features, hidden=(hidden, hidden)).to(device)
    data = bent(rows, features).to(device)
    return flow, data, partial(step, flow, torch.optim.Adam(flow.parameters(), 1e-3), data)


def with_threads(threads: int, call: Call) -> object:
    torch.set_num_threads(threads)
    return call()


def threads(rounds: int) -> None:
    counts = sorted({1, 2, os.cpu_count() or 1})
    cells = [["flow `maf`, batch 256", "operation", *(f"{n} thread{'s' * (n > 1)}, ms" for n in counts)]]
    for label, (features, hidden) in SIZES.items():
        flow, data, train = training(features, hidden, 256, "cpu")
        calls = {"training step": train, "`log_prob`": partial(score, flow, data), "`sample`": partial(draw, flow)}
        for name, call in calls.items():
            found = medians({str(n): partial(with_threads, n, call) for n in counts}, rounds)
            cells.append([label, name, *(f"{1e3 * value:.2f}" for value in found.values())])
    torch.set_num_threads(1)
    print(*lines(cells), sep="\n", flush=True)


def batches(rounds: int, device: str) -> None:
    torch.set_num_threads(1)
    sizes = [32, 128, 512, 2048]
    cells = [["flow `maf`, one thread, rows per second", *(f"batch {n}" for n in sizes)]]
    for label, (features, hidden) in SIZES.items():
        found = medians({str(n): training(features, hidden, n, device)[2] for n in sizes}, rounds)
        cells.append([label, *(f"{int(n) / value:,.0f}" for n, value in found.items())])
    print(*lines(cells), sep="\n", flush=True)


def fits(device: str) -> None:
    torch.set_num_threads(1)
    print("| recipe | rows | features | seconds | epochs | steps |")
    print("|---|---|---|---|---|---|")
    for recipe, rows, features in FITS:
        data = bent(rows, features).to(device)
        flow = getattr(gx.flows, recipe)(features, standardize=data).to(device)
        result = gx.fit(flow, data, validation=0.2, progress=False)
        print(
            f"| `{recipe}` | {rows:,} | {features} | {result.seconds:.0f} | {len(result.train)} | {result.steps:,} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="threads,batches,fits")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.distributions.Distribution.set_default_validate_args(False)
    chosen = options.only.split(",")
    if "threads" in chosen and options.device == "cpu":
        threads(options.rounds)
        print()
    if "batches" in chosen:
        batches(options.rounds, options.device)
        print()
    if "fits" in chosen:
        fits(options.device)


if __name__ == "__main__":
    main()
