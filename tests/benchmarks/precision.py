"""Training in bfloat16 autocast against training in float32: validation, and steps that were not finite.

    OMP_NUM_THREADS=1 python tests/benchmarks/precision.py [--steps 2000] [--only maf,nsf,transformer] [--device cpu] [--markdown]

The same seed, rows and batches of 128, Adam at 0.002, once in float32 and once with the loss under ``torch.autocast``, as Fabric's
``bf16-mixed`` has it. A step counts as not finite where the loss or a gradient is not. Validation is the negative log-density in nats
per dimension of 5 000 rows: of the float32 model, of the one trained under autocast, evaluated under autocast, and of the same weights
evaluated in float32.

* maf, nsf: 20 000 rows of 8 features, each a bend of the one before it, with a scale that the one before that sets.
* transformer: 5 000 strings of 16 symbols out of 8 from a random chain of order 2.

Measured on one core, torch 2.13, after 2000 steps (seconds in float32, bf16):

    maf          0.7078, under autocast 0.7066 (-0.0012), its weights in float32 0.7068 (-0.0010); no step not finite; 11, 8 s
    nsf          0.6967, under autocast 0.6992 (+0.0025), its weights in float32 0.6992 (+0.0025); no step not finite; 14, 20 s
    transformer  1.2769, under autocast 1.2768 (-0.0002), its weights in float32 1.2767 (-0.0002); no step not finite; 39, 51 s
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from speed import show
from torch import Tensor, nn

import pyro_genexact as gx

VALIDATION, BATCH = 5000, 128


def rows(count: int, features: int = 8) -> Tensor:
    columns = [torch.randn(count), torch.randn(count)]
    while len(columns) < features:
        scale = torch.exp(columns[-2].clamp(-2, 2) / 2 - 1)
        columns.append(torch.sin(2 * columns[-1]) + scale * torch.randn(count))
    return torch.stack(columns, 1)


def strings(count: int, length: int = 16, symbols: int = 8) -> Tensor:
    table = (2 * torch.randn(symbols, symbols, symbols)).softmax(-1)
    drawn = list(torch.randint(symbols, (2, count)))
    while len(drawn) < length:
        drawn.append(table[drawn[-2], drawn[-1]].multinomial(1).squeeze(1))
    return torch.stack(drawn, 1)


def transformer() -> nn.Module:
    head = gx.heads.Categorical(8)
    net = gx.conditioners.Transformer(8, head.num_params, width=32, num_heads=2, depth=2)
    return gx.Autoregressive(net, head, (16,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "maf": (lambda: gx.flows.maf(8, transforms=3, hidden=(64, 64)), lambda: rows(20_000 + VALIDATION)),
    "nsf": (lambda: gx.flows.nsf(8, transforms=3, hidden=(64, 64)), lambda: rows(20_000 + VALIDATION)),
    "transformer": (transformer, lambda: strings(5000 + VALIDATION)),
}


def autocast(device: str) -> Any:
    return torch.autocast(device, torch.bfloat16)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return -model().log_prob(batch).mean() / batch.shape[1]


def trained(
    make: Callable[[], nn.Module], train: Tensor, steps: int, region: Callable[[], Any]
) -> tuple[nn.Module, int, float]:
    """The model, how many steps were not finite, and seconds."""
    torch.manual_seed(0)
    model, bad, begun = make().to(train.device), 0, time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (BATCH,)).to(train.device)]
        optimizer.zero_grad()
        with region():
            loss = loss_of(model, batch)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        bad += not all(bool(value.isfinite().all()) for value in (loss, *grads))
        optimizer.step()
    return model, bad, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for name in options.only.split(","):
        make, data = MODELS[name]
        torch.manual_seed(1)
        values = data().to(options.device)
        train, held_out = values[:-VALIDATION], values[-VALIDATION:]
        single, bad_single, seconds = trained(make, train, options.steps, nullcontext)
        half, bad_half, seconds_half = trained(make, train, options.steps, lambda: autocast(options.device))
        with torch.no_grad():
            known, of_weights = (float(loss_of(model, held_out)) for model in (single, half))
            with autocast(options.device):
                found = float(loss_of(half, held_out))
        figures = [
            f"{known:.4f}",
            f"{found:.4f} ({found - known:+.4f})",
            f"{of_weights:.4f} ({of_weights - known:+.4f})",
        ]
        table.append([name, *figures, f"{bad_single}, {bad_half}", f"{seconds:.0f}, {seconds_half:.0f}"])
    title = f"nats per dimension after {options.steps} steps"
    names = ["float32", "bf16", "bf16, evaluated in float32", "steps not finite", "seconds"]
    show([title, *names], table, options.markdown)


if __name__ == "__main__":
    main()
