"""Tiny Shakespeare, character by character, in the CPU setting of nanoGPT, compared with its published figure.

    OMP_NUM_THREADS=2 python tests/benchmarks/published_sequences.py --data DIR [--only transformer,mamba,...]
        [--steps 2000] [--progress] [--speed]

DIR holds tinyshakespeare/input.txt; the README.md beside it tells split and published figures: 1.88 nats a character on the
validation part, the last tenth, for 4 layers, 4 heads, width 128, contexts of 64, 2000 steps of batches of 12, no dropout.

Rows are random windows of 65 characters, whose first one is only read where nats are counted. Adam with weight decay 0.1, rate 1e-3
after 100 steps of warm-up, cosine decay to 1e-4, gradients cut to norm 1, as there. Validation nats are those of the 64 last
characters of each of the windows that cover the validation part, with two standard errors over windows. As a check of the data,
add-one unigram and bigram nats (3.347 and 2.482 by the README). With --speed, only the times of a training step are compared: the
networks take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measurements import summary
from timing import interleaved
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import pyro_genexact as gx
from pyro_genexact import conditioners as c

WINDOW, BATCH = 64, 12


def characters(folder: Path) -> tuple[Tensor, Tensor, int]:
    """Training and validation part as integers, and how many characters there are."""
    text = (folder / "tinyshakespeare" / "input.txt").read_text()
    kinds = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([kinds[c] for c in text])
    cut = int(0.9 * len(codes))
    return codes[:cut], codes[cut:], len(kinds)


def counted(train: Tensor, test: Tensor, kinds: int) -> tuple[float, float]:
    """Nats a character of add-one unigrams and bigrams."""
    unigram = (train.bincount(minlength=kinds).double() + 1).log().log_softmax(0)
    bigram = (train[:-1] * kinds + train[1:]).bincount(minlength=kinds**2).double().reshape(kinds, kinds) + 1
    bigram = bigram.log().log_softmax(1)
    return -unigram[test].mean().item(), -bigram[test[:-1], test[1:]].mean().item()


def windows(codes: Tensor, starts: Tensor) -> Tensor:
    return codes[starts.unsqueeze(1) + torch.arange(WINDOW + 1)]


def schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    def rate(step: int) -> float:
        if step < 100:
            return (step + 1) / 101
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 100) / max(steps - 100, 1)))

    return LambdaLR(optimizer, rate)


@torch.no_grad()
def nats(model: gx.Autoregressive, codes: Tensor) -> Tensor:
    """Minus log_prob of the windows that cover the codes, a character."""
    rows = windows(codes, torch.arange(0, len(codes) - WINDOW, WINDOW))
    each = [model().conditional_on_prefix(part[:, :1]).log_prob(part[:, 1:]) for part in rows.split(256)]
    return -torch.cat(each) / WINDOW


NETWORKS: dict[str, Callable[[int], gx.Conditioner]] = {
    "transformer": lambda V: c.Transformer(V, V, width=128, depth=4, num_heads=4),
    "mamba": lambda V: c.StateSpace(V, V, kind="selective", width=128, depth=6, state=32),
    "s4d": lambda V: c.StateSpace(V, V, kind="diagonal", width=128, depth=6, state=32),
    "conv": lambda V: c.CausalConv(V, V, width=128, kernel=3, dilations=(1, 2, 4, 8, 16, 1, 2, 4)),
    "gru": lambda V: c.Recurrent(V, V, hidden=256, layers=2),
}


def tinyshakespeare(folder: Path, name: str = "transformer", steps: int = 2000, progress: bool = False) -> None:
    train, test, kinds = characters(folder)
    torch.manual_seed(0)
    net = NETWORKS[name](kinds)
    model = gx.Autoregressive(net, gx.heads.Categorical(kinds), (WINDOW + 1,))
    rows = windows(train, torch.randint(len(train) - WINDOW, (steps * BATCH,)))
    optimizer = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    settings = {"epochs": 1, "batch_size": BATCH, "optimizer": optimizer, "schedule": schedule, "max_grad_norm": 1.0}
    result = gx.fit(model, rows, progress=progress, **settings)
    found = nats(model.eval(), test)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    error = 2 * found.std() / len(found) ** 0.5
    print(
        f"tinyshakespeare: {name} of {size:.2f} M parameters {found.mean():.3f} ± {error:.3f} nats a character, "
        f"{result.seconds:.0f} s",
        flush=True,
    )


def speed(folder: Path, names: list[str], repeats: int = 20) -> None:
    train, _, kinds = characters(folder)
    rows = windows(train, torch.arange(BATCH) * 1000)
    models = {
        name: gx.Autoregressive(NETWORKS[name](kinds), gx.heads.Categorical(kinds), (WINDOW + 1,)) for name in names
    }

    def step(model: gx.Autoregressive, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (-model().log_prob(rows).mean()).backward()
        optimizer.step()

    calls = {
        name: partial(step, model, torch.optim.AdamW(model.parameters(), fused=True)) for name, model in models.items()
    }
    found = {name: summary(times, 1e3)[0] for name, times in interleaved(calls, repeats).items()}
    for name, each in found.items():
        size = sum(p.numel() for p in models[name].parameters()) / 1e6
        print(f"{name}, {size:.2f} M parameters: {each:.1f} ms a step, {each / found[names[0]]:.2f} times {names[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    if args.speed:
        return speed(args.data, args.only.split(","))
    train, test, kinds = characters(args.data)
    print("add-one unigram {:.3f}, bigram {:.3f} nats a character".format(*counted(train, test, kinds)), flush=True)
    for name in args.only.split(","):
        tinyshakespeare(args.data, name, args.steps, args.progress)


if __name__ == "__main__":
    main()
