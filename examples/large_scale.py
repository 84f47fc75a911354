"""A flow trained on a memory-mapped file by two processes, killed on the way, and continued.

    python examples/large_scale.py [--rows 2000000] [--smoke-test]

The script makes a file of rows of a mixture of eight Gaussians in eight dimensions, whose density is known. ``gx.fit`` reads
it batch by batch: the file may be larger than the memory. Two processes with a Lightning Fabric train a masked
autoregressive flow on it; each reads its share of every joint batch, and both hold the same weights.

After the first checkpoint the script kills both processes (SIGKILL), as a preempted machine would, and starts them again with the
same command. They continue from the checkpoint, and end where a run that nobody killed ends, to the last bit.
``--whole`` trains that run too, and compares. What the flow loses against the true density, in held-out nats, is printed.
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

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import pyro_genexact as gx

FEATURES, HELD_OUT, CHUNK = 8, 5000, 100_000


def mixture() -> MixtureSameFamily:
    """The distribution of the rows: its density, and so its entropy, are known."""
    locs = 2 * torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(0))
    return MixtureSameFamily(
        Categorical(torch.ones(8)), Independent(Normal(locs, 0.5), 1)
    )


def write(path: Path, rows: int) -> None:
    """Writes the rows chunk by chunk; they are never in memory together."""
    torch.manual_seed(1)
    file = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(rows, FEATURES)
    )
    for start in range(0, rows, CHUNK):
        stop = min(rows, start + CHUNK)
        file[start:stop] = mixture().sample((stop - start,)).numpy()
    file.flush()


def held_out() -> Tensor:
    torch.manual_seed(2)
    return mixture().sample((HELD_OUT,))


def train(folder: Path, checkpoint: Path, every: int) -> None:
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.manual_seed(3)
    flow = gx.flows.maf(FEATURES, transforms=3, hidden=(64, 64))
    data = np.load(folder / "rows.npy", mmap_mode="r")
    result = gx.fit(
        flow,
        data,
        validation=held_out(),
        epochs=1,
        batch_size=512,
        lr=5e-3,
        fabric=fabric,
        checkpoint=checkpoint,
        every=every,
        progress=False,
    )
    if fabric.is_global_zero:
        print(
            f"{result.steps} steps in {result.seconds:.0f} s, those before the kill included"
        )
        gx.save(flow, checkpoint.with_suffix(".pt"))


def start(folder: Path, checkpoint: Path, every: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--checkpoint",
        str(checkpoint),
        "--every",
        str(every),
    ]
    with open(folder / "log", "wb") as log:  # Fabric says which processes have come
        return subprocess.Popen(command, start_new_session=True, stderr=log)


def finished(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"The training failed:\n{(folder / 'log').read_text()}")


def main(rows: int, every: int, whole: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "rows.npy", rows)
        print(
            f"{rows} rows, {(folder / 'rows.npy').stat().st_size / 1e6:.0f} MB on disk"
        )
        checkpoint = folder / "killed.ckpt"
        process = start(folder, checkpoint, every)
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)  # both processes
        process.wait()
        print(
            f"killed after the first checkpoint, at step {every} or soon after; started again"
        )
        finished(start(folder, checkpoint, every), folder)
        flow, x = gx.load(checkpoint.with_suffix(".pt")), held_out()
        lost = gx.diagnostics.HeldOut(mixture().log_prob(x)) - gx.diagnostics.held_out(
            flow, x
        )
        print(
            f"below the density of the data by {lost.mean:.3f} ± {2 * lost.standard_error:.3f} nats (two standard errors)"
        )
        if whole:
            finished(start(folder, folder / "whole.ckpt", every), folder)
            others = gx.load(folder / "whole.pt").state_dict()
            same = all(
                torch.equal(value, others[name])
                for name, value in flow.state_dict().items()
            )
            print(
                f"a run that nobody killed has {'the same weights, bit for bit' if same else 'OTHER weights'}"
            )
            if not same:
                raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument(
        "--whole", action="store_true", help="compare with a run that is not killed"
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.checkpoint is not None:
        train(args.folder, args.checkpoint, args.every)
    elif args.smoke_test:
        main(rows=20_000, every=5, whole=True)
    else:
        main(args.rows, args.every, args.whole)
