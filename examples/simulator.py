"""A stochastic epidemic, whose likelihood is unknown, and the posterior given real counts.

    python examples/simulator.py [--out simulator.png] [--smoke-test]

In January 1978 influenza went through an English boarding school with 763 boys. The
British Medical Journal of 4 March 1978 reported how many boys were in bed on each of
14 days, and that 512 boys fell ill.

In the model a susceptible boy becomes infected, is infectious for some time, then lies
in bed for some time, in three stages, and then is well. In each quarter of a day the
numbers of boys who change their state are binomial. Only counts are observed, so the
likelihood is a sum over all histories of the epidemic, which no formula computes.

``gx.guides.Amortized`` learns the posterior from simulations of the model. Four checks
follow:

* simulation-based calibration (SBC), for each latent, and TARP, for all jointly;
* the tail probability of the real counts under the simulations;
* posterior predictive epidemics over the counts;
* a particle filter. It estimates the likelihood of each draw without bias, so the
  draws of the guide, weighted by estimated likelihood x prior / guide, represent the
  exact posterior (importance sampling with random weights; Tran et al., "Importance
  sampling squared", 2013).

The tables report means and standard deviations of the posterior, and for each check its
numbers.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.stats import gaussian_kde, kstest
from torch import Tensor

import pyro_genexact as gx

BOYS = 763
IN_BED = [3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4]
DATA = {"in_bed": torch.tensor(IN_BED).float(), "ill": torch.tensor(512.0)}
STEPS = 4  # per day
STAGES = 3  # of the time in bed, which is then less variable than an exponential time
PRIORS: dict[str, dist.Distribution] = {
    "R0": dist.LogNormal(
        math.log(2.5), 0.5
    ),  # infections per boy, if all are susceptible
    "infectious": dist.LogNormal(0.0, 0.5),  # days
    "bed": dist.LogNormal(math.log(3.0), 0.4),  # days
    "susceptible": dist.Uniform(0.5, 1.0),  # share of the boys
    "first": dist.Categorical(torch.ones(10)),  # number of first cases, minus 1
}
LABELS = {
    "R0": "R0",
    "infectious": "days infectious",
    "bed": "days in bed",
    "susceptible": "share susceptible",
    "first": "first cases minus 1",
}
Latents = dict[str, Tensor]


class State(NamedTuple):
    """Numbers of boys, each of the shape of the latents."""

    susceptible: Tensor
    infectious: Tensor
    bed: list[Tensor]  # by stage

    @classmethod
    def start(cls, latents: Latents) -> State:
        first = latents["first"] + 1.0
        susceptible = (BOYS * latents["susceptible"]).round()
        empty = torch.zeros_like(susceptible)
        return cls(susceptible - first, first.expand_as(empty), [empty] * STAGES)

    def next_day(self, latents: Latents) -> State:
        """Moves boys from state to state, a few times."""
        susceptible, infectious, bed = self
        R0, days, days_bed, _, _ = (latents[name] for name in PRIORS)
        to_bed = -torch.expm1(-1 / (STEPS * days)).expand_as(infectious)
        next_stage = -torch.expm1(-STAGES / (STEPS * days_bed)).expand_as(infectious)
        for _ in range(STEPS):
            risk = -torch.expm1(-R0 / days * infectious / BOYS / STEPS)
            infected = torch.binomial(susceptible, risk)
            moved = torch.binomial(infectious, to_bed)
            up = [torch.binomial(stage, next_stage) for stage in bed]
            susceptible = susceptible - infected
            infectious = infectious + infected - moved
            came = [moved, *up[:-1]]
            bed = [n + a - b for n, a, b in zip(bed, came, up, strict=True)]
        return State(susceptible, infectious, bed)

    def in_bed(self) -> Tensor:
        return torch.stack(self.bed).sum(0)

    def ill(self, latents: Latents) -> Tensor:
        return (BOYS * latents["susceptible"]).round() - self.susceptible


def count(boys: Tensor) -> dist.Distribution:
    """The reported number of boys in bed."""
    return dist.Poisson(boys + 1e-3)


def total(boys: Tensor) -> dist.Distribution:
    """The reported number of ill boys; some diagnoses are wrong."""
    return dist.Normal(boys, 10.0)


def epidemic() -> None:
    latents = {name: pyro.sample(name, prior) for name, prior in PRIORS.items()}
    state, in_bed = State.start(latents), []
    for _ in IN_BED:
        state = state.next_day(latents)
        in_bed.append(state.in_bed())
    pyro.sample("in_bed", count(torch.stack(in_bed, -1)).to_event(1))
    pyro.sample("ill", total(state.ill(latents)))


class Sizes(NamedTuple):
    simulations: int = 30_000
    epochs: int = 20
    checks: int = 1000  # simulations for SBC and TARP
    draws: int = 2000  # weighted by the particle filter
    particles: int = 200
    predictive: int = 2000


def particle_filter(latents: Latents, particles: int) -> Tensor:
    """Estimates of the log-likelihood of each draw (S,), unbiased after exp."""
    latents = {name: x.float().unsqueeze(-1) for name, x in latents.items()}
    start = State.start(latents)
    many = (len(start.susceptible), particles)
    state = State(
        start.susceptible.expand(many),
        start.infectious.expand(many),
        [stage.expand(many) for stage in start.bed],
    )
    estimate = torch.zeros(len(start.susceptible))
    for day, number in enumerate(DATA["in_bed"]):
        state = state.next_day(latents)
        weights = count(state.in_bed()).log_prob(number)
        if day == len(IN_BED) - 1:
            weights = weights + total(state.ill(latents)).log_prob(DATA["ill"])
        estimate += weights.logsumexp(1) - math.log(particles)
        shares = (weights - weights.amax(1, keepdim=True)).exp()
        index = torch.multinomial(shares, particles, replacement=True)
        state = State(
            state.susceptible.gather(1, index),
            state.infectious.gather(1, index),
            [stage.gather(1, index) for stage in state.bed],
        )
    return estimate


@torch.no_grad()
def weighted(
    guide: gx.guides.Amortized, draws: Latents, particles: int
) -> gx.diagnostics.Importance:
    prior = torch.stack([p.log_prob(draws[name]) for name, p in PRIORS.items()]).sum(0)
    log_q = guide.log_prob(draws, DATA)
    log_ratios = particle_filter(draws, particles) + prior - log_q
    return gx.diagnostics.Importance(log_ratios, draws)


def moments(values: Tensor, weights: Tensor) -> tuple[float, float]:
    x = values.double()
    mean = (weights * x).sum()
    return mean.item(), (weights * (x - mean) ** 2).sum().sqrt().item()


def report(found: gx.diagnostics.Importance, tests: dict[str, Tensor]) -> None:
    """Prints both posteriors, and Kolmogorov-Smirnov tests of the ranks."""
    size = len(found.log_ratios)
    columns = f"{'guide':>16}{'particle filter':>20}{'error, sd':>12}{'SBC, p':>9}"
    print(f"\n{'mean ± sd':<22}{columns}")
    for name, label in LABELS.items():
        plain = moments(found.draws[name], torch.full((size,), 1 / size))
        exact = moments(found.draws[name], found.log_weights.exp())
        error = (plain[0] - exact[0]) / exact[1]
        print(
            f"{label:<22}{plain[0]:>9.2f} ± {plain[1]:.2f}{exact[0]:>13.2f} ± "
            f"{exact[1]:.2f}{error:>12.2f}{p_value(tests[name]):>9.2f}"
        )
    print(f"TARP, all latents jointly: p = {p_value(tests['TARP']):.2f}")
    print(
        f"Weights: {found.ess:.0f} effective of {size} draws, k-hat {found.khat:.2f}, "
        f"log evidence {found.log_evidence:.1f} nats"
    )


def p_value(u: Tensor) -> float:
    return float(kstest(u.double().numpy(), "uniform").pvalue)


def predict(draws: Latents) -> Tensor:
    """Quantiles (5, 14) of predicted numbers in bed."""
    data = gx.diagnostics.predictive_data(epidemic, draws, DATA, vectorize=True)
    statistics = {
        "highest count": lambda values: values["in_bed"].amax(-1),
        "day of the highest count": lambda values: values["in_bed"].argmax(-1),
        "sum of all counts": lambda values: values["in_bed"].sum(-1),
        "boys ill": lambda values: values["ill"].flatten(),
    }
    for name, p in gx.diagnostics.predictive_p_values(data, statistics).items():
        print(f"{name}: posterior predictive p = {p:.2f}")
    new = data["posterior_predictive"]
    print(
        f"{float((new['ill'] < 50).mean()):.0%} of the predicted epidemics die out early"
    )
    probs = [0.05, 0.25, 0.5, 0.75, 0.95]
    return torch.as_tensor(new["in_bed"].quantile(probs, ("chain", "draw")).values)


def picture(
    found: gx.diagnostics.Importance,
    bands: Tensor,
    tests: dict[str, Tensor],
    out: Path,
) -> None:
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(7, 2.9))
    fan(left, bands)
    joint(middle, found)
    calibration(right, tests)
    for axes, letter in zip((left, middle, right), "abc", strict=True):
        axes.set_title(f"({letter})", loc="left")
    figure.savefig(out)
    print(f"Wrote {out}")


def fan(axes: plt.Axes, bands: Tensor) -> None:
    day = np.arange(1, len(IN_BED) + 1)
    low, lower, middle, upper, high = bands.numpy()
    fill = {"color": "C0", "linewidth": 0}
    axes.fill_between(day, low, high, alpha=0.2, label="90% predicted", **fill)
    axes.fill_between(day, lower, upper, alpha=0.35, label="50% predicted", **fill)
    axes.plot(day, middle, label="median")
    axes.plot(day, IN_BED, "o", color="black", label="report")
    axes.set(xlabel="day", ylabel="boys in bed", ylim=(0, 480), xticks=(1, 7, 14))
    axes.legend(loc="upper right")


def joint(axes: plt.Axes, found: gx.diagnostics.Importance) -> None:
    """Regions with 50% and 90% of the draws, plain and weighted, equally smoothed."""
    x = torch.stack([found.draws["infectious"], found.draws["R0"]]).double().numpy()
    grid = np.meshgrid(np.linspace(0.2, 1.8, 100), np.linspace(0.8, 7.5, 100))
    for weights, draw, style in (
        (None, axes.contourf, {"colors": ["#99C7E0", "#4D9CC9"]}),
        (found.log_weights.exp().numpy(), axes.contour, {"colors": "black"}),
    ):
        kernel = gaussian_kde(x, bw_method=0.3, weights=weights)
        density = kernel(np.stack([g.ravel() for g in grid])).reshape(100, 100)
        ranked = np.sort(density.ravel())[::-1]
        mass = ranked.cumsum() / ranked.sum()
        levels = [ranked[(mass < share).sum()] for share in (0.9, 0.5)]
        draw(*grid, density, np.unique([*levels, ranked[0]]), **style)
    patch = Patch(color="#4D9CC9", label="guide")
    line = Line2D([], [], color="black", label="particle filter")
    axes.legend(handles=[patch, line], loc="upper left")
    axes.set(xlim=(0.2, 1.8), ylim=(0.8, 7.5), xlabel="days infectious", ylabel="R0")


def calibration(axes: plt.Axes, tests: dict[str, Tensor]) -> None:
    """Empirical cdfs of uniforms minus the diagonal, in a band of Kolmogorov-Smirnov."""
    size = len(tests["TARP"])
    band = 1.358 / math.sqrt(size)
    axes.axhspan(-band, band, color="0.88", linewidth=0, label="95% band")
    for name, u in tests.items():
        ordered = u.sort().values
        excess = (torch.arange(size) + 0.5) / size - ordered
        style = {"color": "black"} if name == "TARP" else {}
        axes.plot(ordered, excess, label=LABELS.get(name, name), **style)
    axes.set(xlim=(0, 1), ylim=(-1.3 * band, 5.2 * band))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_yticks([-0.05, 0, 0.05])
    axes.set(xlabel="normalised rank", ylabel="empirical cdf minus rank")
    axes.legend(loc="upper center", borderaxespad=0, fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("simulator.png"))
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    sizes = Sizes(500, 1, 50, 50, 10, 50) if args.smoke_test else Sizes()
    torch.set_num_threads(1)  # the networks are tiny
    pyro.set_rng_seed(0)

    start = time.perf_counter()
    guide = gx.guides.Amortized(epidemic, observed=tuple(DATA))
    result = gx.fit_amortized(
        epidemic,
        guide,
        simulations=sizes.simulations,
        vectorize=True,  # hidden draws differ between runs, which a check would report
        epochs=sizes.epochs,
        ensemble=1,  # the default, a mixture of four flows, takes longer
        progress=False,
    )
    print(f"{sizes.simulations} simulations, {result.steps} steps", end=", ")
    print(f"{time.perf_counter() - start:.0f} s")

    start = time.perf_counter()
    guide.draws(DATA, 1000)  # warns if the data are unlike all simulations
    print(f"1000 draws in {1e3 * (time.perf_counter() - start):.0f} ms")
    print(f"Tail probability of the counts: {guide.tail_probability(DATA):.2f}")

    check = {"num_simulations": sizes.checks, "vectorize": True}
    start = time.perf_counter()
    tests = gx.diagnostics.sbc_ranks(epidemic, guide, **check)
    tests["TARP"] = gx.diagnostics.tarp(epidemic, guide, **check)
    tests = {name: (r + torch.rand(r.shape)) / 100 for name, r in tests.items()}
    print(f"SBC and TARP: {time.perf_counter() - start:.0f} s")

    bands = predict(guide.draws(DATA, sizes.predictive))
    start = time.perf_counter()
    found = weighted(guide, guide.draws(DATA, sizes.draws), sizes.particles)
    print(f"particle filter: {time.perf_counter() - start:.0f} s")
    report(found, tests)
    picture(found, bands, tests, args.out)


if __name__ == "__main__":
    main()
