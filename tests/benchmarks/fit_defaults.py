"""Default ``fit`` compared with the rule that was the default before, in the same time: test nats per row of several data sets.

    OMP_NUM_THREADS=1 python tests/benchmarks/fit_defaults.py --data DIR [--only nltcs,dna,...] [--new default] [--uncapped]

Each row of the table trains the same module from the same weights twice. "Cosine" is Adam at 1e-3 with cosine annealing over
a fixed number of epochs, batches of 256 and patience 20; the epochs are those of fit_defaults_sets.py. "New" has the seconds
that the cosine took, unless it stops before; with --uncapped it has 1000 epochs instead, and no limit of time. Differences are new
minus cosine, paired by test row, with 2 standard errors over rows (one seed: the variation between seeds is not in them;
how long the GRU over frames stays at the marginals of the keys varies most).

* ``--new default``: what ``gx.fit`` does by default.
* ``--new candidate``: the rule below as a plain loop, which is what the constants were chosen with.

Seconds are of processor time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from fit_defaults_sets import SETS, Rows, Set
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_genexact as gx

LR, MAX_GRAD_NORM = 3e-3, 10.0
SMALLEST, LARGEST, BATCHES = 32, 256, 32  # rows in a batch; an epoch has at least this many batches if the rows allow
WARM, WARM_SHARE = 100, 0.1  # steps over which the rate rises; at most this share of the budget
COOL_SHARE = 0.3  # of the budget, at its end, over which the rate falls to 0 along a cosine
DROPS = (1.0, 0.1)  # of the rate, whenever validation is flat; after the last the fit ends
PATIENCE, PATIENCE_STEPS = 10, 200  # epochs, and steps, in which neither weights nor averages got better: flat
WINDOW = 100  # steps over which weights are averaged
LONGEST = 1000  # epochs


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


def call(module: nn.Module, rows: Rows) -> Tensor:
    context = rows.context
    keywords = context if isinstance(context, dict) else {}
    return module(*([context] if isinstance(context, Tensor) else []), **keywords).log_prob(rows.data)


def take(rows: Rows, index: Tensor) -> Rows:
    context = rows.context
    if isinstance(context, dict):
        return Rows(rows.data[index], {key: value[index] for key, value in context.items()})
    return Rows(rows.data[index], None if context is None else context[index])


@torch.no_grad()
def nats(module: nn.Module, rows: Rows) -> Tensor:
    module.eval()
    return torch.cat([call(module, take(rows, i)) for i in torch.arange(len(rows.data)).split(1024)]).double()


def factor(step: int, used: float, drops: int) -> float:
    """Of the rate, in a step before which ``used`` of the budget was spent."""
    rise = min(1.0, max((step + 1) / WARM, used / WARM_SHARE))
    left = min(1.0, max(0.0, 1 - used) / COOL_SHARE)
    return rise * DROPS[drops] * 0.5 * (1 - math.cos(math.pi * left))


def candidate(module: nn.Module, s: Set, seconds: float) -> Trained:
    """Warm-up, a constant rate that drops where validation is flat, cool-down at the end of the budget.

    Validation, after each epoch, is of the weights and of their average over the last steps. It is flat when neither got better
    than its own best, so that noise in one does not hide the progress of the other. The better of the two bests is kept, and
    the fit goes back to them when the rate drops.
    """
    start = time.process_time()
    parameters = list(module.parameters())
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(parameters, LR)
    batch_size = min(LARGEST, max(SMALLEST, len(s.train.data) // BATCHES))
    per_epoch = math.ceil(len(s.train.data) / batch_size)
    average = [p.detach().clone() for p in parameters]
    best = [(-math.inf, average)] * 2  # of averages, of weights
    step = drops = since = 0

    def used() -> float:
        return max(step / (LONGEST * per_epoch), (time.process_time() - start) / seconds)

    def load(values: list[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(parameters, values)

    while drops < len(DROPS) and used() < 1:
        module.train()
        for index in torch.randperm(len(s.train.data), generator=generator).split(batch_size):
            spent = used()
            if spent >= 1:
                break
            optimizer.param_groups[0]["lr"] = LR * factor(step, spent, drops)
            optimizer.zero_grad()
            (-call(module, take(s.train, index)).mean()).backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            step, since = step + 1, since + 1
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, max(1 / step, 1 / WINDOW))
        weights = [p.detach().clone() for p in parameters]
        for kind, values in enumerate((average, weights)):
            load(values)
            found = nats(module, s.valid).mean().item()
            if found > best[kind][0]:
                best[kind], since = (found, [x.clone() for x in values]), 0
        if since >= max(PATIENCE * per_epoch, PATIENCE_STEPS):
            drops, since = drops + 1, 0
            better = max(best, key=itemgetter(0))
            best = [better] * 2
            load(better[1])
            average = [x.clone() for x in better[1]]
    load(max(best, key=itemgetter(0))[1])
    return Trained(step / per_epoch, time.process_time() - start)


RULES: dict[str, Callable[[nn.Module, Set, float], Trained]] = {"candidate": candidate, "default": default}


def trained(rule: Callable[[nn.Module, Set, float], Trained], s: Set, seconds: float) -> tuple[Trained, Tensor]:
    torch.manual_seed(0)
    module = s.model()
    torch.manual_seed(0)
    return rule(module, s, seconds), nats(module, s.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SETS))
    parser.add_argument("--new", default="default", choices=RULES)
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
        new, after = trained(RULES[args.new], s, math.inf if args.uncapped else old.seconds)
        gain = after - before
        print(
            f"| {name} | {s.label} | {len(s.train.data)} | {old.epochs}, {old.seconds:.1f} | {before.mean():.3f} | "
            f"{new.epochs:.1f}, {new.seconds:.1f} | {after.mean():.3f} | "
            f"{gain.mean():+.3f} ± {2 * gain.std() / math.sqrt(len(gain)):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
