"""Density estimation on handwritten digits: a masked autoregressive flow beside a Gaussian and zuko's MAF.

    python examples/density_estimation.py [--out density_estimation.png] [--device cuda] [--smoke-test]

The data are scikit-learn's 1797 digits of 8x8 pixels with levels 0 ... 16. They are dequantised: y = (x + u) / 17
with u uniform on (0, 1), so that y lies in (0, 1)^64. All three models are densities on (0, 1)^64, built on the
same logits: the Gaussian is the maximum-likelihood Gaussian of logit(y) in closed form.

* nats: the mean over test rows of log p(y), with respect to y in (0, 1)^64; more is better.
* bits/dim: log2(17) - nats / (64 log 2), the same density on the scale of pixel levels, y * 17. It bounds from above
  the bits a pixel that a lossless code of the 17 levels needs; less is better.

Both flows have the same sizes and are trained by gx.fit with the same settings. Training rows are repeated with new
dequantising noise, which keeps the flows from learning the noise by heart.
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
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_genexact as gx

LEVELS, SIDE = 17, 8
D = SIDE * SIDE
SIZES = {"transforms": 5, "hidden": (256,)}


def digits(copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training rows (with new noise in each copy), validation rows and test rows, in (0, 1)^64."""
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
    return gx.Flow(
        [to_unit],
        dist.MultivariateNormal(logits.mean(0), torch.cov(logits.T, correction=0)),
    )


def zuko_maf(train: Tensor) -> gx.Flow:
    """zuko's MAF as the base of the same standardisation and logit."""
    before = (
        torch.distributions.Distribution._validate_args,
        torch.distributions.Distribution.arg_constraints,
    )
    import zuko  # which switches validation off for all of torch

    (
        torch.distributions.Distribution._validate_args,
        torch.distributions.Distribution.arg_constraints,
    ) = before
    zuko.distributions.NormalizingFlow.arg_constraints = {}  # else validation warns that there are none
    to_unit = gx.transforms.ToSupport(constraints.unit_interval, D)
    standardize = gx.transforms.Standardize.from_data(to_unit.inv(train))
    maf = zuko.flows.MAF(
        D, transforms=SIZES["transforms"], hidden_features=SIZES["hidden"]
    )
    return gx.Flow([gx.transforms.Inverse(standardize), to_unit], maf)


def clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def report(name: str, model: nn.Module, test: Tensor, fitted: float) -> None:
    log_prob = model().log_prob(test)
    nats, error = log_prob.mean().item(), (log_prob.std() / math.sqrt(len(test))).item()
    bits = math.log2(LEVELS) - nats / (D * math.log(2))
    model().sample((1000,))  # a warm-up
    sampled = clock(lambda: model().sample((1000,)))
    print(
        f"{name:<30}{nats:>10.2f} ± {error:.2f}{bits:>11.3f}{fitted:>11.1f}{1e3 * sampled:>21.0f}"
    )


def mosaic(rows: Tensor) -> Tensor:
    """The first 40 rows as 5 x 8 images with gaps, NaN."""
    tiles = nn.functional.pad(
        rows[:40].cpu().view(5, 8, SIDE, SIDE), (0, 1, 0, 1), value=math.nan
    )
    return tiles.permute(0, 2, 1, 3).reshape(5 * (SIDE + 1), 8 * (SIDE + 1))[:-1, :-1]


@torch.no_grad()
def picture(
    flow: gx.Flow, fits: dict[str, gx.FitResult], test: Tensor, out: Path
) -> None:
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, ((curves, histogram), (left, right)) = plt.subplots(
        2, 2, figsize=(10, 7.4), layout="constrained"
    )
    for color, (name, fit) in zip(
        ("tab:blue", "tab:orange"), fits.items(), strict=True
    ):
        epochs = range(1, len(fit.train) + 1)
        curves.plot(
            epochs, fit.train, color=color, linestyle=":", label=f"{name}, training"
        )
        curves.plot(
            epochs,
            fit.validation,
            color=color,
            marker="o",
            markersize=4,
            label=f"{name}, validation",
        )
    curves.set(xlabel="epoch", ylabel="nats", title="Training")
    curves.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    curves.legend(frameon=False, fontsize=10, loc="lower right")
    uniforms = torch.special.ndtr(flow().transforms[0].inv(test)).flatten().cpu()
    histogram.hist(
        uniforms.numpy(),
        bins=25,
        range=(0, 1),
        density=True,
        color="tab:blue",
        alpha=0.6,
    )
    histogram.axhline(
        1.0, color="black", linestyle="--", linewidth=1, label="exact model"
    )
    histogram.set(
        xlabel="normal cdf of the base values",
        ylabel="density",
        title="Test rows in the base",
        xlim=(0, 1),
    )
    histogram.legend(frameon=False, fontsize=10, loc="lower center")
    for axes, rows, title in (
        (left, test, "Data"),
        (right, flow().sample((40,)), "Samples"),
    ):
        axes.imshow(
            mosaic(rows),
            cmap=matplotlib.colormaps["gray_r"].with_extremes(bad="lightsteelblue"),
            vmin=0,
            vmax=1,
        )
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("density_estimation.png"), metavar="FILE"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="a few steps only, to see that everything runs",
    )
    args = parser.parse_args()
    train, validation, test = (
        part.to(args.device) for part in digits(copies=1 if args.smoke_test else 20)
    )

    torch.manual_seed(0)
    flow = gx.flows.maf(
        D, support=constraints.unit_interval, standardize=train.cpu(), **SIZES
    )
    models = {
        "pyro_genexact MAF": flow.to(args.device),
        "zuko MAF": zuko_maf(train.cpu()).to(args.device),
    }
    settings = {"epochs": 2 if args.smoke_test else 5, "batch_size": 256, "patience": 3}
    settings["optimizer"] = partial(torch.optim.AdamW, lr=2e-3, weight_decay=1.0)
    fits = {
        name: gx.fit(model, train, validation=validation, **settings)
        for name, model in models.items()
    }

    print(
        f"\n{'':<30}{'test nats':>17}{'bits/dim':>11}{'fit, s':>11}{'1000 samples, ms':>21}"
    )
    start = time.perf_counter()
    closed_form = gaussian(train)
    report("Gaussian, full covariance", closed_form, test, time.perf_counter() - start)
    for name, model in models.items():
        report(name, model, test, fits[name].seconds)
    picture(flow, fits, test, args.out)
    print(f"\nsaved {args.out}")


if __name__ == "__main__":
    main()
