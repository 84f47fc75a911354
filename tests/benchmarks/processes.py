"""Two CPU processes that train one flow: gradients against one process with the joint batch, and throughput.

    python tests/benchmarks/processes.py [--rounds 7] [--steps 20]

maf of 63 features, 256x256 hidden units, 5 transforms.

* gradients: float64, the gradients of a first step on 512 rows, of two processes with 256 each and of one with all: the largest
  difference, relative to the largest gradient. They are read off a step of plain SGD at rate 1.
* throughput: float32, a thread and 256 rows a process and step; ``fit`` in two processes that exchange gradients, and in two that train
  alone at the same time, in alternating order: medians of rows a second, and a second of CPU time, over the rounds, which each time ``--steps``
  steps after a warm-up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import pyro_genexact as gx

FEATURES, BATCH = 63, 256


def flow(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return gx.flows.maf(features=FEATURES, hidden=(256, 256), transforms=5).to(dtype)


def rows(count: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, FEATURES, dtype=dtype) @ torch.randn(FEATURES, FEATURES, dtype=dtype) / 8


def keep_rate(optimizer: Any, steps: int) -> Any:
    return LambdaLR(optimizer, lambda step: 1.0)


def gradient(fabric: Any, batch: int) -> torch.Tensor:
    """Of the mean of log_prob of 512 rows, in float64."""
    module, seen = flow(torch.float64), []

    class Reading(SGD):
        def step(self, closure: Any = None) -> Any:
            seen.extend(p.grad.flatten().clone() for group in self.param_groups for p in group["params"])
            return super().step(closure)

    data = rows(2 * BATCH, torch.float64)
    gx.fit(
        module, data, batch_size=batch, epochs=1, optimizer=partial(Reading, lr=1.0), max_grad_norm=float("inf"),
        fabric=fabric, progress=False,
    )  # fmt: skip
    return torch.cat(seen)


def speed(fabric: Any, own: bool, steps: int) -> list[float]:
    """Rows a second of this process, and its rows a second of CPU time."""
    began = [0.0, 0.0]

    class Timed(torch.optim.Adam):
        taken = 0

        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            self.taken += 1
            if self.taken == 3:
                began[:] = time.perf_counter(), time.process_time()
            return result

    size = 1 if own else fabric.world_size
    data = rows(BATCH * size * (steps + 3), torch.float32)
    fabric.barrier()
    gx.fit(
        flow(torch.float32), data, batch_size=BATCH, epochs=1, optimizer=Timed, schedule=keep_rate, fabric=None if own else fabric,
        progress=False,
    )  # fmt: skip
    ended = time.perf_counter(), time.process_time()
    fabric.barrier()
    return [BATCH * steps / (end - start) for start, end in zip(began, ended, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    joint, alone = gradient(fabric, BATCH), gradient(None, 2 * BATCH)
    if fabric.global_rank == 0:
        print(
            f"gradients: {(joint - alone).abs().max() / alone.abs().max():.1e} apart, relative to the largest",
            flush=True,
        )
    speeds: dict[bool, list[list[float]]] = {False: [], True: []}
    for number in range(args.rounds):
        for own in (False, True) if number % 2 else (True, False):
            speeds[own].append(
                fabric.all_reduce(torch.tensor(speed(fabric, own, args.steps)), reduce_op="sum").tolist()
            )
    if fabric.global_rank == 0:
        for what, ddp, alone in zip(
            ("second", "CPU second"), *(zip(*speeds[own], strict=True) for own in (False, True)), strict=True
        ):
            a, b = statistics.median(ddp), statistics.median(alone)
            rounds = ", ".join(f"{x / y:.2f}" for x, y in zip(ddp, alone, strict=True))
            print(
                f"rows a {what}: {a:.0f} of two processes together, {b:.0f} of two alone: {a / b:.2f} (rounds: {rounds})"
            )
        print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
