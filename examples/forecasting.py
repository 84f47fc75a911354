"""Probabilistic forecasting: a GRU with Student-t steps beside a seasonal naive forecast and a Gaussian AR.

    python examples/forecasting.py [--out forecasting.png] [--smoke-test]

The data are weekly measurements of carbon dioxide at Mauna Loa, 1958 to 2001 (statsmodels' co2), in parts per million
(ppm). Weeks are missing, so the series is a panel of 23 runs of 2 to 856 weeks; runs of more than two years are cut into
overlapping windows. The last eight years are the test, the four before them tell when to stop the training.

The model is one of the weekly change, z_t = (x_t - x_{t-1} - mean) / scale, standardised by the training weeks:

    p(z_t | z_{<t}, c_{<=t}) = StudentT(df_t, loc_t, scale_t),     all three from a GRU

so that width and tails too depend on season and history. The covariates c_t, known in advance, are the date and three
harmonics of the season: a context of one vector a week, gx.Covariates(7).

Log scores are nats a week, of the density of the level x_t in ppm given all weeks before it; more is better. Since
dz_t / dx_t = 1 / scale, the model's is log p(z_t | z_{<t}) - log scale. The AR, on the same weekly changes with the same
covariates, and the seasonal naive forecast are fitted to training and validation weeks, the GRU to training weeks alone.
Most of what the GRU gains is a width that varies with the season, which an AR would have to be told.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import arviz as az
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from torch import Tensor

import pyro_genexact as gx

YEAR, WINDOW, STRIDE, MAX_LAG, HARMONICS = 52, 104, 13, 26, 3  # the first four in weeks
VALIDATION, TEST = 4 * YEAR, 8 * YEAR


def co2() -> tuple[pd.DatetimeIndex, Tensor, Tensor]:
    """Dates (N), levels (N) in ppm with NaN where missing, and covariates (N, 7): the date, the season's harmonics."""
    series = sm.datasets.co2.load_pandas().data["co2"]
    trend = torch.linspace(-1, 1, len(series))[:, None]
    phase = (
        2
        * math.pi
        * torch.tensor(series.index.day_of_year.to_numpy(), dtype=torch.float32)
        / 365.25
    )
    angles = phase[:, None] * torch.arange(1, HARMONICS + 1)
    return (
        series.index,
        torch.tensor(series.to_numpy()),
        torch.cat([trend, angles.sin(), angles.cos()], 1),
    )


def panel(z: Tensor, covariates: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows of at most two years without gaps: (B, 104), zeros after their lengths (B), with their covariates."""
    missing = [-1, *z.isnan().nonzero().flatten().tolist(), len(z)]
    windows = []
    for before, end in pairwise(missing):
        starts = range(before + 1, max(before + 1, end - WINDOW) + STRIDE, STRIDE)
        windows += [
            slice(start, min(start + WINDOW, end)) for start in starts if start < end
        ]
    lengths = torch.tensor([w.stop - w.start for w in windows])
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad([z[w] for w in windows]), {
        "context": pad([covariates[w] for w in windows]),
        "lengths": lengths,
    }


def seasonal_naive(x: Tensor) -> dist.Normal:
    """The test levels as those of a year ago and a Gaussian growth."""
    growth = (x[YEAR:] - x[:-YEAR])[:-TEST]
    growth = growth[growth.isfinite()]
    return dist.Normal(
        x[-TEST - YEAR : -YEAR] + growth.mean(), growth.std(correction=0)
    )


def gaussian_ar(x: Tensor, covariates: Tensor) -> tuple[int, dist.Normal]:
    """The test levels by an AR(p) of the changes with covariates: exact maximum likelihood given the lags, p by BIC."""
    lags = x.diff().unfold(0, MAX_LAG + 1, 1)  # each change after those before it
    target, covariates = lags[:, -1], covariates[-len(lags) :].to(x)
    train = lags.isfinite().all(1)
    train[-TEST:] = False
    fits = []
    for p in range(1, MAX_LAG + 1):
        inputs = torch.cat(
            [torch.ones_like(covariates[:, :1]), covariates, lags[:, -1 - p : -1]], 1
        )
        weights = torch.linalg.lstsq(inputs[train], target[train, None]).solution[:, 0]
        variance = (target - inputs @ weights)[train].square().mean()
        bic = train.sum() * variance.log() + inputs.shape[1] * train.sum().log()
        fits.append(
            (
                bic.item(),
                p,
                dist.Normal(
                    x[-TEST - 1 : -1] + inputs[-TEST:] @ weights, variance.sqrt()
                ),
            )
        )
    return min(fits, key=lambda fit: fit[0])[1:]


def mean_and_error(values: Tensor) -> str:
    """The mean and two standard errors of it."""
    return f"{values.mean():8.3f} ± {2 * values.std() / math.sqrt(len(values)):.3f}"


def picture(
    dates: pd.DatetimeIndex,
    x: Tensor,
    paths: Tensor,
    uniforms: dict[str, Tensor],
    out: Path,
) -> None:
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, (fan, pit) = plt.subplots(
        1, 2, figsize=(13, 4.6), width_ratios=(1.7, 1), layout="constrained"
    )
    for level, alpha in ((0.9, 0.2), (0.5, 0.4)):
        low, high = (paths.quantile(q, 0) for q in ((1 - level) / 2, (1 + level) / 2))
        fan.fill_between(
            dates[-TEST:],
            low,
            high,
            color="tab:blue",
            alpha=alpha,
            linewidth=0,
            label=f"{level:.0%} band",
        )
    fan.plot(
        dates[-TEST:],
        paths.quantile(0.5, 0),
        color="tab:blue",
        linewidth=1.2,
        label="median",
    )
    shown = TEST + 2 * YEAR
    fan.plot(dates[-shown:], x[-shown:], color="black", linewidth=0.9, label="measured")
    fan.axvline(dates[-TEST], color="gray", linestyle=":", linewidth=1)
    fan.set(
        title="Forecast from the dotted line on",
        xlabel="year",
        ylabel="carbon dioxide, ppm",
    )
    fan.legend(frameon=False, fontsize=10, loc="upper left")
    for (name, u), color in zip(
        uniforms.items(), ("tab:blue", "tab:orange"), strict=True
    ):
        az.plot_ecdf(
            u.numpy().copy(),
            eval_points=np.linspace(0.01, 0.99, 99),
            cdf=lambda v: v,
            difference=True,
            confidence_bands="optimized"
            if color == "tab:blue"
            else False,  # simultaneous, once
            ax=pit,
            plot_kwargs={"color": color, "label": name},
            fill_kwargs={
                "color": "gray",
                "alpha": 0.25,
                "label": "94% band if calibrated",
            },
        )
    pit.set(
        title="Calibration of one-week forecasts",
        xlabel="u = F(x | weeks before)",
        ylabel="ecdf of u, less u",
        ylim=(-0.08, 0.14),
    )
    pit.legend(frameon=False, fontsize=10, loc="upper left")
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("forecasting.png"), metavar="FILE"
    )
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="a few steps only, to see that everything runs",
    )
    args = parser.parse_args()
    dates, x, covariates = co2()
    change, covariates = x.diff(), covariates[1:]
    known = change[: -TEST - VALIDATION]
    mean, scale = known[known.isfinite()].mean(), known[known.isfinite()].std()
    z = ((change - mean) / scale).float()

    torch.manual_seed(0)
    head = gx.heads.StudentT()
    gru = gx.conditioners.Recurrent(
        (), head.num_params, hidden=32, context=gx.Covariates(1 + 2 * HARMONICS)
    )
    parts = slice(-TEST - VALIDATION), slice(-TEST - VALIDATION, -TEST)
    (train, context), validation = (panel(z[part], covariates[part]) for part in parts)
    fit = gx.fit(
        gx.Autoregressive(gru, head, (WINDOW,)),
        train,
        context,
        validation=validation,
        epochs=2 if args.smoke_test else 60,
        batch_size=32,
        optimizer=partial(torch.optim.AdamW, lr=5e-3, weight_decay=1.0),
    )
    print(
        f"\n{len(train)} windows of {context['lengths'].min()} to {context['lengths'].max()} weeks"
    )
    print(
        f"GRU trained for {len(fit.train)} epochs in {fit.seconds:.0f} s, best epoch {fit.best_epoch + 1}"
    )

    # the same network over all weeks since the last gap: the exact distribution of the test weeks given those before
    first = z.isnan().nonzero().max() + 1
    history, test = z[first:-TEST], z[-TEST:]
    model = gx.Autoregressive(gru, head, (len(z) - first,)).eval()
    with torch.no_grad():
        forecast = model(covariates[first:]).conditional_on_prefix(history)
        paths = forecast.sample((100 if args.smoke_test else 2000,))
        scores = {"GRU, Student-t": forecast.log_prob_sites(test) - scale.log()}
        uniforms = {"GRU, Student-t": forecast.to_uniform(test)}
    order, ar = gaussian_ar(x, covariates)
    uniforms[f"Gaussian AR({order})"] = ar.cdf(x[-TEST:])
    scores[f"Gaussian AR({order})"] = ar.log_prob(x[-TEST:])
    scores["seasonal naive"] = seasonal_naive(x).log_prob(x[-TEST:])

    print(f"\n{'':<20}{'nats a week, test':>20}{'the GRU above it by':>24}")
    for name, score in scores.items():
        gain = scores["GRU, Student-t"] - score
        print(
            f"{name:<20}{mean_and_error(score):>20}{mean_and_error(gain) if gain.any() else '':>24}"
        )
    levels = x[-TEST - 1] + (mean + scale * paths.double()).cumsum(-1)
    low, high = levels.quantile(0.05, 0), levels.quantile(0.95, 0)
    print(
        "\ntest weeks within the GRU's 90% band, forecast from the first of them, by year ahead:"
    )
    print(
        "  ".join(
            f"{share:.0%}"
            for share in ((low < x[-TEST:]) & (x[-TEST:] < high))
            .double()
            .view(-1, YEAR)
            .mean(1)
        )
    )
    picture(dates, x, levels, uniforms, args.out)
    print(f"\nsaved {args.out}")


if __name__ == "__main__":
    main()
