"""What a direct link from the sites to the outputs of a MADE gains, in validation nats and in time of a training step.

    OMP_NUM_THREADS=1 python tests/benchmarks/direct.py --data DIR [--only nltcs,plants,...] [--seeds 3]

DIR holds a folder per data set, as for published_autoregressive.py. Each pair of models has the same data, seed, hidden
layers and optimiser. The figure is the best validation nats per row with the link, less that without; its standard
error is over seeds (over folds of wine). "step" is the time of training with the link over that without.

* nltcs, plants, mushrooms, dna, mnist (10 000 rows): MADE with a Bernoulli head.
* wine: MADE with ten Laplace components per feature; wine_maf: maf of three transforms.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from published import floats
from published_autoregressive import rows_of
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_genexact as gx


class Setting(NamedTuple):
    hidden: tuple[int, ...]
    epochs: int
    lr: float
    batch_size: int = 100


SETTINGS = {
    "nltcs": Setting((200,), 25, 2e-3),
    "plants": Setting((500,), 12, 2e-3),
    "mushrooms": Setting((500,), 80, 2e-3, 20),
    "dna": Setting((500,), 40, 1e-3, 50),
    "mnist": Setting((500,), 8, 2e-3),
    "wine": Setting((100,), 60, 5e-3, 128),
    "wine_maf": Setting((64, 64), 60, 2e-3, 128),
}


def parts(name: str, data: Path, seeds: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Seeds, rows to train on and rows to validate on."""
    if name.startswith("wine"):
        file = np.load(data / "uci_red_wine" / "red_wine.npz")
        for k in range(seeds):
            train, valid = file["x"][file["fold"] != k], file["x"][file["fold"] == k]
            loc, scale = train.mean(0), train.std(0)
            yield k, floats((train - loc) / scale), floats((valid - loc) / scale)
    else:
        train, valid, _ = rows_of(data, name)
        for k in range(seeds):
            yield k, train[:10_000] if name == "mnist" else train, valid


def model(name: str, sites: int, hidden: tuple[int, ...], direct: bool) -> gx.DistributionModule:
    if name == "wine_maf":

        def net(num_params: int, context: int) -> gx.Conditioner:
            return gx.conditioners.MADE(sites, num_params, context=context, hidden=hidden, direct=direct)

        return gx.flows.maf(sites, conditioner=net)
    head = gx.heads.Mixture(gx.heads.Laplace(), 10) if name == "wine" else gx.heads.Bernoulli()
    made = gx.conditioners.MADE(sites, head.num_params, hidden=hidden, direct=direct)
    return gx.Autoregressive(made, head, (sites,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print("| data | without | with | difference | step |\n|---|---|---|---|---|")
    for name in args.only.split(","):
        setting, nats, seconds = SETTINGS[name], [], []
        for seed, train, valid in parts(name, args.data, args.seeds):
            for direct in (False, True):
                torch.manual_seed(seed)
                result = gx.fit(
                    model(name, train.shape[1], setting.hidden, direct),
                    train,
                    validation=valid,
                    epochs=setting.epochs,
                    batch_size=setting.batch_size,
                    optimizer=partial(torch.optim.AdamW, lr=setting.lr),
                    seed=seed,
                    progress=False,
                    schedule=CosineAnnealingLR,
                )
                nats.append(max(result.validation))
                seconds.append(result.seconds / len(result.train))
        without, with_link = np.array(nats[::2]), np.array(nats[1::2])
        error = (with_link - without).std(ddof=1) / math.sqrt(args.seeds)
        ratio = np.median(np.array(seconds[1::2]) / np.array(seconds[::2]))
        difference = f"{(with_link - without).mean():+.3f} ± {error:.3f}"
        print(f"| {name} | {without.mean():.3f} | {with_link.mean():.3f} | {difference} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
