"""Density estimation on handwritten digits: four densities of 64 pixels.

    python examples/density_estimation.py [--out FILE] [--device cuda] [--smoke-test]

The data are the 1797 digits of scikit-learn, 8 x 8 pixels with levels 0 to 16. They
are dequantised: y = (x + u) / 17 with u uniform on (0, 1), so y lies in (0, 1)^64.
The script compares four densities of y on (0, 1)^64:

* Gaussian: the maximum-likelihood Gaussian of logit(y), in closed form;
* zuko MAF: five affine autoregressive layers of the package zuko;
* MAF: the same sizes in pyro_genexact, trained with the same settings;
* NSF: two autoregressive layers of rational-quadratic splines.

All four act on the logits. The training rows are 1297 images, repeated 20 times with
new dequantising noise. 200 images are validation rows, 300 are test rows.

The table has these columns:

* train, test: the mean of log p(y) over rows in nats, the test rows with two standard
  errors; larger is better. A flow fits its own training images better than new ones.
* bits/dim: log2(17) - nats / (64 log 2) of the test rows, which is the density on the
  scale of pixel levels. It is an upper bound of the bits per pixel that a lossless
  code of the 17 levels needs; smaller is better.
* outside: a flow maps test rows to its base. Under an exact model the normal cdf of
  each of the 64 base coordinates is uniform. The number counts the coordinates that a
  Kolmogorov-Smirnov test at the 5% level rejects; an exact model has about 3.
* fit, sample: seconds of training, and milliseconds to draw 1000 images.

The logit of a dequantised zero has an exponential left tail. In pixels that are
almost always 0 there is nothing else, and the affine maps of a MAF leave this tail in
the base. Splines remove it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from _plots import mosaic
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_genexact as gx

LEVELS, SIDE = 17, 8
D = SIDE * SIDE
MAF = {"transforms": 5, "hidden": (256,)}
NSF = {"transforms": 2, "hidden": (128,)}
BLANK = 0.97  # a pixel is blank if this share of the training images has level 0


def digits(copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training rows (with new noise in each copy), validation and test rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    x = x[torch.randperm(len(x), generator=generator)]
    parts = x[500:].repeat(copies, 1), x[:200], x[200:500]
    train, validation, test = (
        (part + torch.rand(part.shape, generator=generator)) / LEVELS for part in parts
    )
    return train, validation, test


def gaussian(train: Tensor) -> gx.Flow:
    """The maximum-likelihood Gaussian of the logits, as a density on (0, 1)^64."""
    to_unit = gx.transforms.ToSupport(constraints.unit_interval, D)
    logits = to_unit.inv(train)
    covariance = torch.cov(logits.T, correction=0)
    return gx.Flow([to_unit], dist.MultivariateNormal(logits.mean(0), covariance))


def zuko_maf(train: Tensor) -> gx.Flow:
    """Returns zuko's MAF as the base of the same standardisation and logit."""
    switches = torch.distributions.Distribution
    before = switches._validate_args, switches.arg_constraints
    import zuko  # importing it switches validation off for all of torch

    switches._validate_args, switches.arg_constraints = before
    zuko.distributions.NormalizingFlow.arg_constraints = {}  # avoids a warning
    to_unit = gx.transforms.ToSupport(constraints.unit_interval, D)
    standardize = gx.transforms.Standardize.from_data(to_unit.inv(train))
    sizes = {"transforms": MAF["transforms"], "hidden_features": MAF["hidden"]}
    maf = zuko.flows.MAF(D, **sizes)
    return gx.Flow([gx.transforms.Inverse(standardize), to_unit], maf)


def clock(call: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def uniforms(flow: gx.Flow, rows: Tensor, transforms: int) -> Tensor:
    """The normal cdf of the base coordinates (N, 64), in the order of the pixels."""
    u = torch.special.ndtr(flow().transforms[0].inv(rows))
    return u.flip(-1) if transforms % 2 == 0 else u  # layers reverse the order


def deviations(u: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted values (N, 64), and the share of rows up to each of them minus it."""
    u = u.sort(0).values
    share = (torch.arange(len(u), device=u.device) + 0.5) / len(u)
    return u, share.unsqueeze(1) - u


def outside(u: Tensor) -> Tensor:
    """Which coordinates (64,) a Kolmogorov-Smirnov test at 5% rejects."""
    return deviations(u)[1].abs().amax(0) + 0.5 / len(u) > band(len(u))


def band(rows: int) -> float:
    """The critical value of the Kolmogorov-Smirnov test at the 5% level."""
    return 1.358 / math.sqrt(rows)


@torch.no_grad()
def report(
    name: str, model: nn.Module, train: Tensor, test: Tensor, fitted: float, bad: str
) -> None:
    """Prints a row of the table."""
    log_prob = model().log_prob(test)
    nats, error = log_prob.mean().item(), (log_prob.std() / math.sqrt(len(test))).item()
    bits = gx.diagnostics.bits_per_dim(log_prob, (D,), width=1 / LEVELS).mean()
    model().sample((1000,))  # a warm-up
    sampled = 1e3 * clock(lambda: model().sample((1000,)))
    print(
        f"{name:<12}{model().log_prob(train).mean():>8.2f}{nats:>9.2f} ± {2 * error:.2f}"
        f"{bits:>11.3f}{bad:>10}{fitted:>9.1f}{sampled:>12.0f}"
    )


def draw_training(axes: plt.Axes, fits: dict[str, gx.FitResult]) -> None:
    """Training and validation nats of each flow, epoch by epoch."""
    for k, (name, fit) in enumerate(fits.items()):
        epochs = range(1, len(fit.train) + 1)
        axes.plot(epochs, fit.train, color=f"C{k}", linestyle=":")
        axes.plot(epochs, fit.validation, color=f"C{k}", marker="o", label=name)
    handles, _ = axes.get_legend_handles_labels()
    for style, name in ((":", "training"), ("-", "validation")):
        handles.append(Line2D([], [], color="0.3", linestyle=style, label=name))
    axes.legend(handles=handles, loc="lower right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="log-density per image (nats)")


def draw_calibration(axes: plt.Axes, u: Tensor, blank: Tensor) -> None:
    """The deviations of all coordinates, with the band that holds 95% of them."""
    value, deviation = (x.cpu() for x in deviations(u))
    limit = band(len(u))
    axes.axhspan(-limit, limit, color="0.88", linewidth=0)
    for which, colour, width in ((~blank, "0.4", 0.5), (blank, "C3", 0.9)):
        axes.plot(value[:, which], deviation[:, which], color=colour, linewidth=width)
    axes.set(xlabel="u, normal cdf of a base value", xlim=(0, 1), ylim=(-0.17, 0.17))
    axes.grid(False)


@torch.no_grad()
def picture(
    models: dict[str, gx.Flow],
    fits: dict[str, gx.FitResult],
    bases: dict[str, Tensor],
    test: Tensor,
    blank: Tensor,
    out: Path,
) -> None:
    """Data, samples, training and calibration."""
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure = plt.figure(figsize=(7.0, 4.6))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.08))
    left, right, bar = upper.subplots(1, 3, width_ratios=(1, 1, 0.03))
    samples = models["NSF"]().sample((40,))
    for axes, rows, title in (
        (left, test[:40], "a  Test images, dequantised"),
        (right, samples, "b  Samples of the NSF"),
    ):
        images = LEVELS * rows.view(40, SIDE, SIDE)
        image = mosaic(axes, images, 8, LEVELS, title)
    upper.colorbar(image, cax=bar, label="pixel level", ticks=range(0, LEVELS, 4))

    curves, *panels = lower.subplots(1, 3, width_ratios=(1.15, 1, 1))
    draw_training(curves, {name: fits[name] for name in bases})
    curves.set_title("c  Training", loc="left")
    for letter, axes, (name, u) in zip("de", panels, bases.items(), strict=True):
        draw_calibration(axes, u, blank)
        count = int(outside(u).sum())
        axes.set_title(f"{letter}  {name}: {count} of {D} outside", loc="left")
    panels[0].set_ylabel("share of rows below u, minus u")
    panels[1].tick_params(labelleft=False)
    handles = [Line2D([], [], color=colour) for colour in ("C3", "0.4")]
    handles.append(Patch(color="0.88"))
    labels = (f"{int(blank.sum())} blank pixels", "other pixels", "95% band")
    panels[0].legend(handles[:2], labels[:2], loc="upper right", borderaxespad=0)
    panels[1].legend(handles[2:], labels[2:], loc="upper right", borderaxespad=0)
    figure.savefig(out)


def fitted(
    models: dict[str, gx.Flow], train: Tensor, validation: Tensor, epochs: int
) -> dict[str, gx.FitResult]:
    """Trains each flow; the splines need more weight decay against overfitting."""
    fits = {}
    for name, model in models.items():
        decay = 5.0 if name == "NSF" else 1.0
        optimizer = partial(torch.optim.AdamW, lr=2e-3, weight_decay=decay)
        settings = {"epochs": epochs, "batch_size": 256, "patience": 3}
        print(f"training {name}")
        fits[name] = gx.fit(
            model, train, validation=validation, optimizer=optimizer, **settings
        )
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = Path("density_estimation.png")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke-test", action="store_true", help="a short test run")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    copies, epochs = (1, 2) if args.smoke_test else (20, 5)
    train, validation, test = (part.to(args.device) for part in digits(copies))

    torch.manual_seed(0)
    options = {"support": constraints.unit_interval, "standardize": train.cpu()}
    models = {
        "zuko MAF": zuko_maf(train.cpu()),
        "MAF": gx.flows.maf(D, **options, **MAF),
    }
    models["NSF"] = gx.flows.nsf(D, **options, **NSF)
    models = {name: model.to(args.device) for name, model in models.items()}
    fits = fitted(models, train, validation, epochs)
    layers = {"MAF": MAF["transforms"], "NSF": NSF["transforms"]}
    bases = {name: uniforms(models[name], test, k) for name, k in layers.items()}

    header = ("train", "test (2 s.e.)", "bits/dim", "outside", "fit, s", "sample, ms")
    widths = (8, 16, 11, 10, 9, 12)
    cells = zip(header, widths, strict=True)
    print(f"\n{'nats:':<12}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    start, once = time.perf_counter(), train[: len(train) // copies]
    closed_form = gaussian(train)
    report("Gaussian", closed_form, once, test, time.perf_counter() - start, "")
    for name, model in models.items():
        bad = str(int(outside(bases[name]).sum())) if name in bases else ""
        report(name, model, once, test, fits[name].seconds, bad)
    blank = ((LEVELS * train < 1).float().mean(0) >= BLANK).cpu()
    picture(models, fits, bases, test, blank, args.out)
    print(f"\nsaved {args.out}")


if __name__ == "__main__":
    main()
