"""Training in bfloat16 autocast against training in float32: validation nats per dimension.

    OMP_NUM_THREADS=1 python tests/benchmarks/precision.py [--steps 2000] [--only maf,nsf,transformer] [--device cpu] [--markdown]

``gx.fit`` with the same seed, rows and batches of 128, Adam at 0.002 along a cosine, with Fabrics of precision ``32-true`` and
``bf16-mixed``. A step that is not finite would raise. Validation is the negative log-density in nats per dimension of 5 000 rows: of the
float32 model, of the one trained under autocast, evaluated under autocast, and of the same weights evaluated in float32.

* maf, nsf: 20 000 rows of 8 features, each a bend of the one before it, with a scale that the one before that sets.
* transformer: 5 000 strings of 16 symbols out of 8 from a random chain of order 2.

Measured on one core that was shared, torch 2.13, after 2000 steps (seconds in float32, bf16):

    maf          0.7167, under autocast 0.7152 (-0.0014), its weights in float32 0.7152 (-0.0014); 18, 27 s
    nsf          0.6873, under autocast 0.6876 (+0.0004), its weights in float32 0.6876 (+0.0004); 48, 57 s
    transformer  1.2639, under autocast 1.2639 (-0.0000), its weights in float32 1.2639 (-0.0000); 93, 106 s
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from timing import show
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


def trained(make: Callable[[], nn.Module], train: Tensor, steps: int, precision: str) -> tuple[nn.Module, float]:
    """The model and seconds; a step that is not finite raises."""
    torch.manual_seed(0)
    model = make().to(train.device)
    fabric = Fabric(accelerator=train.device.type, devices=1, precision=precision)
    epochs = round(steps * BATCH / len(train))
    result = gx.fit(model, train, epochs=epochs, batch_size=BATCH, lr=0.002, fabric=fabric, progress=False)
    return model, result.seconds


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
        single, seconds = trained(make, train, options.steps, "32-true")
        half, seconds_half = trained(make, train, options.steps, "bf16-mixed")
        with torch.no_grad():
            known, of_weights = (float(loss_of(model, held_out)) for model in (single, half))
            with autocast(options.device):
                found = float(loss_of(half, held_out))
        figures = [
            f"{known:.4f}",
            f"{found:.4f} ({found - known:+.4f})",
            f"{of_weights:.4f} ({of_weights - known:+.4f})",
        ]
        table.append([name, *figures, f"{seconds:.0f}, {seconds_half:.0f}"])
    title = f"nats per dimension after {options.steps} steps"
    names = ["float32", "bf16", "bf16, evaluated in float32", "seconds"]
    show([title, *names], table, options.markdown)


if __name__ == "__main__":
    main()
