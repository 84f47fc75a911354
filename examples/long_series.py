"""Probabilistic forecasts of electricity demand by networks with a long memory.

    python examples/long_series.py [--out FILE] [--seed 0] [--smoke-test]

The data are the electricity demand in England and Wales in each half hour from 5 June
to 27 August 2000, in gigawatts (GW): 4032 values (Taylor, "Short-term electricity
demand forecasting using double seasonal exponential smoothing", Journal of the
Operational Research Society 54, 2003; load_taylor of the package pmdarima). Demand
repeats with a period of a day (48 steps) and of a week (336 steps). The models have no
calendar. They must find both periods in the history.

The first eight weeks are the training data, the next two the validation data, which
decide when the training stops, and the last two the test data. All models describe the
changes z_t = (x_t - x_{t-1}) / unit, where the unit is their standard deviation. The
models are compared by log densities of the demand x_t in GW given all half hours before
it, log p(z_t | z_{<t}) - log unit, in nats per half hour; higher is better.

The baseline is a Gaussian autoregression (AR) of all lags up to p, by least squares:

    p(z_t | z_{<t}) = Normal(a_t, scale),      a_t = sum_{k <= p} w_k z_{t-k},

where BIC chooses p. Four networks are added to it: a GRU, dilated causal convolutions,
and the state space models S4D and Mamba. Each computes all parameters of a Student-t
distribution,

    p(z_t | z_{<t}) = StudentT(df_t, a_t + loc_t, scale_t),

so the width and the tails depend on the history too. The networks are fitted to windows
of 22 days. The first eight days of a window are given. S4D is also fitted without the
AR, that is, with a_t = 0.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from _plots import calibration
from pmdarima.datasets import load_taylor
from torch import Tensor
from torch.nn.functional import conv1d, pad

import pyro_genexact as gx

DAY, WEEK = 48, 336  # half hours
GIVEN, WINDOW, STRIDE = 8 * DAY, 22 * DAY, DAY // 2
TEST = VALIDATION = 2 * WEEK
LEVEL = 0.9  # of all intervals

NETWORKS = {
    "GRU": partial(gx.conditioners.Recurrent, hidden=64),
    "convolution": partial(
        gx.conditioners.CausalConv, width=32, dilations=[2**i for i in range(9)]
    ),
    "S4D": partial(gx.conditioners.StateSpace, width=32),
    "Mamba": partial(gx.conditioners.StateSpace, kind="selective", width=32, state=16),
}


class State(NamedTuple):
    """The sites read, the last of them, and the state of the network."""

    position: int
    version: list[int]
    recent: Tensor  # (B, p)
    inner: Any


class Autoregression(gx.Conditioner):
    """A linear autoregression, to which a network may be added.

    Args:
        weights: (p,), the weights of the lags p ... 1.
        num_params: P, the number of parameters per site.
        place: the index of the location among them.
        network: a conditioner that computes the other parameters, and what is added to
            the location; by default all of them are 0.
    """

    def __init__(
        self,
        weights: Tensor,
        num_params: int,
        place: int = 0,
        network: gx.Conditioner | None = None,
    ) -> None:
        super().__init__()
        self.num_params, self.network = num_params, network
        self.register_buffer("weights", weights)
        self.register_buffer("place", torch.eye(num_params)[place])

    def linear(self, y: Tensor, count: int) -> Tensor:
        """The last ``count`` predictions (B, count, P), from y and zeros before it."""
        p = len(self.weights)
        y = pad(y, (max(p + count - 1 - y.shape[1], 0), 0))[:, -(p + count - 1) :]
        return conv1d(y[:, None], self.weights[None, None])[:, 0, :, None] * self.place

    def start(self, context: None, batch_size: int) -> tuple[Tensor, State]:
        recent = self.weights.new_zeros(batch_size, len(self.weights))
        phi, inner = recent.new_zeros(batch_size, self.num_params), None
        if self.network is not None:
            phi, inner = self.network.start(None, batch_size)
        return phi, State(0, self.new_version(), recent, inner)

    def extend(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        added, inner = 0.0, None
        if self.network is not None:
            added, inner = self.network.extend(y, state.inner)
        state = self.advance(state, y.shape[1])
        both = torch.cat([state.recent, y], 1)
        phi = self.linear(both, y.shape[1]) + added
        return phi, state._replace(recent=both[:, y.shape[1] :], inner=inner)

    def forward(self, y: Tensor, context: None = None) -> Tensor:
        phi = self.linear(pad(y[:, :-1], (1, 0)), y.shape[1])
        return phi if self.network is None else phi + self.network(y)

    def reorder(self, state: State, index: Tensor) -> State:
        self.advance(state, 0)
        inner = None
        if self.network is not None:
            inner = self.network.reorder(state.inner, index)
        recent = state.recent.index_select(0, index)
        return State(state.position, list(state.version), recent, inner)


class Continued(gx.DistributionModule):
    """The rest of a window given its first eight days, which are the context."""

    context = GIVEN

    def __init__(self, window: gx.Autoregressive) -> None:
        super().__init__()
        self.window = window

    def forward(self, prefix: Tensor) -> gx.distributions.AutoregressiveDistribution:
        return self.window().conditional_on_prefix(prefix)


class Forecast(NamedTuple):
    """Forecasts of the test weeks."""

    scores: Tensor  # (TEST,) log densities of single half hours, nats
    uniforms: Tensor  # (TEST,) cdfs of single half hours at the measured demand
    days: Tensor  # (draws, 14, DAY) GW, each day given all before it
    paths: Tensor  # (draws, TEST) GW, given all before the test weeks
    draw: float  # seconds for ``paths``


def autoregression(changes: Tensor, order: int | None = None) -> tuple[Tensor, Tensor]:
    """Fits an AR by least squares; returns the weights of lags p ... 1 and the scale.

    BIC chooses p, up to eight days, unless it is given. One QR decomposition of all
    lags has the residual sums of squares of all p.
    """
    lags = changes.unfold(0, GIVEN + 1, 1).flip(1)  # each change, then those before it
    target, (q, r) = lags[:, 0], torch.linalg.qr(lags[:, 1:])
    projections = q.T @ target
    squares = target.square().sum() - projections.square().cumsum(0)
    n, orders = len(target), torch.arange(1, GIVEN + 1)
    bic = n * (squares / n).log() + orders * math.log(n)
    p = int(bic.argmin()) + 1 if order is None else order
    solution = torch.linalg.solve_triangular(
        r[:p, :p], projections[:p, None], upper=True
    )
    return solution[:, 0].flip(0), (squares[p - 1] / n).sqrt()


def fit_network(
    name: str, weights: Tensor, z: Tensor, epochs: int, stride: int, seed: int
) -> tuple[gx.Autoregressive, gx.FitResult]:
    """Fits a network to the training weeks and keeps the best validation epoch."""
    torch.manual_seed(seed)
    head = gx.heads.StudentT()  # its parameters are df, loc and scale
    network = NETWORKS[name]((), head.num_params)
    network = Autoregression(weights, head.num_params, 1, network)
    model = gx.Autoregressive(network, head, (WINDOW,))
    train = z[: -VALIDATION - TEST].unfold(0, WINDOW, stride)
    last = z[None, -VALIDATION - TEST - GIVEN : -TEST]
    result = gx.fit(
        Continued(model),
        train[:, GIVEN:],
        train[:, :GIVEN],
        validation=(last[:, GIVEN:], last[:, :GIVEN]),
        epochs=epochs,
        batch_size=4,
        optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
        progress=False,
    )
    return model, result


@torch.no_grad()
def forecast(
    fitted: gx.Autoregressive, x: Tensor, z: Tensor, unit: Tensor, draws: int
) -> Forecast:
    """Evaluates the test weeks, and samples each day and both weeks."""

    def model(steps: int) -> gx.Autoregressive:
        return gx.Autoregressive(fitted.conditioner, fitted.head, (steps,)).eval()

    def sample(start: int, steps: int) -> Tensor:
        rest = model(start + steps)().conditional_on_prefix(z[:start])
        return x[start] + unit * rest.sample((draws,)).double().cumsum(-1)

    d, first = model(len(z))(), len(z) - TEST
    scores, uniforms = d.log_prob_sites(z)[first:], d.to_uniform(z)[first:]
    days = [sample(start, DAY) for start in range(first, len(z), DAY)]
    begin = time.perf_counter()
    paths = sample(first, TEST)
    seconds = time.perf_counter() - begin
    return Forecast(scores - unit.log(), uniforms, torch.stack(days, 1), paths, seconds)


def seasonal_naive(x: Tensor, draws: int) -> Forecast:
    """The demand of a week ago plus independent Gaussian changes."""
    scale = (x[WEEK:-TEST] - x[: -TEST - WEEK]).std()
    week_ago, measured = x[-TEST - WEEK : -WEEK], x[-TEST:]
    d = dist.Normal(week_ago, scale)
    noise = scale * torch.randn(draws, 2, WEEK).double().cumsum(1)
    paths = x[-TEST - WEEK : -TEST] + noise
    days = d.sample((draws,)).view(draws, -1, DAY)
    return Forecast(d.log_prob(measured), d.cdf(measured), days, paths.flatten(1), 0.0)


def crps(draws: Tensor, x: Tensor) -> Tensor:
    """Continuous ranked probability score of draws (S, ...), for outcomes x (...)."""
    ordered, count = draws.sort(0).values, len(draws)
    rank = torch.arange(count).view(-1, *[1] * x.dim()) * 2 + 1 - count
    return (draws - x).abs().mean(0) - (rank * ordered).mean(0) / count


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean and two standard errors, with days as the independent units."""
    days = values.view(-1, DAY).double().mean(1)
    return days.mean().item(), 2 * days.std().item() / math.sqrt(len(days))


def report(
    forecasts: dict[str, Forecast],
    facts: dict[str, tuple[int, float]],
    baseline: str,
    x: Tensor,
) -> None:
    """One row per model; ± is two standard errors."""
    print(
        f"\n{'':<18}{'param-':>8}{'fit,':>6}{'test nats per':>17}{'gain over':>17}"
        f"{'inside':>8}{'day ahead: CRPS,':>19}{'inside':>8}{'672 steps,':>12}"
        f"\n{'':<18}{'eters':>8}{'s':>6}{'half hour':>17}{'the AR':>17}"
        f"{'90%':>8}{'GW':>19}{'90%':>8}{'s':>12}"
    )
    measured = x[-TEST:].view(-1, DAY)
    for name, found in forecasts.items():
        size, seconds = facts[name]
        score, gain, ranked = (
            "{:.3f} ± {:.3f}".format(*mean_and_error(values))
            for values in (
                found.scores,
                found.scores - forecasts[baseline].scores,
                crps(found.days, measured).flatten(),
            )
        )
        inside = ((found.uniforms - 0.5).abs() < LEVEL / 2).double().mean()
        low, high = gx.diagnostics.central_intervals(found.days, [LEVEL])[0]
        ahead = ((low < measured) & (measured < high)).double().mean()
        print(
            f"{name:<18}{size:>8}{seconds:>6.0f}{score:>17}{gain:>17}{inside:>8.1%}"
            f"{ranked:>19}{ahead:>8.1%}{found.draw:>12.1f}"
        )


def draw_fan(axes: plt.Axes, x: Tensor, pair: dict[str, Forecast]) -> None:
    """Two days of history and five days of forecasts, which start on a Monday."""
    (best, network), (name, ar) = pair.items()
    steps, start = 5 * DAY, len(x) - TEST
    ahead = torch.arange(1, steps + 1) / DAY
    paths = network.paths[:, :steps]
    gx.diagnostics.plot_fan(paths, ahead, ax=axes, color="C0", label=best)
    bounds = gx.diagnostics.central_intervals(ar.paths[:, :steps], [LEVEL])[0]
    lines = axes.plot(ahead, bounds.T, color="C1", linewidth=0.8, linestyle="--")
    lines[0].set_label(f"{name}, central {LEVEL:.0%}")
    days = torch.arange(1 - 2 * DAY, steps + 1) / DAY
    measured = x[start - 2 * DAY : start + steps]
    axes.plot(days, measured, "k", linewidth=0.8, label="measured")
    axes.axvline(0, ymax=0.78, color="0.4", linestyle=":", linewidth=0.8)
    names = ("Sat", "Sun", "Mon", "Tue", "Wed", "Thu", "Fri")
    axes.set_xticks(torch.arange(-2, 5) + 0.5, names)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="", ylabel="demand (GW)", xlim=(-2, 5), ylim=(18, 46))
    axes.set_title("(a) Forecast from the dotted line on", loc="left")
    axes.legend(loc="upper center", ncols=3)


def picture(
    x: Tensor, forecasts: dict[str, Forecast], pair: tuple[str, str], out: Path
) -> None:
    """Draws all scores, and more of the two models in ``pair``."""
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure, axes = plt.subplot_mosaic(
        [["fan"] * 3, ["scores", "hours", "calibration"]], figsize=(7, 5.4)
    )
    shown = {name: forecasts[name] for name in pair}
    draw_fan(axes["fan"], x, shown)
    for place, found in enumerate(forecasts.values()):
        mean, error = mean_and_error(found.scores)
        axes["scores"].errorbar(mean, -place, xerr=error, fmt="o", color="C0")
    axes["scores"].set_yticks([-i for i in range(len(forecasts))], [*forecasts])
    axes["scores"].set(xlabel="test nats per half hour")
    axes["scores"].set_title("(b) Log scores, ± 2 s.e.", loc="left")
    for name, found in shown.items():
        by_hour = found.scores.view(-1, DAY).mean(0)
        axes["hours"].plot(torch.arange(DAY) / 2, by_hour, label=name)
    axes["hours"].set(xlabel="hours after midnight", ylabel="test nats per half hour")
    axes["hours"].set_xticks(range(0, 25, 6))
    axes["hours"].set_title("(c) Log scores by hour", loc="left")
    axes["hours"].legend(loc="lower left")
    uniforms = {name: found.uniforms for name, found in shown.items()}
    calibration(axes["calibration"], uniforms, TEST)
    axes["calibration"].set_title("(d) Calibration", loc="left")
    axes["calibration"].legend(loc="upper left")
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("long_series.png"), metavar="FILE"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument(
        "--smoke-test", action="store_true", help="run a few steps to check the code"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    torch.manual_seed(0)
    start = time.perf_counter()
    epochs, stride, draws = (1, 7 * DAY, 10) if args.smoke_test else (30, STRIDE, 200)
    x = torch.tensor(load_taylor()) / 1000  # GW
    changes = x.diff()
    unit = changes[: -VALIDATION - TEST].std()
    z = (changes / unit).float()

    forecasts = {"seasonal naive": seasonal_naive(x, draws)}
    facts = {"seasonal naive": (1, 0.0)}
    chosen, _ = autoregression(z[:-TEST].double())
    for order in (2, DAY, len(chosen)):
        begin = time.perf_counter()
        weights, scale = autoregression(z[:-TEST].double(), order)
        head = gx.heads.Parametric(dist.Normal, scale=scale.item())
        ar = Autoregression(weights.float(), head.num_params)
        model, name = gx.Autoregressive(ar, head, (WINDOW,)), f"AR({order})"
        facts[name] = order + 1, time.perf_counter() - begin
        forecasts[name] = forecast(model, x, z, unit, draws)
    baseline = name
    weights = autoregression(z[: -VALIDATION - TEST].double(), order)[0].float()
    tasks = [("S4D", torch.zeros(1), "S4D alone")]
    tasks += [(network, weights, f"AR + {network}") for network in NETWORKS]
    validation = {}
    for network, lags, name in tasks:
        model, result = fit_network(network, lags, z, epochs, stride, args.seed)
        size = sum(p.numel() for p in model.parameters())
        facts[name] = size + int(lags.count_nonzero()), result.seconds
        validation[name] = result.validation[result.best_epoch] / VALIDATION
        print(
            f"{name}: best epoch {result.best_epoch + 1} of {len(result.train)}, "
            f"validation {validation[name] - unit.log():.3f} nats per half hour"
        )
        forecasts[name] = forecast(model, x, z, unit, draws)
    report(forecasts, facts, baseline, x)
    best = max(validation, key=validation.__getitem__)
    picture(x, forecasts, (best, baseline), args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
