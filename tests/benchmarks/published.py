"""Test log-likelihoods (nats a row) of flows on data sets with published figures.

    python tests/benchmarks/published.py --data DIR [--only bsds300,red_wine,digits,conll2000,tinyshakespeare] [--recipe naf] [--minutes 9]

DIR holds bsds300_patches/, uci_red_wine/, conll2000/ and tinyshakespeare/; the README.md of each tells format, recipe, published figures.

* bsds300: 8x8 image patches, 63 features; one model trained for about --minutes; nats of the validation part
  with two standard errors. The dequantising noise is drawn once, from a fixed seed. The validation part takes
  no part in training or in choosing weights: rows of the training part do that.
* red_wine: 11 features, ten-fold cross-validation. Each fold is normalised by its training part, of which a
  tenth is held out for early stopping. Beside one flow stands the equal mixture of SEEDS flows that differ in seed
  and held-out rows, as in Uria et al. 2014 (EoRNADE): again an exact density.

* digits: the data and the settings of examples/density_estimation.py (scikit-learn's, no DIR needed), with another recipe;
  bits per dimension of the test rows.

* conll2000: a linear-chain CRF of text chunks, published_crf.py.
* tinyshakespeare: a Transformer of characters, published_sequences.py.

A full-covariance Gaussian, in closed form, stands beside each density: it shows that the data is made as published.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import published_crf
import published_sequences
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_genexact as gx

Array = NDArray[np.float64]
HELD_OUT = 5000  # rows of bsds300's training part that choose the epoch
BATCH_SIZE = 512
SEEDS = 4
TARGETS = {"bsds300": 154.0, "red_wine": -9.3}
SIZES = {  # transforms and hidden widths of each recipe
    "bsds300": {
        "maf": (5, (256, 256)),
        "naf": (3, (256, 256)),
        "nsf": (3, (256, 256)),
        "coupling_nsf": (8, (256, 256)),
    },
    "digits": {"maf": (5, (256,)), "naf": (2, (256,)), "nsf": (2, (256,))},
    "red_wine": {"maf": (3, (64, 64)), "naf": (3, (64, 64)), "nsf": (2, (64, 64))},
}
GAUSSIANS = {"bsds300": 101.03, "red_wine": -13.19}


def gaussian_log_prob(train: Array, test: Array) -> Array:
    """Of each test row, under the maximum likelihood Gaussian of the training rows."""
    loc, factor = train.mean(0), np.linalg.cholesky(np.cov(train.T, bias=True))
    z = np.linalg.solve(factor, (test - loc).T)
    return np.asarray(-0.5 * (z**2).sum(0) - np.log(np.diag(factor)).sum() - 0.5 * len(loc) * math.log(2 * math.pi))


@torch.no_grad()
def log_prob(flow: torch.nn.Module, rows: Tensor) -> Array:
    flow.eval()
    return torch.cat([flow().log_prob(part) for part in rows.split(2048)]).double().numpy()


def figure(values: Array) -> str:
    return f"{values.mean():.2f} +- {2 * values.std() / math.sqrt(len(values)):.2f} (2 s.e.)"


def floats(rows: Array) -> Tensor:
    return torch.from_numpy(rows).float()


def patches(folder: Path, names: list[str], rng: np.random.Generator) -> Array:
    """Raw bytes to 63 features: add U(0, 1), divide by 256, centre each patch, drop its last pixel."""
    raw = np.concatenate([np.load(folder / f"{name}.npz")["patches"] for name in names])
    x = (raw + rng.random(raw.shape)) / 256
    return np.asarray((x - x.mean(1, keepdims=True))[:, :-1])


def epochs_within(seconds: float, flow: torch.nn.Module, train: Tensor) -> int:
    """How many epochs fit, judged by some steps that leave the flow's weights alone."""
    batch, steps = train[:BATCH_SIZE], 30
    for step in range(steps + 5):
        if step == 5:
            start = time.perf_counter()
        torch.autograd.grad(-flow().log_prob(batch).mean(), [p for p in flow.parameters() if p.requires_grad])
    step_seconds = 1.25 * (time.perf_counter() - start) / steps  # a quarter for the optimiser and the rest
    return max(1, int(seconds / (step_seconds * math.ceil(len(train) / BATCH_SIZE))))


def bsds300(data: Path, recipe: str, minutes: float, progress: bool) -> None:
    rng, folder = np.random.default_rng(0), data / "bsds300_patches"
    train = patches(folder, [f"train_{i}" for i in range(5)], rng)
    valid = patches(folder, ["valid"], rng)
    print(
        f"bsds300: Gaussian {figure(gaussian_log_prob(train, valid))}, known {GAUSSIANS['bsds300']}",
        flush=True,
    )
    shuffled = floats(train[rng.permutation(len(train))])
    rows, held_out = shuffled[HELD_OUT:], shuffled[:HELD_OUT]
    torch.manual_seed(0)
    transforms, hidden = SIZES["bsds300"][recipe]
    flow = getattr(gx.flows, recipe)(63, transforms=transforms, hidden=hidden, standardize=rows)
    epochs = epochs_within(60 * minutes, flow, rows)
    result = gx.fit(
        flow,
        rows,
        validation=held_out,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        lr=1e-3,
        progress=progress,
        schedule=CosineAnnealingLR,
    )
    print(
        f"bsds300: {recipe}({transforms}) {figure(log_prob(flow, floats(valid)))}, target {TARGETS['bsds300']}; "
        f"held-out rows of train {result.validation[result.best_epoch]:.2f}, "
        f"best epoch {result.best_epoch + 1} of {epochs}, {result.seconds:.0f} s",
        flush=True,
    )


def red_wine(data: Path, recipe: str, progress: bool) -> None:
    file = np.load(data / "uci_red_wine" / "red_wine.npz")
    transforms, hidden = SIZES["red_wine"][recipe]
    results = []
    for k in range(10):
        train, test = file["x"][file["fold"] != k], file["x"][file["fold"] == k]
        loc, scale = train.mean(0), train.std(0)
        train, test = (train - loc) / scale, (test - loc) / scale
        parts, start = [], time.perf_counter()
        for seed in range(SEEDS * k, SEEDS * (k + 1)):
            torch.manual_seed(seed)
            flow = getattr(gx.flows, recipe)(11, transforms=transforms, hidden=hidden, activation=torch.tanh)
            gx.fit(
                flow,
                floats(train),
                validation=0.1,
                epochs=150,
                batch_size=128,
                patience=30,
                optimizer=partial(torch.optim.Adam, lr=2e-3, weight_decay=1e-4),
                seed=seed,
                progress=progress,
                schedule=CosineAnnealingLR,
            )
            parts.append(log_prob(flow, floats(test)))
        mixture = np.logaddexp.reduce(parts) - math.log(SEEDS)
        results.append((np.mean(parts), mixture.mean(), gaussian_log_prob(train, test).mean()))
        one, several, gaussian = results[-1]
        print(
            f"red_wine, fold {k}: {recipe}({transforms}) {one:.2f} (mean of {SEEDS} seeds), their mixture {several:.2f}, "
            f"Gaussian {gaussian:.2f}, {(time.perf_counter() - start) / SEEDS:.0f} s a flow",
            flush=True,
        )
    (one, several, gaussian), errors = np.mean(results, 0), 2 * np.std(results, 0, ddof=1) / math.sqrt(len(results))
    print(
        f"red_wine: {recipe}({transforms}) {one:.2f} +- {errors[0]:.2f} (2 s.e. over folds), mixture of {SEEDS} "
        f"{several:.2f} +- {errors[1]:.2f}, target {TARGETS['red_wine']}; Gaussian {gaussian:.2f}, known {GAUSSIANS['red_wine']}"
    )


def digits(recipe: str, progress: bool) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import density_estimation as example

    train, validation, test = example.digits(copies=20)
    transforms, hidden = SIZES["digits"][recipe]
    torch.manual_seed(0)
    flow = getattr(gx.flows, recipe)(
        example.D, transforms=transforms, hidden=hidden, support=constraints.unit_interval, standardize=train
    )
    optimizer = partial(torch.optim.AdamW, lr=2e-3, weight_decay=1.0)
    settings = {"epochs": 5, "batch_size": 256, "patience": 3, "optimizer": optimizer}
    result = gx.fit(flow, train, validation=validation, progress=progress, **settings, schedule=CosineAnnealingLR)
    nats = log_prob(flow, test)
    bits = math.log2(example.LEVELS) - nats.mean() / (example.D * math.log(2))
    print(
        f"digits: {recipe}({transforms}) {figure(nats)}, {bits:.3f} bits a dimension, {result.seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="bsds300,red_wine,digits,conll2000,tinyshakespeare")
    parser.add_argument("--recipe", default="naf", choices=SIZES["bsds300"])
    parser.add_argument("--minutes", type=float, default=9.0, help="wall-clock aim of bsds300's training")
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    if "digits" in args.only.split(","):
        digits(args.recipe, args.progress)
    if "bsds300" in args.only.split(","):
        bsds300(args.data, args.recipe, args.minutes, args.progress)
    if "red_wine" in args.only.split(","):
        red_wine(args.data, args.recipe, args.progress)
    if "conll2000" in args.only.split(","):
        published_crf.conll2000(args.data, args.progress)
    if "tinyshakespeare" in args.only.split(","):
        published_sequences.tinyshakespeare(args.data, progress=args.progress)


if __name__ == "__main__":
    main()
