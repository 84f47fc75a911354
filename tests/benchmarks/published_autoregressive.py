"""Test log-likelihoods of autoregressive models (MADE, NADE, GRU) on data sets with published figures.

    python tests/benchmarks/published_autoregressive.py --data DIR [--only nltcs,mushrooms,...] [--progress]

DIR holds a folder a data set; the README.md of each tells format, split and published figures. Figures are nats a row
with two standard errors; of MNIST and JSB chorales negative, nats an image and a frame, as they are published.

* nltcs, mushrooms, plants: MADE, stopped early on the valid part. dna: MADE trained under 1000 orders, a mixture over 16
  of them (an order ensemble); its number of epochs was chosen on the valid part.
* mnist: binarised; MADE. The valid part only reports: rows of the training part choose the epoch.
* mnist_rows: the same data; a GRU over rows with a MADE within a row, a model of the transposed images of the same
  form, and the equal mixture of both. Matrices are multiplied in bfloat16 in training, and in float32 for the figures.
* mnist_pixelcnn: the same images and parts; a PixelCNN. With mnist_rows, the equal mixture of all three models follows.
  Both print the nats of the rows that choose the epoch against minutes.
* jsb, jsb_nade: a GRU over frames of 88 keys, independent given the past, or with a NADE over the keys of a frame.
  jsb_mamba, jsb_transposed: a selective state space model in place of the GRU; in the latter, each piece is transposed
  at random in training. The figure is over frames 2 ... T of whole pieces (the protocol of the TCN paper), with standard
  errors over pieces. Training and valid pieces are cut into parts of at most 64 frames; no validation or test piece is
  transposed.
* wine: red wine, MADE with a mixture of Laplace distributions a feature (as RNADE), mean over ten folds; each fold is
  normalised by its training part, of which a tenth is held out for early stopping.

All settings were chosen on valid parts (mnist, wine: on held-out rows of the training part). While those of nltcs, plants,
mushrooms and dna were compared, test figures stood beside the valid ones; the choice follows the valid ranking.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from published import figure, floats, log_prob
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.data import Dataset

import pyro_genexact as gx

HELD_OUT = 2000  # rows of MNIST's training part that choose the epoch
KEYS = 88


class Binary(NamedTuple):
    """How to train a MADE of binary rows; with ``orders``, under that many."""

    hidden: int
    lr: float
    epochs: int
    batch_size: int = 100
    activation: Callable[[Tensor], Tensor] = torch.relu
    direct: bool = True
    weight_decay: float = 0.0
    orders: int = 0


BINARY = {
    "nltcs": Binary(200, lr=2e-3, epochs=60, direct=False),
    "mushrooms": Binary(500, lr=3e-3, epochs=150, batch_size=20, activation=torch.tanh, weight_decay=0.1),
    "plants": Binary(500, lr=2e-3, epochs=40),
    "dna": Binary(500, lr=2e-3, epochs=600, batch_size=50, weight_decay=0.1, orders=1000),
    "mnist": Binary(1000, lr=2e-3, epochs=12),
}


class Pixels(NamedTuple):
    """How to train a PixelCNN of binary images."""

    width: int
    depth: int
    lr: float
    batch_size: int
    epochs: int


PIXELS = Pixels(width=32, depth=7, lr=2e-3, batch_size=16, epochs=6)
# figure aimed at, then published ones
KNOWN = {
    "nltcs": (-6.02, "ID-SPN -6.02, EiNet -6.02, probabilistic circuit -6.00"),
    "mushrooms": (-9.75, "MADE -9.68, EoNADE -9.69, NADE -9.81, DARN -9.55"),
    "plants": (-12.9, "ID-SPN -12.54, probabilistic circuit -12.68, EiNet -13.68"),
    "dna": (-84.5, "MADE -83.63, with mask sampling -79.66, EoNADE -82.31, NADE -84.81"),
    "mnist": (92.0, "MADE 88.40 (test, Larochelle's draw), NADE 88.33"),
    "mnist_rows": (80.5, "PixelCNN 81.30, Row LSTM 80.54, diagonal BiLSTM 79.20 (test, Larochelle's draw)"),
    "mnist_pixelcnn": (85.0, "PixelCNN 81.30, Row LSTM 80.54, Diagonal BiLSTM 79.20 (test, another draw)"),
    "jsb": (8.8, "GRU 8.43, LSTM 8.45, RNN 8.91, TCN 8.10"),
    "jsb_nade": (7.2, "RNN-NADE 5.83, with Hessian-free training 5.56, RNN-RBM 7.27"),
    "jsb_mamba": (6.4, "RNN-NADE 5.83, with Hessian-free training 5.56, RNN-RBM 7.27"),
    "jsb_transposed": (6.0, "RNN-NADE 5.83, with Hessian-free training 5.56, RNN-RBM 7.27"),
    "wine": (-9.6, "RNADE-MoG -9.36, RNADE-MoL -9.46, MFA -10.19, EoRNADE ensemble -8.76"),
}


def report(name: str, model: str, value: str, seconds: float, result: gx.FitResult | None = None) -> None:
    target, published = KNOWN[name]
    epochs = "" if result is None else f"epoch {result.best_epoch + 1} of {len(result.train)}, "
    print(
        f"{name}: {model} {value}, target {target}; published: {published}; {epochs}{seconds:.0f} s",
        flush=True,
    )


def rows_of(data: Path, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to train on, to choose by, and to report on."""
    if not name.startswith("mnist"):
        file = np.load(data / name / f"{name}.npz")
        return floats(file["train"]), floats(file["valid"]), floats(file["test"])
    file = np.load(data / "binarized_mnist" / "binarized_mnist_train_valid.npz")
    train, valid = (floats(np.unpackbits(file[part], axis=1)) for part in ("train", "valid"))
    return train[HELD_OUT:], train[:HELD_OUT], valid


def binary(name: str, data: Path, progress: bool) -> None:
    start, settings = time.perf_counter(), BINARY[name]
    train, valid, test = rows_of(data, name)
    sites, head = train.shape[1], gx.heads.Bernoulli()
    torch.manual_seed(0)
    net = gx.conditioners.MADE(
        sites,
        head.num_params,
        hidden=(settings.hidden,),
        activation=settings.activation,
        direct=settings.direct,
    )
    made = gx.Autoregressive(net, head, (sites,))
    many = gx.OrderEnsemble(made, settings.orders) if settings.orders else made
    few = gx.OrderEnsemble(made, many.orders[:16]) if settings.orders else made
    result = gx.fit(
        many,
        train,
        validation=None if settings.orders else valid,  # a mixture over all orders would take most of the time
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=partial(torch.optim.AdamW, lr=settings.lr, weight_decay=settings.weight_decay),
        progress=progress,
        schedule=CosineAnnealingLR,
    )
    sign = -1 if name == "mnist" else 1
    model = f"MADE({settings.hidden})" + (" in 16 orders" if settings.orders else "")
    report(name, model, figure(sign * log_prob(few, test)), time.perf_counter() - start, result)
    if name == "mnist":
        print_curve(name, result)


def print_curve(name: str, result: gx.FitResult) -> None:
    minutes = np.linspace(0, result.seconds / 60, len(result.validation) + 1)[1:]
    curve = [f"{at:.1f}: {-nats:.2f}" for at, nats in zip(minutes, result.validation, strict=True)]
    print(f"{name}, minutes and nats of held-out training rows: {', '.join(curve)}", flush=True)


def mixture(scores: list[np.ndarray]) -> np.ndarray:
    """Log-probabilities under the equal mixture of models."""
    return np.logaddexp.reduce(scores) - math.log(len(scores))


def rows_in_rows() -> gx.Autoregressive:
    """A GRU over the rows of an image, and a MADE within each row."""
    made = gx.conditioners.MADE(28, 1, context=400, hidden=(1000,), dropout=0.1)
    row = gx.heads.ConditionalHead(gx.Autoregressive(made, gx.heads.Bernoulli(), (28,)))
    gru = gx.conditioners.Recurrent((28,), row.num_params, hidden=500, dropout=0.3)
    return gx.Autoregressive(gru, row, (28, 28))


def mnist_rows(name: str, data: Path, progress: bool) -> list[np.ndarray]:
    start, parts = time.perf_counter(), [part.view(-1, 28, 28) for part in rows_of(data, "mnist")]
    fabric, scores = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), []
    for seed, model in enumerate(("GRU(500) over rows, MADE(1000) within", "the same over columns")):
        begin = time.perf_counter()
        train, chooses, valid = (part.mT.contiguous() if seed else part for part in parts)
        torch.manual_seed(seed + 2)
        net = rows_in_rows()
        result = gx.fit(
            net,
            train,
            validation=chooses,
            epochs=16,
            batch_size=100,
            optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.05),
            schedule=one_cycle,
            max_grad_norm=5.0,
            fabric=fabric,
            seed=seed + 2,
            progress=progress,
        )
        scores.append(log_prob(net, valid))
        report(name, model, figure(-scores[-1]), time.perf_counter() - begin, result)
        print_curve(name, result)
    report(name, "mixture of both", figure(-mixture(scores)), time.perf_counter() - start)
    return scores


def pixelcnn(name: str, data: Path, progress: bool) -> list[np.ndarray]:
    start, (train, chosen, valid), head = time.perf_counter(), rows_of(data, name), gx.heads.Bernoulli()
    torch.manual_seed(0)
    net = gx.conditioners.PixelCNN((1, 28, 28), head.num_params, width=PIXELS.width, depth=PIXELS.depth)
    model = gx.Autoregressive(net, head, (784,))
    result = gx.fit(
        model,
        train,
        validation=chosen,
        epochs=PIXELS.epochs,
        batch_size=PIXELS.batch_size,
        optimizer=partial(torch.optim.AdamW, lr=PIXELS.lr, betas=(0.9, 0.98), weight_decay=0.01),
        schedule=one_cycle,
        max_grad_norm=10.0,
        progress=progress,
    )
    print_curve(name, result)
    scores = log_prob(model, valid)
    described = f"PixelCNN(width {PIXELS.width}, depth {PIXELS.depth})"
    report(name, described, figure(-scores), time.perf_counter() - start, result)
    return [scores]


def pieces(data: Path, part: str, longest: int = 160) -> tuple[Tensor, Tensor]:
    """Frames (N, longest, KEYS) of pieces, cut into equal parts where longer, and their lengths (N,)."""
    file = np.load(data / "jsb_chorales" / "jsb_chorales.npz")
    frames = floats(np.unpackbits(file[f"{part}_frames"], axis=1)[:, :KEYS])
    lengths = [int(n) for n in file[f"{part}_lengths"]]
    parts = [cut for piece in frames.split(lengths) for cut in piece.tensor_split(math.ceil(len(piece) / longest))]
    padded = torch.stack([pad(cut, (0, 0, 0, longest - len(cut))) for cut in parts])
    return padded, torch.tensor([len(cut) for cut in parts])


@torch.no_grad()
def nats_a_frame(model: gx.Autoregressive, frames: Tensor, lengths: Tensor) -> str:
    """Of frames 2 ... T of all pieces: a ratio of sums over pieces, with its standard error."""
    model.eval()
    batches = zip(frames.split(16), lengths.split(16), strict=True)
    nats = torch.cat([-model(lengths=n).log_prob_sites(x)[:, 1:].sum(1) for x, n in batches]).double()
    counts = (lengths - 1).double()
    ratio = nats.sum() / counts.sum()
    error = 2 * (nats - ratio * counts).square().sum().sqrt() / counts.sum()
    return f"{ratio:.2f} +- {error:.2f} (2 s.e.)"


class Transposed(Dataset):
    """Pieces that are moved up or down by up to ``most`` keys, as far as the keyboard reaches, anew at each access."""

    def __init__(self, frames: Tensor, lengths: Tensor, most: int) -> None:
        self.frames, self.lengths, self.most = frames, lengths, most

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        piece = self.frames[index]
        keys = piece.any(0).nonzero()
        low, high = max(-self.most, -int(keys.min())), min(self.most, KEYS - 1 - int(keys.max()))
        shift = int(torch.randint(low, high + 1, ()))
        return piece.roll(shift, 1), {"lengths": self.lengths[index]}


def selective(head: gx.Head, width: int, dropout: float) -> gx.Conditioner:
    return gx.conditioners.StateSpace(
        (KEYS,), head.num_params, kind="selective", width=width, depth=2, state=32, dropout=dropout
    )


def one_cycle(optimizer: Optimizer, steps: int) -> OneCycleLR:
    return OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=steps, pct_start=0.1)


class Chorales(NamedTuple):
    """How to train a model of chorales."""

    model: str
    network: Callable[[gx.Head], gx.Conditioner]
    nade: int = 0  # width of a NADE over the keys of a frame; 0 for independent keys
    epochs: int = 30
    batch_size: int = 16
    weight_decay: float = 0.0
    schedule: Callable[..., LRScheduler] = CosineAnnealingLR
    max_grad_norm: float = 10.0
    transpose: int = 0  # keys


def gru(head: gx.Head) -> gx.Conditioner:
    return gx.conditioners.Recurrent((KEYS,), head.num_params, hidden=200, dropout=0.3)


CHORALES = {
    "jsb": Chorales("GRU(200)", gru, epochs=100),
    "jsb_nade": Chorales("GRU(200), NADE(64) over keys", gru, nade=64),
    "jsb_mamba": Chorales(
        "selective state space, NADE(64) over keys",
        partial(selective, width=128, dropout=0.2),
        nade=64,
        epochs=60,
        batch_size=8,
        weight_decay=0.1,
        schedule=one_cycle,
        max_grad_norm=50.0,
    ),
    "jsb_transposed": Chorales(
        "selective state space, NADE(96) over keys, trained with transposition",
        partial(selective, width=160, dropout=0.1),
        nade=96,
        epochs=100,
        batch_size=8,
        weight_decay=0.1,
        schedule=one_cycle,
        max_grad_norm=50.0,
        transpose=6,
    ),
}


def jsb(name: str, data: Path, progress: bool) -> None:
    start, setting = time.perf_counter(), CHORALES[name]
    (train, lengths), valid = pieces(data, "train", 64), pieces(data, "valid", 64)
    torch.manual_seed(0)
    head: gx.Head = gx.heads.Bernoulli((KEYS,))
    if setting.nade:
        nade = gx.conditioners.NADE(KEYS, 1, context=setting.nade, hidden=setting.nade)
        head = gx.heads.ConditionalHead(gx.Autoregressive(nade, gx.heads.Bernoulli(), (KEYS,)))
    net = setting.network(head)
    result = gx.fit(
        gx.Autoregressive(net, head, (64, KEYS)),
        *([Transposed(train, lengths, setting.transpose)] if setting.transpose else [train, {"lengths": lengths}]),
        validation=(valid[0], {"lengths": valid[1]}),
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        optimizer=partial(torch.optim.AdamW, lr=5e-3, weight_decay=setting.weight_decay),
        max_grad_norm=setting.max_grad_norm,
        progress=progress,
        schedule=setting.schedule,
    )
    value = nats_a_frame(gx.Autoregressive(net, head, (160, KEYS)), *pieces(data, "test"))  # whole pieces
    report(name, setting.model, value, time.perf_counter() - start, result)


def wine(name: str, data: Path, progress: bool) -> None:
    start, file, results = time.perf_counter(), np.load(data / "uci_red_wine" / "red_wine.npz"), []
    for k in range(10):
        train, test = file["x"][file["fold"] != k], file["x"][file["fold"] == k]
        loc, scale = train.mean(0), train.std(0)
        train, test = floats((train - loc) / scale), floats((test - loc) / scale)
        torch.manual_seed(k)
        head = gx.heads.Mixture(gx.heads.Laplace(), 10)
        net = gx.conditioners.MADE(11, head.num_params, hidden=(100,), activation=torch.tanh, direct=False)
        model = gx.Autoregressive(net, head, (11,))
        result = gx.fit(
            model,
            train,
            validation=0.1,
            epochs=150,
            batch_size=128,
            optimizer=partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.1),
            seed=k,
            progress=progress,
            schedule=CosineAnnealingLR,
        )
        results.append(log_prob(model, test).mean())
        print(
            f"{name}, fold {k}: {results[-1]:.2f}, held-out rows of train {max(result.validation):.2f}, "
            f"best epoch {result.best_epoch + 1}, {result.seconds:.0f} s",
            flush=True,
        )
    error = 2 * np.std(results, ddof=1) / math.sqrt(len(results))
    value = f"{np.mean(results):.2f} +- {error:.2f} (2 s.e. over folds)"
    report(name, "MADE(100), 10 Laplace components", value, time.perf_counter() - start)


def main() -> None:
    recipes = {
        **dict.fromkeys(BINARY, binary),
        "mnist_rows": mnist_rows,
        "mnist_pixelcnn": pixelcnn,
        **dict.fromkeys(CHORALES, jsb),
        "wine": wine,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default=",".join(recipes))
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    start, results = time.perf_counter(), {}
    for name in args.only.split(","):
        results[name] = recipes[name](name, args.data, args.progress)
    images = [scores for name in ("mnist_rows", "mnist_pixelcnn") for scores in results.get(name) or ()]
    if len(images) == 3:
        report("mnist_rows", "mixture of all three", figure(-mixture(images)), time.perf_counter() - start)


if __name__ == "__main__":
    main()
