"""The sequential direction by passes over all sites (``solver="fixed_point"``), compared with the loop over sites.

    OMP_NUM_THREADS=1 python tests/benchmarks/fixed_point.py [--seconds 60] [--data DIR] [--device cuda] [--only maf64]

* maf64: samples of a MAF of 64 features, trained on scikit-learn's digits.
* iaf64: log-probabilities of digits by an IAF of 64 features, trained on them.
* maf784: samples of a MAF of 784 features, trained on digits that are enlarged to 28x28 pixels, with noise.
* made784: samples of a MADE of 784 binary sites, trained on binarised MNIST (with --data), else on enlarged digits.

Each model is trained for --seconds. The columns are: the number of passes for 1000 rows in float32, that of the transform with
most (with blocks, the sum over the blocks); the time relative to the loop for 1 and for 100 rows, the median ratio of interleaved
rounds; and the largest |a - b| / (1 + |b|) from the loop in float64 and in float32 at the same noise (for binary sites, the
number of the 1000 rows that differ). With blocks, passes and differences are those of 100 rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

import pyro_genexact as gx
from pyro_genexact.numerics import FixedPoint

BLOCKS = (None, 8, 16, 32, 64)
ROWS, ROUNDS, CHECKED = (1, 100), 7, 1000


def digits(size: int, noise: float = 1 / 16) -> Tensor:
    """Rows of images (N, size * size), standardised."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    rows = interpolate(images, (size, size), mode="bilinear").flatten(1)
    rows = rows.repeat(8, 1)
    rows = rows + noise * torch.rand_like(rows)
    return (rows - rows.mean(0)) / rows.std(0)


def binary(data: Path | None) -> Tensor:
    if data is None:
        return (digits(28, 0.0) > 0).float()
    file = np.load(data / "binarized_mnist" / "binarized_mnist_train_valid.npz")
    return torch.from_numpy(np.unpackbits(file["train"], axis=1).astype(np.float32))


def train(module: Any, rows: Tensor, seconds: float) -> float:
    """Maximises log_prob; returns the mean of the last 20 batches."""
    optimizer, values, start = torch.optim.Adam(module.parameters(), 1e-3), list[float](), time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = rows[torch.randint(len(rows), (200,), device=rows.device)]
        optimizer.zero_grad()
        loss = -module().log_prob(batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        optimizer.step()
        values.append(-loss.item())
    return statistics.mean(values[-20:])


def timed(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference(a: Tensor, b: Tensor, discrete: bool) -> str:
    return (
        f"{(a != b).any(1).sum()} rows" if discrete else f"{((a - b).abs() / (1 + b.abs())).nan_to_num(0.0).max():.1e}"
    )  # a row may overflow


Run = Callable[[Any, int], Tensor]  # evaluates a distribution for a number of rows, at fixed noise


def measure(name: str, module: Any, run: Run, discrete: bool, device: str) -> None:
    solvers: list[Any] = [None, *(FixedPoint(block=block) for block in BLOCKS)]
    times: dict[int, list[list[float]]] = {rows: [] for rows in ROWS}
    with torch.no_grad():
        for rows, rounds in times.items():
            for _ in range(ROUNDS + 1):
                rounds.append([timed(lambda s=s, n=rows: run(module(solver=s), n), device) for s in solvers])  # type: ignore[misc]
            del rounds[0]
        loop_times = [f"{1e3 * statistics.median(found[0] for found in rounds):.1f} ms" for rounds in times.values()]
        print(f"| {name} | loop | | {' | '.join(loop_times)} | | |", flush=True)
        loops = {
            (dtype, rows): run(module.to(dtype)(), rows)
            for dtype in (torch.float64, torch.float32)
            for rows in (CHECKED, ROWS[1])
        }
        for place, solver in enumerate(solvers[1:], 1):
            ratios = [statistics.median(found[place] / found[0] for found in rounds) for rounds in times.values()]
            gaps, rows = [], CHECKED if solver.block is None else ROWS[1]
            for dtype in (torch.float64, torch.float32):
                d = module.to(dtype)(solver=solver)
                gaps.append(difference(run(d, rows), loops[dtype, rows], discrete))
            passes = max(d.passes) if isinstance(d.passes, list) else d.passes
            method = "all sites" if solver.block is None else f"blocks of {solver.block}"
            print(f"| | {method} | {passes} | {ratios[0]:.2f} | {ratios[1]:.2f} | {gaps[0]} | {gaps[1]} |", flush=True)


def sampled(d: Any, rows: int) -> Tensor:
    torch.manual_seed(1)
    noise = torch.randn(rows, *d.event_shape, dtype=torch.float64, device="cpu")
    base = next(iter(d.transforms[0].parts[0].watched()))
    return d.transforms[0](noise.to(base))  # type: ignore[no-any-return]


def drawn(d: Any, rows: int) -> Tensor:
    torch.manual_seed(1)
    return d.sample((rows,))  # type: ignore[no-any-return]


def scored(data: Tensor) -> Run:
    def run(d: Any, rows: int) -> Tensor:
        like = next(iter(d.transforms[0].parts[0].watched()))
        return d.log_prob(data[:rows].to(like)).unsqueeze(1)  # type: ignore[no-any-return]

    return run


def cases(data: Path | None) -> dict[str, Callable[[], tuple[str, Any, Tensor, Run, bool]]]:
    def maf(features: int, transforms: int, hidden: int) -> tuple[str, Any, Tensor, Run, bool]:
        flow = gx.flows.maf(features, transforms=transforms, hidden=(hidden,))
        return f"sample, MAF, {features} features", flow, digits(round(features**0.5)), sampled, False

    def iaf() -> tuple[str, Any, Tensor, Run, bool]:
        rows = digits(8)
        return "`log_prob`, IAF, 64 features", gx.flows.iaf(64, transforms=3, hidden=(256,)), rows, scored(rows), False

    def made() -> tuple[str, Any, Tensor, Run, bool]:
        net = gx.conditioners.MADE(784, 1, hidden=(500,))
        return (
            "sample, MADE, 784 binary sites",
            gx.Autoregressive(net, gx.heads.Bernoulli(), (784,)),
            binary(data),
            drawn,
            True,
        )

    return {"maf64": lambda: maf(64, 5, 256), "iaf64": iaf, "maf784": lambda: maf(784, 3, 512), "made784": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    print("| | method | passes | time of 1 row | 100 rows | difference, float64 | float32 |\n" + 7 * "|---" + "|")
    for name, make in cases(args.data).items():
        if args.only and name not in args.only.split(","):
            continue
        torch.manual_seed(0)
        title, module, rows, run, discrete = make()
        module, rows = module.to(args.device), rows.to(args.device)
        value = train(module, rows, args.seconds)
        module.requires_grad_(False).eval()
        measure(f"{title} ({value:.1f} nats)", module, run, discrete, args.device)


if __name__ == "__main__":
    main()
