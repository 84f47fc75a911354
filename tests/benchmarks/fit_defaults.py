"""Default ``fit`` compared with the rule that was the default before, in the same time: test nats per row of several data sets.

    OMP_NUM_THREADS=1 python tests/benchmarks/fit_defaults.py --data DIR [--only nltcs,dna,...] [--uncapped]

Each row of the table trains the same module from the same weights twice. "Cosine" is Adam at 1e-3 with cosine annealing over
a fixed number of epochs, batches of 256 and patience 20; the epochs are those of fit_defaults_sets.py. "New" is what ``gx.fit`` does by
default, in the seconds that the cosine took, unless it stops before; with --uncapped it has 1000 epochs instead, and no limit of time.
Differences are new minus cosine, paired by test row, with 2 standard errors over rows (one seed: the variation between seeds is
not in them; how long the GRU over frames stays at the marginals of the keys varies most).

Seconds are of processor time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from fit_defaults_sets import SETS, Set
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_genexact as gx


class Trained(NamedTuple):
    epochs: float
    seconds: float


def cosine(module: nn.Module, s: Set, seconds: float) -> Trained:
    """The earlier default, all arguments written out."""
    start = time.process_time()
    result = gx.fit(
        module,
        *s.train,
        validation=tuple(s.valid),
        epochs=s.epochs,
        batch_size=256,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3),
        schedule=CosineAnnealingLR,
        patience=20,
        progress=False,
    )
    return Trained(len(result.train), time.process_time() - start)


def default(module: nn.Module, s: Set, seconds: float) -> Trained:
    start, limit = time.process_time(), {} if seconds == math.inf else {"seconds": seconds}
    result = gx.fit(module, *s.train, validation=tuple(s.valid), progress=False, **limit)
    return Trained(len(result.train), time.process_time() - start)


def trained(rule: Callable[[nn.Module, Set, float], Trained], s: Set, seconds: float) -> tuple[Trained, Tensor]:
    torch.manual_seed(0)
    module = s.model()
    torch.manual_seed(0)
    return rule(module, s, seconds), gx.diagnostics.held_out(module, *s.test).log_prob.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SETS))
    parser.add_argument("--uncapped", action="store_true", help="new has no limit of time")
    args = parser.parse_args()
    print(
        "| set | model | rows | cosine: epochs, s | nats | new: epochs, s | nats | difference (2 s.e.) |\n"
        + "|---" * 8
        + "|"
    )
    for name in args.only.split(","):
        s = SETS[name](args.data)
        old, before = trained(cosine, s, math.inf)
        new, after = trained(default, s, math.inf if args.uncapped else old.seconds)
        gain = after - before
        print(
            f"| {name} | {s.label} | {len(s.train.data)} | {old.epochs}, {old.seconds:.1f} | {before.mean():.3f} | "
            f"{new.epochs:.1f}, {new.seconds:.1f} | {after.mean():.3f} | "
            f"{gain.mean():+.3f} ± {2 * gain.std() / math.sqrt(len(gain)):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
