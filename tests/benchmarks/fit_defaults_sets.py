"""The data sets of fit_defaults.py, each with the model that a user would take first and rows to train, choose and test by.

The README.md beside each data set gives its format and split. A row is what ``fit`` calls one: a vector, a part of a piece of music
(at most 64 frames) or a window of 32 characters. Sets without a validation part of their own take it from the training part.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import torch
from published import floats, patches
from published_autoregressive import KEYS, pieces, rows_of
from torch import Tensor, nn

import pyro_genexact as gx

WINDOW = 32  # characters of a row of text


class Rows(NamedTuple):
    data: Tensor
    context: Tensor | dict[str, Tensor] | None = None


class Set(NamedTuple):
    """``model`` makes the module anew; ``epochs`` and ``batch_size`` as a user would set them who has a minute."""

    label: str
    model: Callable[[], nn.Module]
    train: Rows
    valid: Rows
    test: Rows
    epochs: int = 100
    batch_size: int = 256


def made(sites: int, head: gx.Head, hidden: tuple[int, ...] = (500,), **options: object) -> gx.Autoregressive:
    net = gx.conditioners.MADE(sites, head.num_params, hidden=hidden, **options)
    return gx.Autoregressive(net, head, (sites,))


def binary(folder: Path, name: str, epochs: int = 100) -> Set:
    train, valid, test = rows_of(folder, name)
    model = partial(made, train.shape[1], gx.heads.Bernoulli())
    return Set("MADE(500)", model, Rows(train), Rows(valid), Rows(test), epochs)


def wine(folder: Path, kind: str, rows: int = 1600) -> Set:
    file = np.load(folder / "uci_red_wine" / "red_wine.npz")
    train, valid, test = (file["x"][np.isin(file["fold"], part)] for part in (range(2, 10), [1], [0]))
    train = np.random.default_rng(0).permutation(train)
    loc, scale = train.mean(0), train.std(0)
    train, valid, test = (floats((part - loc) / scale) for part in (train[:rows], valid, test))
    mixture = gx.heads.Mixture(gx.heads.Laplace(), 10)
    models = {
        "maf": ("maf", partial(gx.flows.maf, 11)),
        "nsf": ("nsf", partial(gx.flows.nsf, 11)),
        "mixture": ("MADE(100), 10 Laplace", partial(made, 11, mixture, (100,))),
    }
    return Set(*models[kind], Rows(train), Rows(valid), Rows(test))


def natural_patches(folder: Path, epochs: int) -> Set:
    rng, folder = np.random.default_rng(0), folder / "bsds300_patches"
    train, test = floats(patches(folder, ["train_0"], rng)), floats(patches(folder, ["valid"], rng))
    train, valid = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))].tensor_split([-2000])
    model = partial(gx.flows.maf, 63, hidden=(256, 256), standardize=train)
    return Set("maf(256, 256)", model, Rows(train), Rows(valid), Rows(test), epochs)


def music(folder: Path, epochs: int) -> Set:
    def rows(part: str) -> Rows:
        frames, lengths = pieces(folder, part, 64)
        return Rows(frames[:, : int(lengths.max())], {"lengths": lengths})

    train, valid, test = rows("train"), rows("valid"), rows("test")
    head = gx.heads.Bernoulli((KEYS,))
    longest = max(part.data.shape[1] for part in (train, valid, test))
    train, valid, test = (
        Rows(nn.functional.pad(part.data, (0, 0, 0, longest - part.data.shape[1])), part.context)
        for part in (train, valid, test)
    )

    def model() -> nn.Module:
        net = gx.conditioners.Recurrent((KEYS,), head.num_params, hidden=200)
        return gx.Autoregressive(net, head, (longest, KEYS))

    return Set("GRU(200)", model, train, valid, test, epochs)


def text(folder: Path, epochs: int, kind: str = "GRU(128)") -> Set:
    written = (folder / "tinyshakespeare" / "input.txt").read_text()
    kinds = {c: i for i, c in enumerate(sorted(set(written)))}
    codes = torch.tensor([kinds[c] for c in written])
    cuts = [int(0.9 * len(codes)), int(0.95 * len(codes))]
    train, valid, test = (part[: len(part) // WINDOW * WINDOW].reshape(-1, WINDOW) for part in codes.tensor_split(cuts))
    size = len(kinds)

    def model() -> nn.Module:
        if kind == "GRU(128)":
            net = gx.conditioners.Recurrent(size, size, hidden=128)
        else:
            net = gx.conditioners.Transformer(size, size, width=64, depth=2, num_heads=4)
        return gx.Autoregressive(net, gx.heads.Categorical(size), (WINDOW,))

    return Set(kind, model, Rows(train), Rows(valid), Rows(test), epochs)


def bank(folder: Path, epochs: int) -> Set:
    """Reals are whole numbers: uniform noise gives them a density; then logarithms and standard units."""
    with gzip.open(folder / "tables" / "bank_marketing.csv.gz") as file:
        table = pandas.read_csv(file)
    rng, columns, heads, sites = np.random.default_rng(0), [], [], []
    for name in table.columns:
        x = table[name]
        if name in ("age", "balance", "duration"):
            x = np.arcsinh((x + rng.random(len(x))) / 10)
            columns.append((x - x.mean()) / x.std())
            heads.append(gx.heads.Mixture(gx.heads.Normal(), 3))
            sites.append(())
        elif name in ("campaign", "previous"):
            columns.append(x.clip(upper=60))
            heads.append(gx.heads.Mixture(gx.heads.NegativeBinomial(), 3))
            sites.append(())
        else:
            codes = (x >= 0).astype(int) if name == "pdays" else x.astype("category").cat.codes
            columns.append(codes)
            heads.append(gx.heads.Categorical(int(codes.max()) + 1))
            sites.append(int(codes.max()) + 1)
    y = floats(np.stack([np.asarray(c, float) for c in columns], 1))
    part = torch.arange(len(y)) % 10
    model = partial(made, y.shape[1], gx.heads.PerSite(heads), (128, 128), site=sites)
    return Set("MADE(128, 128), mixed", model, Rows(y[part < 8]), Rows(y[part == 8]), Rows(y[part == 9]), epochs)


def two_moons(_: Path, epochs: int, rows: int = 10_000) -> Set:
    """Posterior of the simulator's parameters: rows (2,) given data (2,)."""
    generator = torch.Generator().manual_seed(0)

    def simulate(n: int) -> Rows:
        theta = 2 * torch.rand(n, 2, generator=generator) - 1
        a = math.pi * (torch.rand(n, generator=generator) - 0.5)
        r = 0.1 + 0.01 * torch.randn(n, generator=generator)
        x = torch.stack(
            [r * a.cos() + 0.25 - theta.sum(1).abs() / 2**0.5, r * a.sin() + theta.diff(dim=1)[:, 0] / 2**0.5], 1
        )
        return Rows(theta, x)

    train, valid, test = simulate(rows), simulate(rows // 10), simulate(10_000)
    return Set("nsf(2, context=2)", partial(gx.flows.nsf, 2, context=2), train, valid, test, epochs)


SETS: dict[str, Callable[[Path], Set]] = {
    "nltcs": partial(binary, name="nltcs"),
    "mushrooms": partial(binary, name="mushrooms"),
    "plants": partial(binary, name="plants"),
    "dna": partial(binary, name="dna"),
    "mnist": partial(binary, name="mnist", epochs=8),
    "wine": partial(wine, kind="maf"),
    "wine_mixture": partial(wine, kind="mixture"),
    "patches": partial(natural_patches, epochs=12),
    "music": partial(music, epochs=60),
    "text": partial(text, epochs=4),
    "bank": partial(bank, epochs=20),
    "two_moons": partial(two_moons, epochs=60),
}
