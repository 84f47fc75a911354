"""Five models of small images: samples, completions, and bits per pixel.

    python examples/images.py [--out FILE] [--seed 0] [--smoke-test]

The data are the 1797 digits of scikit-learn, 8 x 8 pixels with levels 0 to 16. The
training, validation and test rows are 1297, 200 and 300 images.

Three models are probability mass functions over the levels. Each is a product over
pixels, p(x) = prod_t p(x_t | x_1 ... x_{t-1}), in raster order. The distribution of a
pixel is a mixture of five discretised logistic distributions:

* PixelCNN: gated convolutions that read the pixels above and to the left;
* Recurrence: a GRU reads whole rows, and a MADE reads the earlier pixels within a row;
* MADE: a masked dense network.

Two models are flows, densities p(y) of dequantised images y = (x + u) / 17, where u is
uniform noise, drawn anew in each epoch:

* NSF: two autoregressive layers of splines;
* TarFlow: Transformers over patches of 2 x 2 pixels, in alternating orders, with splines.

The table has these columns, with two standard errors over the test images:

* bits: the exact bits per pixel of the three mass functions. A flow has an upper bound
  instead, the mean over u of log2(17) - log2 p(y) / 64. Smaller is better.
* tighter: P(x) is the mean of p(y) / 17^64 over u. A mean of several draws of u in the
  logarithm gives a tighter upper bound.
* lower: the bits per pixel of the lower half given the upper half. The mass functions
  have this conditional distribution, whereas the flows do not.
* fit, sample: seconds of training, and seconds to draw 1000 images.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _plots import mosaic
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import constraints

import pyro_genexact as gx

LEVELS, SIDE, GIVEN = 17, 8, 4  # the upper GIVEN rows are given for completions
SHAPE = (SIDE, SIDE)
COLUMNS, ROWS = 8, 4  # of the mosaics
bits_per_pixel = partial(gx.diagnostics.bits_per_dim, event_shape=SHAPE)


class Found(NamedTuple):
    """A fitted model and its scores."""

    bits: Tensor  # (N,), per pixel of each test image
    samples: Tensor  # (40, 8, 8), levels
    tighter: Tensor | None = None  # (N,)
    lower: Tensor | None = None  # (N,), per pixel of the lower half
    completions: Tensor | None = None  # (2, COLUMNS, 8, 8)


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test images (N, 8, 8), levels 0 to 16."""
    x = torch.tensor(load_digits().images, dtype=torch.float32)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[500:], x[:200], x[200:500]


def pixel_cnn(head: gx.Head) -> gx.Autoregressive:
    net = gx.conditioners.PixelCNN(
        (1, *SHAPE), head.num_params, width=32, depth=4, dropout=0.2
    )
    return gx.Autoregressive(net, head, SHAPE)


def row_recurrence(head: gx.Head) -> gx.Autoregressive:
    """A GRU over rows; its outputs are the context of a MADE within each row."""
    made = gx.conditioners.MADE(
        SIDE, head.num_params, context=64, hidden=(64,), dropout=0.2
    )
    row = gx.heads.ConditionalHead(gx.Autoregressive(made, head, (SIDE,)))
    gru = gx.conditioners.Recurrent((SIDE,), row.num_params, hidden=128, dropout=0.2)
    return gx.Autoregressive(gru, row, SHAPE)


def made(head: gx.Head) -> gx.Autoregressive:
    net = gx.conditioners.MADE(SIDE * SIDE, head.num_params, hidden=(256,), dropout=0.3)
    return gx.Autoregressive(net, head, SHAPE)


MASS_FUNCTIONS = {"PixelCNN": pixel_cnn, "Recurrence": row_recurrence, "MADE": made}


def nsf(images: Tensor) -> gx.Flow:
    options = {"support": constraints.unit_interval, "standardize": images.flatten(1)}
    return gx.flows.nsf(SIDE * SIDE, transforms=2, hidden=(128,), **options)


def tarflow(images: Tensor) -> gx.Flow:
    return gx.flows.tarflow(
        SHAPE,
        patch=2,
        transforms=3,
        dropout=0.1,
        head=lambda shape: gx.heads.RationalQuadraticSpline(shape=shape),
        support=constraints.unit_interval,
        standardize=images,
    )


FLOWS = {"NSF": (nsf, 2e-3, 5.0), "TarFlow": (tarflow, 3e-3, 0.1)}


def fit_mass_function(
    make: Callable[[gx.Head], gx.Autoregressive],
    train: Tensor,
    validation: Tensor,
    epochs: int,
) -> tuple[gx.Autoregressive, gx.FitResult]:
    """Fits a model of levels, and keeps the epoch with the best validation score."""
    model = make(gx.heads.DiscretizedLogistic(LEVELS, K=5))
    optimizer = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1)
    result = gx.fit(
        model,
        train,
        validation=validation,
        epochs=epochs,
        batch_size=64,
        optimizer=optimizer,
        progress=False,
    )
    return model.eval().requires_grad_(False), result


def complete(model: gx.Autoregressive, images: Tensor) -> tuple[Tensor, Tensor]:
    """Completes the upper rows of images; also scores their true lower rows (nats)."""
    upper, lower = images.split([GIVEN, SIDE - GIVEN], 1)
    site = model.head.site_shape  # () for a pixel, (8,) for a row
    rest = model().conditional_on_prefix(upper.reshape(len(images), -1, *site))
    drawn = rest.sample().view_as(lower)
    nats = rest.log_prob(lower.reshape(len(images), -1, *site))
    return torch.cat([upper, drawn], 1), nats


def score_mass_function(model: gx.Autoregressive, test: Tensor) -> Found:
    shown = [complete(model, test[:COLUMNS])[0] for _ in range(2)]
    lower = gx.diagnostics.bits_per_dim(complete(model, test)[1], (SIDE - GIVEN, SIDE))
    bits = bits_per_pixel(gx.diagnostics.held_out(model, test).log_prob)
    samples = model().sample((ROWS * COLUMNS,))
    return Found(bits, samples, lower=lower, completions=torch.stack(shown))


def dequantised(images: Tensor) -> Tensor:
    y = (images + torch.rand(images.shape)) / LEVELS
    return y.clamp(1e-6, 1 - 1e-6)  # rounding may give 0 or 1


def fit_flow(
    name: str, train: Tensor, validation: Tensor, epochs: int
) -> tuple[gx.Flow, gx.FitResult]:
    """Fits a density of dequantised images."""
    make, rate, decay = FLOWS[name]
    flow = make(dequantised(train))
    event = flow().event_shape
    result = gx.fit(
        flow,
        gx.Augmented(train.view(-1, *event), dequantised),
        validation=dequantised(validation).view(-1, *event),
        epochs=epochs,
        batch_size=128,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=decay),
        progress=False,
    )
    return flow.eval().requires_grad_(False), result


def score_flow(flow: gx.Flow, test: Tensor, draws: int) -> Found:
    """Two bounds of the bits per pixel, and samples rounded down to levels."""
    d, bits = flow(), partial(bits_per_pixel, width=1 / LEVELS)
    nats = [
        d.log_prob(dequantised(test).view(-1, *d.event_shape)) for _ in range(draws)
    ]
    nats = torch.stack(nats)
    samples = (LEVELS * d.sample((ROWS * COLUMNS,))).floor().view(-1, *SHAPE)
    mean = nats.logsumexp(0) - math.log(draws)
    return Found(bits(nats).mean(0), samples, tighter=bits(mean))


def mean_and_error(values: Tensor) -> str:
    error = 2 * values.double().std().item() / math.sqrt(len(values))
    return f"{values.mean():.3f} ± {error:.3f}"


def row_of_table(name: str, found: Found, fit: gx.FitResult, sampling: float) -> str:
    bits = ("" if found.tighter is None else "<= ") + mean_and_error(found.bits)
    tighter = "" if found.tighter is None else "<= " + mean_and_error(found.tighter)
    lower = "" if found.lower is None else mean_and_error(found.lower)
    return f"{name:<11}{bits:>19}{tighter:>19}{lower:>17}{fit.seconds:>8.0f}{sampling:>11.2f}"


def draw_completions(axes: plt.Axes, test: Tensor, found: dict[str, Found]) -> None:
    """A row of test images, and two rows of completions of each model."""
    complete = {name: x.completions for name, x in found.items() if x.lower is not None}
    rows = torch.cat([test[None, :COLUMNS], *complete.values()])
    mosaic(axes, rows.flatten(0, 1), COLUMNS, LEVELS - 1)
    for k in range(1, len(rows)):  # below the given rows
        axes.axhline(k * (SIDE + 1) + GIVEN - 0.5, color="C3", linewidth=0.8)
    for k, name in enumerate(["test", *complete]):
        at = (2 * k or 0.5) * (SIDE + 1) - 1
        style = {"ha": "right", "va": "center", "fontsize": 7.5}
        axes.text(-2, at, name, **style)


def draw_bits(axes: plt.Axes, found: dict[str, Found]) -> None:
    """Bits per pixel with two standard errors; hollow markers are upper bounds."""
    for k, x in enumerate(found.values()):
        scores = [(x.bits, "C0", "exact" if x.tighter is None else "bound")]
        if x.tighter is not None:
            scores.append((x.tighter, "C1", "tighter bound"))
        for values, colour, label in scores:
            error = 2 * values.std() / math.sqrt(len(values))
            fill = colour if label == "exact" else "white"
            style = {"fmt": "o", "color": colour, "markerfacecolor": fill}
            axes.errorbar(values.mean(), -k, xerr=error, label=label, **style)
    axes.set_yticks([-k for k in range(len(found))], [*found])
    axes.set(xlabel="bits per pixel of test images", ylim=(-len(found) + 0.4, 0.6))
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="upper right")


def picture(test: Tensor, found: dict[str, Found], out: Path) -> None:
    """Draws test images, samples, completions and bits per pixel."""
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure = plt.figure(figsize=(7.0, 6.2))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    shown = {"Test images": test[-ROWS * COLUMNS :]}
    shown |= {f"{name}: samples": x.samples for name, x in found.items()}
    for axes, letter, (title, images) in zip(
        upper.subplots(2, 3).flat, "abcdef", shown.items(), strict=False
    ):
        mosaic(axes, images, COLUMNS, LEVELS - 1, f"({letter}) {title}")
    left, right = lower.subplots(1, 2, width_ratios=(1.25, 1))
    draw_completions(left, test, found)
    left.set_title("(g) Completions below the red lines", loc="left")
    draw_bits(right, found)
    right.set_title("(h) Bits per pixel, ± 2 s.e.", loc="left")
    figure.savefig(out)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = Path("images.png")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples")
    parser.add_argument("--smoke-test", action="store_true", help="a short test run")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    train, validation, test = digits()
    short = args.smoke_test
    epochs, flow_epochs, draws = (1, 1, 2) if short else (100, 150, 64)

    print(f"\n{'bits per pixel:':<17}{'bits':>13}{'tighter':>19}{'lower':>17}", end="")
    print(f"{'fit, s':>8}{'sample, s':>11}", flush=True)
    found = {}
    for name in [*MASS_FUNCTIONS, *FLOWS]:
        torch.manual_seed(args.seed)
        if name in FLOWS:
            model, fit = fit_flow(name, train, validation, flow_epochs)
            found[name] = score_flow(model, test, draws)
        else:
            make = MASS_FUNCTIONS[name]
            model, fit = fit_mass_function(make, train, validation, epochs)
            found[name] = score_mass_function(model, test)
        sampling = seconds(lambda: model().sample((1000,)))  # noqa: B023  (called at once)
        print(row_of_table(name, found[name], fit, sampling), flush=True)
    picture(test, found, args.out)
    print(f"\nsaved {args.out}")


if __name__ == "__main__":
    main()
