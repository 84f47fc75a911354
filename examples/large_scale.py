"""A flow trained on a memory-mapped file by two processes, killed and continued.

    python examples/large_scale.py [--out FILE] [--rows 2000000] [--smoke-test]

The script writes a file of rows of a mixture of eight Gaussians in eight dimensions,
whose density is known. ``gx.fit`` reads it batch by batch, so the file may be larger
than the memory. Two processes with a Lightning Fabric train a masked autoregressive
flow on it. Each reads its share of every batch, and both hold the same weights.

After the first checkpoint the script kills both processes (SIGKILL), as happens on a
preempted machine, and starts them again with the same command. They continue from the
checkpoint. A second training is not killed. The script compares the final weights of
both, which are the same bit for bit, and prints how far the flow's held-out
log-density is below that of the true density, in nats.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import pyro_genexact as gx

FEATURES, HELD_OUT, CHUNK = 8, 5000, 100_000


def mixture() -> MixtureSameFamily:
    """The distribution of the rows, whose density and entropy are known."""
    locs = 2 * torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(0))
    return MixtureSameFamily(
        Categorical(torch.ones(8)), Independent(Normal(locs, 0.5), 1)
    )


def write(path: Path, rows: int) -> None:
    """Writes the rows in chunks; they are never in memory together."""
    torch.manual_seed(1)
    shape = (rows, FEATURES)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, rows, CHUNK):
        stop = min(rows, start + CHUNK)
        file[start:stop] = mixture().sample((stop - start,)).numpy()
    file.flush()


def held_out() -> Tensor:
    torch.manual_seed(2)
    return mixture().sample((HELD_OUT,))


class History:
    """A callback of the Fabric: the first process appends the nats of each step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, module: nn.Module, step: int, nats: float) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            with self.path.open("a") as file:
                file.write(f"{step} {float(nats)}\n")


def train(folder: Path, checkpoint: Path, every: int) -> None:
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    devices = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    fabric = Fabric(**devices, callbacks=History(checkpoint.with_suffix(".txt")))
    fabric.launch()
    torch.manual_seed(3)
    flow = gx.flows.maf(FEATURES, transforms=3, hidden=(64, 64))
    data = np.load(folder / "rows.npy", mmap_mode="r")
    settings = {"epochs": 1, "batch_size": 512, "lr": 5e-3, "fabric": fabric}
    settings |= {"checkpoint": checkpoint, "every": every, "progress": False}
    result = gx.fit(flow, data, validation=held_out(), **settings)
    if fabric.is_global_zero:
        print(f"  {result.steps} steps in {result.seconds:.0f} s", flush=True)
        gx.save(flow, checkpoint.with_suffix(".pt"))


def start(folder: Path, checkpoint: Path, every: int) -> subprocess.Popen[bytes]:
    """Starts a training; its log is in the folder."""
    options = {"--folder": folder, "--checkpoint": checkpoint, "--every": every}
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, __file__, *words]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(command, start_new_session=True, stderr=log)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Waits for the end of a training."""
    if process.wait() != 0:
        raise SystemExit(f"The training failed:\n{(folder / 'log').read_text()}")


def kill(process: subprocess.Popen[bytes], checkpoint: Path) -> int:
    """Kills both processes after the first checkpoint; returns the step of the kill."""
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        finish(process, checkpoint.parent)  # raises if the training failed
    return len(history(checkpoint))


def history(checkpoint: Path) -> list[tuple[int, float]]:
    """Steps and their nats, in the order in which they were taken."""
    lines = checkpoint.with_suffix(".txt").read_text().splitlines()
    return [(int(step), float(nats)) for step, nats in map(str.split, lines)]


def draw(killed: list, whole: list, steps: int, best: float, out: Path) -> None:
    """Training nats of both runs, step by step."""
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure, panels = plt.subplots(1, 2, figsize=(7.0, 2.8), width_ratios=(1.4, 1))
    first, second = killed[:steps], killed[steps:]
    for axes in panels:
        axes.plot(*zip(*whole, strict=True), color="0.75", linewidth=2.4)
        axes.plot(*zip(*first, strict=True), color="C3", linewidth=0.8)
        axes.plot(*zip(*second, strict=True), color="C0", linewidth=0.8)
        axes.axhline(best, color="black", linestyle="--", linewidth=0.8)
        axes.axvline(first[-1][0], color="C3", linestyle=":")
        axes.set(xlabel="step")
    panels[0].set(ylabel="log-density per row (nats)", ylim=(best - 8, best + 1))
    names = ["not killed", "until the kill", "continued", "true density", "kill"]
    panels[0].legend(panels[0].lines, names, loc="lower right")
    panels[0].set_title("a  All steps", loc="left")
    middle = second[0][0]
    near = [nats for step, nats in whole if abs(step - middle) <= 20]
    panels[1].set(xlim=(middle - 20, middle + 20))
    panels[1].set(ylim=(min(near) - 0.2, max(near) + 0.2))
    panels[1].set_title("b  Near the kill", loc="left")
    figure.savefig(out)


def main(rows: int, every: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "rows.npy", rows)
        size = (folder / "rows.npy").stat().st_size / 1e6
        print(f"{rows} rows, {size:.0f} MB on disk", flush=True)
        checkpoint, other = folder / "killed.ckpt", folder / "whole.ckpt"
        steps = kill(start(folder, checkpoint, every), checkpoint)
        print(f"killed after {steps} steps, and started again:", flush=True)
        finish(start(folder, checkpoint, every), folder)
        print("another run, not killed:", flush=True)
        finish(start(folder, other, every), folder)
        flow, x = gx.load(checkpoint.with_suffix(".pt")), held_out()
        truth = gx.diagnostics.HeldOut(mixture().log_prob(x))
        lost = truth - gx.diagnostics.held_out(flow, x)
        error = 2 * lost.standard_error
        print(f"below the true density: {lost.mean:.3f} ± {error:.3f} nats (2 s.e.)")
        others = gx.load(other.with_suffix(".pt")).state_dict()
        weights = flow.state_dict().items()
        same = all(torch.equal(value, others[name]) for name, value in weights)
        print(f"weights of both runs: {'equal bit for bit' if same else 'DIFFERENT'}")
        draw(history(checkpoint), history(other), steps, truth.mean, out)
        print(f"saved {out}")
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = Path("large_scale.png")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--every", type=int, default=200, help="steps per checkpoint")
    parser.add_argument("--smoke-test", action="store_true", help="a short test run")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.checkpoint is not None:
        train(args.folder, args.checkpoint, args.every)
    elif args.smoke_test:
        main(rows=20_000, every=5, out=args.out)
    else:
        main(args.rows, args.every, args.out)
