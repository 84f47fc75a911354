"""Kills fits at random moments, continues them, and compares bit for bit with fits that are left alone.

    python tests/benchmarks/resume.py [--kinds fit,fit_guide,processes] [--kills 20] [--seed 0]

Each trial starts a process that fits with a checkpoint every 5 steps, ends it by SIGKILL at a moment drawn uniformly over the fit,
and runs it again to its end. Weights and history must be those of a fit without a checkpoint, and no more steps than those since
the last checkpoint may be lost. ``processes`` is ``fit`` in two CPU processes: in half of the trials both are killed, in the others
one of them, and the other one has 60 seconds to end by itself.

* fit: maf of 2 features, validation, averaged weights, the default learning rate, dropout.
* fit_guide: AutoFlow from its Laplace start.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import random
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from lightning_fabric import Fabric
from torch import nn

import pyro_genexact as gx

KINDS = "fit", "fit_guide", "processes"
EVERY = 5


class Counted(torch.optim.Adam):
    """Writes a byte to a file after each step."""

    file = -1

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        os.write(self.file, b".")
        return result


class Net(nn.Module):
    """A flow given features with dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.flow = gx.flows.maf(features=2, context=16, hidden=(32, 32))

    def forward(self, x: torch.Tensor) -> Any:
        return self.flow(self.features(x))


def run_fit(fabric: Any, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x = torch.randn(400, 2)
    y = x.sin() + 0.1 * torch.randn(400, 2)
    module = Net()
    result = gx.fit(
        module,
        y,
        x,
        validation=0.2,
        epochs=20,
        batch_size=32,
        ema=0.9,
        fabric=fabric,
        optimizer=Counted,
        progress=False,
        **options,
    )
    return [p.numpy().tobytes() for p in module.state_dict().values()], result.train, result.validation, result.steps


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.square(), 0.5).to_event(1), obs=torch.ones(3))


def run_guide(**options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    guide = gx.guides.AutoFlow(model, hidden=(16,))
    result = gx.fit_guide(model, guide, steps=200, num_particles=4, optimizer=Counted, progress=False, **options)
    return [p.detach().numpy().tobytes() for p in guide.parameters()], result.elbo, result.final, result.steps


def child(kind: str, rank: int, port: int, folder: Path, checkpoint: Path | None) -> None:
    """Runs a fit; its result and its steps are files of the folder."""
    torch.set_num_threads(1)
    fabric = None
    with open(folder / f"log{rank}", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if kind == "processes":
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
    Counted.file = os.open(folder / f"steps{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    options = {"checkpoint": checkpoint, "every": EVERY}
    result = run_guide(**options) if kind == "fit_guide" else run_fit(fabric, **options)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))


def start(kind: str, folder: Path, checkpoint: Path | None) -> list[Any]:
    """The processes of a fit, which has begun."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    ranks = range(2 if kind == "processes" else 1)
    fork = multiprocessing.get_context("fork")  # nothing is imported anew
    processes = [fork.Process(target=child, args=(kind, rank, port, folder, checkpoint)) for rank in ranks]
    for process in processes:
        process.start()
    while any(process.is_alive() and not (folder / f"steps{rank}").exists() for rank, process in enumerate(processes)):
        time.sleep(0.002)
    return processes


def whole(kind: str, folder: Path, checkpoint: Path | None) -> tuple[list[Any], int, float]:
    """Results of a fit that is not killed, the steps it took, and its seconds."""
    processes = start(kind, folder, checkpoint)
    began = time.perf_counter()
    for rank, process in enumerate(processes):
        process.join(300)
        if process.exitcode != 0:
            raise RuntimeError((folder / f"log{rank}").read_text()[-2000:])
    results = [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(len(processes))]
    return results, (folder / "steps0").stat().st_size, time.perf_counter() - began


def kill(processes: list[Any]) -> None:
    """SIGKILL to the processes of a fit, or to one of two: then the other one ends by itself."""
    alone = len(processes) == 2 and random.random() < 0.5
    for process in [random.choice(processes)] if alone else processes:
        process.kill()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            raise RuntimeError("One process of two was killed, and the other one still ran 60 seconds later.")


def trial(kind: str, folder: Path, expected: list[Any], seconds: float) -> str:
    """What became of a fit that was killed: empty if it ended as expected."""
    checkpoint = folder / "checkpoint"
    processes = start(kind, folder / "killed", checkpoint)
    time.sleep(random.uniform(0, seconds))
    if not all(process.is_alive() for process in processes):
        return "ended before it was killed"
    kill(processes)
    before = (folder / "killed" / "steps0").stat().st_size
    left = sorted(path.name for path in folder.glob("checkpoint*"))
    results, after, _ = whole(kind, folder / "continued", checkpoint)
    lost = before + after - expected[0][-1]
    print(f"  killed after {before:3d} steps, {lost} of them lost; files {left}", flush=True)
    if results != expected:
        return "ended elsewhere"
    return "" if lost <= EVERY else f"lost {lost} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            expected, _, _ = whole(kind, Path(folder, "alone"), None)
            _, _, seconds = whole(kind, Path(folder, "with"), Path(folder, "checkpoint"))
            print(f"{kind}: {expected[0][-1]} steps in {seconds:.1f} s", flush=True)
            ends, count = [], 0
            while len(ends) < args.kills:
                end = trial(kind, Path(folder, str(count)), expected, seconds)
                count += 1
                if end != "ended before it was killed":
                    ends.append(end)
        print(f"{kind}: {ends.count('')} of {args.kills} end bit for bit", *filter(None, ends), flush=True)


if __name__ == "__main__":
    main()
