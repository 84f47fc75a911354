"""Rows a second that ``gx.fit`` reads from a memory-mapped file, beside a bare loop over a DataLoader.

    OMP_NUM_THREADS=1 python tests/benchmarks/streaming.py [--gigabytes 2] [--batch-size 4096]

The file holds float32 rows of 64 features. Model (a Gaussian with 128 parameters), optimizer (Adam) and batch size are the
same; both read all rows once in random order. The bare loop is what PyTorch's documentation shows: a Dataset that takes a list of
rows, a DataLoader with a BatchSampler over a RandomSampler, and a step a batch. The two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import pyro_genexact as gx

FEATURES, ROUNDS, CHUNK = 64, 3, 2**18


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(FEATURES)), nn.Parameter(torch.zeros(FEATURES))

    def forward(self) -> dist.Distribution:
        return dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)


class Mapped(Dataset[Tensor]):
    def __init__(self, rows: np.memmap) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: list[int]) -> Tensor:
        return torch.from_numpy(self.rows[index])


def bare(rows: np.memmap, batch_size: int) -> float:
    module, data = Gaussian(), Mapped(rows)
    optimizer = torch.optim.Adam(module.parameters())
    start = time.perf_counter()
    order = BatchSampler(RandomSampler(data), batch_size, drop_last=False)
    for batch in DataLoader(data, batch_size=None, sampler=order):
        optimizer.zero_grad()
        loss = -module().log_prob(batch).mean()
        loss.backward()
        optimizer.step()
    return len(rows) / (time.perf_counter() - start)


def fitted(rows: np.memmap, batch_size: int) -> float:
    start = time.perf_counter()
    gx.fit(Gaussian(), rows, epochs=1, batch_size=batch_size, progress=False)
    return len(rows) / (time.perf_counter() - start)


def main(gigabytes: float, batch_size: int) -> None:
    size = int(gigabytes * 2**30 / (4 * FEATURES))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size, FEATURES))
        random = np.random.default_rng(0)
        for start in range(0, size, CHUNK):
            file[start : start + CHUNK] = random.standard_normal((min(CHUNK, size - start), FEATURES), np.float32)
        file.flush()
        rows = np.load(path, mmap_mode="r")
        found: dict[str, list[float]] = {"bare loop": [], "gx.fit": []}
        for _ in range(ROUNDS):
            found["bare loop"].append(bare(rows, batch_size))
            found["gx.fit"].append(fitted(rows, batch_size))
        for name, values in found.items():
            print(f"{name}: {statistics.median(values):,.0f} rows a second, of {size:,}")
        ratios = [b / a for a, b in zip(found["bare loop"], found["gx.fit"], strict=True)]
        print(f"gx.fit / bare loop: {statistics.median(ratios):.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=4096)
    args = parser.parse_args()
    main(args.gigabytes, args.batch_size)
