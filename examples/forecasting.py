"""Probabilistic forecasts of carbon dioxide by recurrent networks.

    python examples/forecasting.py [--out forecasting.png] [--smoke-test]

The data are weekly measurements of carbon dioxide at Mauna Loa from 1958 to 2001
(statsmodels' co2), in parts per million (ppm). Some weeks are missing, so the series
consists of 23 runs of 2 to 856 weeks. Runs of more than two years are cut into
overlapping windows. The last eight years are the test data. The four years before
them are the validation data, which decide when the training stops.

The model describes the weekly change, z_t = (x_t - x_{t-1} - mean) / scale, with the
mean and the scale of the training weeks:

    p(z_t | z_{<t}, c_{<=t}) = StudentT(df_t, loc_t, scale_t)

A GRU computes all three parameters, so the width and the tails also depend on the
season and on the history. The covariates c_t are the date and three harmonics of the
season, which are known in advance: one vector per week, gx.Covariates(7).

Five networks start from different seeds. Their one-week forecasts hardly differ, but
their forecasts over eight years do: a small error of the mean change adds up over 416
weeks. The likelihood of single weeks determines this mean poorly. The example therefore
uses the mixture of the five networks with equal weights.

The mixture is compared with a Gaussian autoregression (AR) of the same weekly changes
and covariates, and with a seasonal naive forecast: the level of a year ago plus a
Gaussian growth. Both are fitted to the training and the validation weeks.

Log scores are log densities of the level x_t in ppm given all weeks before it, in nats
per week; higher is better. Since dz_t / dx_t = 1 / scale, the score of a network is
log p(z_t | z_{<t}) - log scale.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from _plots import calibration
from torch import Tensor

import pyro_genexact as gx

YEAR, WINDOW, STRIDE, MAX_LAG = 52, 104, 13, 26  # weeks
HARMONICS = 3
VALIDATION, TEST = 4 * YEAR, 8 * YEAR
LEVEL = 0.9  # of all bands


class Forecast(NamedTuple):
    """One-week and eight-year forecasts of the test weeks."""

    scores: Tensor  # (TEST,) log densities of single weeks, nats
    uniforms: Tensor  # (TEST,) cdfs of single weeks at the measured levels
    paths: Tensor  # (draws, TEST) levels in ppm, given the weeks before the test


def co2() -> tuple[pd.DatetimeIndex, Tensor, Tensor]:
    """Returns dates (N), levels (N) in ppm and covariates (N, 7).

    Missing levels are NaN. The covariates are the date and harmonics of the season.
    """
    series = sm.datasets.co2.load_pandas().data["co2"]
    date = torch.linspace(-1, 1, len(series))[:, None]
    day = torch.tensor(series.index.day_of_year.to_numpy(), dtype=torch.float32)
    angles = 2 * math.pi * day[:, None] / 365.25 * torch.arange(1, HARMONICS + 1)
    covariates = torch.cat([date, angles.sin(), angles.cos()], 1)
    return series.index, torch.tensor(series.to_numpy()), covariates


def panel(z: Tensor, covariates: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cuts a series into windows of at most two years without gaps.

    Returns values (B, 104), zero after the end of a window, and the keyword arguments
    of ``fit``: the windows' covariates and lengths.
    """
    missing = [-1, *z.isnan().nonzero().flatten().tolist(), len(z)]
    windows = []
    for before, end in pairwise(missing):
        stop = max(before + 1, end - WINDOW) + STRIDE
        starts = [start for start in range(before + 1, stop, STRIDE) if start < end]
        windows += [slice(start, min(start + WINDOW, end)) for start in starts]
    lengths = torch.tensor([w.stop - w.start for w in windows])
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    context = pad([covariates[w] for w in windows])
    return pad([z[w] for w in windows]), {"context": context, "lengths": lengths}


def fit_network(
    seed: int, train: tuple[Any, ...], validation: tuple[Any, ...], epochs: int
) -> tuple[gx.Autoregressive, gx.FitResult]:
    """Fits a GRU to windows and keeps the weights of the best validation epoch."""
    torch.manual_seed(seed)
    head, context = gx.heads.StudentT(), gx.Covariates(1 + 2 * HARMONICS)
    gru = gx.conditioners.Recurrent((), head.num_params, hidden=32, context=context)
    model = gx.Autoregressive(gru, head, (WINDOW,))
    result = gx.fit(
        model,
        *train,
        validation=validation,
        epochs=epochs,
        batch_size=32,
        optimizer=partial(torch.optim.AdamW, lr=5e-3, weight_decay=1.0),
        seed=seed,
        progress=False,
    )
    return model, result


@torch.no_grad()
def network_forecast(
    window: gx.Autoregressive, x: Tensor, covariates: Tensor, units: Tensor, draws: int
) -> Forecast:
    """The exact distribution of the test weeks given all weeks since the last gap."""
    mean, scale = units
    z = ((x.diff() - mean) / scale).float()
    first = z.isnan().nonzero().max() + 1
    history, test = z[first:-TEST], z[-TEST:]
    model = gx.Autoregressive(window.conditioner, window.head, (len(z) - first,)).eval()
    forecast = model(covariates[first:]).conditional_on_prefix(history)
    changes = mean + scale * forecast.sample((draws,)).double()
    return Forecast(
        forecast.log_prob_sites(test) - scale.log(),
        forecast.to_uniform(test),
        x[-TEST - 1] + changes.cumsum(-1),
    )


def mixture(parts: list[Forecast]) -> Forecast:
    """Mixes forecasts with equal weights: densities and cdfs are means."""
    scores = torch.stack([part.scores for part in parts]).logsumexp(0)
    uniforms = torch.stack([part.uniforms for part in parts]).mean(0)
    paths = torch.cat([part.paths for part in parts])
    return Forecast(scores - math.log(len(parts)), uniforms, paths)


def gaussian_ar(x: Tensor, covariates: Tensor, draws: int) -> tuple[int, Forecast]:
    """An AR(p) of the changes with covariates, by least squares; BIC chooses p."""
    changes = x.diff()
    lags = changes.unfold(0, MAX_LAG + 1, 1)  # each change after those before it
    fixed = covariates[-len(lags) :].to(x)
    fixed = torch.cat([torch.ones_like(fixed[:, :1]), fixed], 1)
    train = lags.isfinite().all(1)
    train[-TEST:] = False
    fits = []
    for p in range(1, MAX_LAG + 1):
        inputs, target = torch.cat([fixed, lags[:, -1 - p : -1]], 1), lags[:, -1]
        weights = torch.linalg.lstsq(inputs[train], target[train, None]).solution[:, 0]
        variance = (target - inputs @ weights)[train].square().mean()
        bic = train.sum() * variance.log() + len(weights) * train.sum().log()
        fits.append((bic.item(), p, weights, variance.sqrt(), inputs[-TEST:]))
    _, p, weights, scale, inputs = min(fits, key=lambda fit: fit[0])
    one_week = dist.Normal(x[-TEST - 1 : -1] + inputs @ weights, scale)
    path = changes[-TEST - p : -TEST].expand(draws, p)
    for location in fixed[-TEST:] @ weights[:-p]:
        step = location + path[:, -p:] @ weights[-p:] + scale * torch.randn(draws)
        path = torch.cat([path, step[:, None]], 1)
    paths = x[-TEST - 1] + path[:, p:].cumsum(1)
    return p, Forecast(one_week.log_prob(x[-TEST:]), one_week.cdf(x[-TEST:]), paths)


def seasonal_naive(x: Tensor) -> Tensor:
    """Log densities of the test levels given the level of a year ago (TEST,)."""
    growth = (x[YEAR:] - x[:-YEAR])[:-TEST]
    growth = growth[growth.isfinite()]
    level = x[-TEST - YEAR : -YEAR] + growth.mean()
    return dist.Normal(level, growth.std(correction=0)).log_prob(x[-TEST:])


def bands(paths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower end of the central 90% of paths, their median and the upper end."""
    tail = (1 - LEVEL) / 2
    return tuple(paths.quantile(q, 0) for q in (tail, 0.5, 1 - tail))


def yearly(values: Tensor) -> Tensor:
    return values.double().view(-1, YEAR).mean(1)


def mean_and_error(values: Tensor) -> str:
    """The mean and two standard errors of it."""
    return f"{values.mean():.3f} ± {2 * values.std() / math.sqrt(len(values)):.3f}"


def report_networks(
    results: list[gx.FitResult], members: list[Forecast], measured: Tensor
) -> None:
    """Single networks: similar scores of weeks, different levels after eight years."""
    print(
        f"\n{'network':<10}{'best epoch':>11}{'fit, s':>8}{'test nats per week':>24}"
        f"{'error in year 8, ppm':>24}"
    )
    for k, (result, member) in enumerate(zip(results, members, strict=True)):
        error = yearly(member.paths.median(0).values - measured)[-1]
        score = mean_and_error(member.scores)
        row = f"{result.best_epoch + 1:>11}{result.seconds:>8.1f}{score:>24}"
        print(f"GRU {k + 1:<6}{row}{error:>24.1f}")


def report_scores(scores: dict[str, Tensor]) -> None:
    first, *_ = scores
    print(
        f"\n{'one-week forecasts':<30}{'test nats per week':>20}"
        f"{'gain of the GRUs':>25}"
    )
    for name, score in scores.items():
        gain = "" if name == first else mean_and_error(scores[first] - score)
        print(f"{name:<30}{mean_and_error(score):>20}{gain:>25}")


def report_bands(forecasts: dict[str, Forecast], measured: Tensor) -> None:
    """Coverage and error of the eight-year forecasts, by the year ahead."""
    head = "".join(f"{year:>6}" for year in range(1, TEST // YEAR + 1))
    print(f"\n{'eight-year forecasts: year ahead':<40}{head}")
    for name, forecast in forecasts.items():
        low, middle, high = bands(forecast.paths)
        inside = (low < measured) & (measured < high)
        lines = {
            "weeks in the 90% band": (inside, "6.0%"),
            "median minus measured, ppm": (middle - measured, "6.1f"),
            "width of the band, ppm": (high - low, "6.1f"),
        }
        for title, (values, form) in lines.items():
            row = "".join(format(value, form) for value in yearly(values).tolist())
            print(f"{f'{name}: {title}':<40}{row}")


def draw_band(axes: plt.Axes, x: Sequence, paths: Sequence, k: int, name: str) -> None:
    """A shaded band for the first forecast, a dashed outline for the second."""
    low, middle, high = paths
    axes.plot(x, middle, color=f"C{k}", label=f"{name}: median")
    if k == 0:
        style = {"color": f"C{k}", "alpha": 0.2, "linewidth": 0}
        axes.fill_between(x, low, high, **style, label=f"{name}: 90% band")
    else:
        style = {"color": f"C{k}", "linewidth": 0.8, "linestyle": "--"}
        axes.plot(x, low, **style, label=f"{name}: 90% band")
        axes.plot(x, high, **style)


def picture(
    dates: pd.DatetimeIndex,
    x: Tensor,
    forecasts: dict[str, Forecast],
    members: list[Forecast],
    out: Path,
) -> None:
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure, axes = plt.subplot_mosaic(
        [["fan", "fan"], ["error", "calibration"]], figsize=(7, 5.4)
    )
    fan, error, check = axes["fan"], axes["error"], axes["calibration"]
    years = torch.arange(TEST // YEAR) + 1
    for member in members:
        gap = yearly(member.paths.median(0).values - x[-TEST:])
        error.plot(years, gap, color="C0", linewidth=0.5, zorder=1)
    error.lines[0].set_label("each GRU: median")
    for k, (name, forecast) in enumerate(forecasts.items()):
        paths = bands(forecast.paths)
        draw_band(fan, dates[-TEST:], paths, k, name)
        draw_band(error, years, [yearly(q - x[-TEST:]) for q in paths], k, name)
    shown = dates[-TEST - 2 * YEAR :]
    fan.plot(shown, x[-len(shown) :], "k", linewidth=0.8, label="measured")
    fan.axvline(dates[-TEST], color="0.4", linestyle=":", linewidth=0.8)
    fan.set(xlabel="year", ylabel="carbon dioxide (ppm)", xlim=shown[[0, -1]])
    fan.set_title("(a) Forecast from the dotted line on", loc="left")
    fan.legend(loc="upper left")
    error.axhline(0.0, color="black", linewidth=0.8)
    error.set(xlabel="years ahead", xlim=(1, TEST // YEAR), ylim=(-7, 11))
    error.set_ylabel("forecast minus measured (ppm)")
    error.set_title("(b) Mean error of each year", loc="left")
    error.legend(loc="upper left", ncols=2)
    uniforms = {name: forecast.uniforms for name, forecast in forecasts.items()}
    calibration(check, uniforms, TEST)
    check.set_title("(c) Calibration of one-week forecasts", loc="left")
    check.legend(loc="upper left")
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("forecasting.png"), metavar="FILE"
    )
    parser.add_argument(
        "--smoke-test", action="store_true", help="run a few steps to check the code"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    start = time.perf_counter()
    networks, epochs, draws = (2, 2, 50) if args.smoke_test else (5, 60, 400)
    dates, x, covariates = co2()
    covariates, changes = covariates[1:], x.diff()  # torch's diff is one week shorter
    known = changes[: -TEST - VALIDATION]
    known = known[known.isfinite()]
    units = torch.stack([known.mean(), known.std()])
    z = ((changes - units[0]) / units[1]).float()
    parts = slice(-TEST - VALIDATION), slice(-TEST - VALIDATION, -TEST)
    train, validation = (panel(z[part], covariates[part]) for part in parts)
    print(f"{len(train[0])} training windows, {len(validation[0])} for validation")
    fits = [fit_network(seed, train, validation, epochs) for seed in range(networks)]
    members = [network_forecast(fit, x, covariates, units, draws) for fit, _ in fits]
    report_networks([result for _, result in fits], members, x[-TEST:])
    mixed = mixture(members)
    order, ar = gaussian_ar(x, covariates, len(mixed.paths))
    forecasts = {"GRUs": mixed, f"AR({order})": ar}

    single = torch.stack([member.scores for member in members]).mean(0)
    report_scores(
        {
            "GRUs": mixed.scores,
            "one GRU (mean of all)": single,
            f"AR({order})": ar.scores,
            "seasonal naive": seasonal_naive(x),
        }
    )
    report_bands(forecasts, x[-TEST:])
    picture(dates, x, forecasts, members, args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
