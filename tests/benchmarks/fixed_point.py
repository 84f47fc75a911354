"""The sequential direction by passes over all sites (``solver="fixed_point"``), compared with the loop over sites.

    OMP_NUM_THREADS=1 python tests/benchmarks/fixed_point.py [--seconds 60] [--data DIR] [--device cuda] [--only maf64]

* maf64: samples of a MAF of 64 features, trained on scikit-learn's digits.
* iaf64: log-probabilities of digits by an IAF of 64 features, trained on them.
* maf784: samples of a MAF of 784 features, trained on digits that are enlarged to 28x28 pixels, with noise.
* made784: samples of a MADE of 784 binary sites, trained on binarised MNIST (with --data), else on enlarged digits.

Each model is trained for --seconds. Times are those of 1 and of 100 rows. For each method, the script prints the number of
passes for 1000 rows in float32, that of the transform with most (with blocks, the sum over the blocks); and the largest
|a - b| / (1 + |b|) from the loop in float64 and in float32 at the same noise (for binary sites, the number of the 1000 rows that
differ). With blocks, passes and differences are those of 100 rows.
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
from timing import HERE, Measurement, measured, parser, run, show
from torch import Tensor
from torch.nn.functional import interpolate

import pyro_genexact as gx
from pyro_genexact.numerics import FixedPoint

SOLVERS: list[Any] = [None, *(FixedPoint(block=block) for block in (None, 8, 16, 32, 64))]
ROWS, CHECKED = (1, 100), 1000


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


def difference(a: Tensor, b: Tensor, discrete: bool) -> str:
    return (
        f"{(a != b).any(1).sum()} rows" if discrete else f"{((a - b).abs() / (1 + b.abs())).nan_to_num(0.0).max():.1e}"
    )  # a row may overflow


Run = Callable[[Any, int], Tensor]  # evaluates a distribution for a number of rows, at fixed noise


def method(solver: FixedPoint | None) -> str:
    return HERE if solver is None else "all sites" if solver.block is None else f"blocks of {solver.block}"


@torch.no_grad()
def agreement(module: Any, run: Run, discrete: bool) -> list[list[str]]:
    """Passes of each method, and differences from the loop."""
    dtypes, found = (torch.float64, torch.float32), []
    loops = {(dtype, rows): run(module.to(dtype)(), rows) for dtype in dtypes for rows in (CHECKED, ROWS[1])}
    for solver in SOLVERS[1:]:
        gaps, rows = [], CHECKED if solver.block is None else ROWS[1]
        for dtype in dtypes:
            d = module.to(dtype)(solver=solver)
            gaps.append(difference(run(d, rows), loops[dtype, rows], discrete))
        passes = max(d.passes) if isinstance(d.passes, list) else d.passes
        found.append([method(solver), str(passes), *gaps])
    return found


def table(options: argparse.Namespace) -> list[Measurement]:
    found = []
    for name, make in cases(options.data).items():
        if name not in options.only.split(","):
            continue
        title, module, data, run, discrete = make()
        module, data = module.to(options.device), data.to(options.device)
        value = train(module, data, options.seconds)
        module.requires_grad_(False).eval()
        calls = {
            (title, f"{rows} row{'s' * (rows > 1)}", method(s)): torch.no_grad()(
                lambda s=s, rows=rows, module=module, run=run: run(module(solver=s), rows)
            )
            for rows in ROWS
            for s in SOLVERS
        }
        found += measured(calls, options.rounds)
        print(f"{title}, trained to {value:.1f} nats")
        heads = ["method", "passes", "difference, float64", "float32"]
        show(heads, agreement(module, run, discrete), options.markdown)
    return found


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
        return (
            f"sample of maf, {features} features, {transforms} transforms",
            flow,
            digits(round(features**0.5)),
            sampled,
            False,
        )

    def iaf() -> tuple[str, Any, Tensor, Run, bool]:
        rows = digits(8)
        return (
            "log_prob of iaf, 64 features, 3 transforms",
            gx.flows.iaf(64, transforms=3, hidden=(256,)),
            rows,
            scored(rows),
            False,
        )

    def made() -> tuple[str, Any, Tensor, Run, bool]:
        net = gx.conditioners.MADE(784, 1, hidden=(500,))
        return (
            "sample of MADE(500), 784 binary sites",
            gx.Autoregressive(net, gx.heads.Bernoulli(), (784,)),
            binary(data),
            drawn,
            True,
        )

    return {"maf64": lambda: maf(64, 5, 256), "iaf64": iaf, "maf784": lambda: maf(784, 3, 512), "made784": made}


if __name__ == "__main__":
    found = parser(__doc__, [table])
    found.set_defaults(threads=1, validate=True)
    found.add_argument("--seconds", type=float, default=60.0)
    found.add_argument("--data", type=Path)
    found.add_argument("--device", default="cpu")
    found.add_argument("--only", default="maf64,iaf64,maf784,made784")
    run(found, quick={"seconds": 2.0, "only": "maf64"})
