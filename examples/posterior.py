"""Eight schools in two parametrisations: flows as guides beside Gaussians, Pyro's flow and NUTS, all against the exact posterior.

    python examples/posterior.py [--out posterior.png] [--smoke-test]

Effects of coaching in eight schools, with standard errors (Rubin, "Estimation in Parallel Randomized Experiments", 1981).
Non-centred, the latents are mu, tau and eight standardised effects, nearly independent given the data. Centred, they are
mu, tau and the effects themselves, which tau squeezes together: a funnel. Both are the same posterior of the effects. Given
tau all is Gaussian, so that one integral over tau, on a grid, gives means, standard deviations and the evidence: the truth.

* ELBO: in nats; below: the log evidence less the ELBO, the divergence of the guide from the posterior.
* k-hat: of the importance ratios of the guide's draws; above 0.7 neither they nor their corrections can be trusted.
* means, sds: the largest error among mu, tau, log(tau) and the eight effects, in standard deviations of the exact posterior, of the
  guide's draws and of the same draws weighed by Pareto-smoothed importance sampling (PSIS).

Gaussians are fitted in half of the steps of the flows, at a three times higher learning rate, which they can take. NUTS runs
one chain, on the latents and on the noise of the fitted flow (NeuTra); its effective draws are those of the worst coordinate.
Jobs run in two processes of one thread each, and seconds are those of a job beside another.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arviz as az
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.lines import Line2D
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.nn.functional import silu

import pyro_genexact as gx

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS = list("ABCDEFGH")


def non_centred(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def centred(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


MODELS = {"non-centred": non_centred, "centred": centred}
IAF = "AutoFlow, iaf"
GAUSSIANS = ("AutoNormal", "AutoMultivariateNormal")
GUIDES: dict[str, Callable[..., Any]] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": partial(AutoIAFNormal, hidden_dim=[64], num_transforms=2),
    IAF: gx.guides.AutoFlow,
    "AutoFlow, nsf": partial(
        gx.guides.AutoFlow,
        recipe=gx.flows.nsf,
        transforms=2,
        inverse=True,
        activation=silu,
    ),
}
JOBS = [
    "AutoFlow, nsf",
    IAF,
    "NUTS",
    "AutoIAFNormal",
    "AutoMultivariateNormal",
    "AutoNormal",
]  # long ones first
ROWS = [*GUIDES, "NUTS", f"NUTS in {IAF}"]


class Sizes(NamedTuple):
    steps: int = 2000
    draws: int = 10_000  # of a guide
    warmup: int = 200
    chain: int = 400
    depth: int = 10  # of NUTS's trees


class Row(NamedTuple):
    """What a job found; coordinates are mu, tau, log(tau) and the effects."""

    draws: np.ndarray  # (S, 11)
    weights: np.ndarray  # (S,), a sum of 1
    seconds: float
    elbo: float = math.nan
    khat: float = math.nan
    divergences: int = 0
    resampled: dict[str, np.ndarray] = {}


class Truth(NamedTuple):
    log_evidence: float
    mean: Tensor  # (11,)
    sd: Tensor
    log_tau: Tensor  # (K,), a grid, with the density of log(tau) and mean and sd of the first effect given tau
    log_prob: Tensor
    first_mean: Tensor
    first_sd: Tensor


def exact() -> Truth:
    log_tau, y, sigma = (
        torch.linspace(-12, 8, 4001).double()[:, None],
        Y.double(),
        SIGMA.double(),
    )
    tau = log_tau.exp()
    variance = tau**2 + sigma**2  # of y given mu and tau
    v = 1 / (1 / 5**2 + (1 / variance).sum(1, keepdim=True))  # of mu given tau and y
    m = v * (y / variance).sum(1, keepdim=True)
    prior = (
        dist.HalfCauchy(5.0).log_prob(tau) + log_tau + dist.Normal(0.0, 5.0).log_prob(m)
    )
    likelihood = dist.Normal(m, variance.sqrt()).log_prob(y).sum(1, keepdim=True)
    log_p = (prior + likelihood - dist.Normal(m, v.sqrt()).log_prob(m))[
        :, 0
    ]  # Bayes' rule at mu = m
    share = tau**2 / variance
    means = torch.cat([m, tau, log_tau, share * y + (1 - share) * m], 1)
    variances = torch.cat([v, 0 * v, 0 * v, share * sigma**2 + (1 - share) ** 2 * v], 1)
    weights = log_p.softmax(0)
    mean = weights @ means
    sd = (weights @ (variances + (means - mean) ** 2)).sqrt()
    log_evidence = log_p.logsumexp(0) + (log_tau[1, 0] - log_tau[0, 0]).log()
    return Truth(
        log_evidence.item(),
        mean,
        sd,
        log_tau[:, 0],
        log_p - log_evidence,
        means[:, 3],
        variances[:, 3].sqrt(),
    )


def coordinates(draws: dict[str, Tensor]) -> np.ndarray:
    mu, tau = draws["mu"].reshape(-1, 1), draws["tau"].reshape(-1, 1)
    theta = (
        draws["theta"].reshape(-1, 8)
        if "theta" in draws
        else mu + tau * draws["z"].reshape(-1, 8)
    )
    return torch.cat([mu, tau, tau.log(), theta], 1).double().numpy()


def job(task: tuple[str, str, Sizes]) -> dict[tuple[str, str], Row]:
    """The rows of one guide, or of NUTS, for one model; those of the first flow with NUTS in its noise."""
    model, name, sizes = task
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    if name == "NUTS":
        return {(model, name): nuts(MODELS[model], lambda draws: draws, sizes)}
    guide = GUIDES[name](MODELS[model])
    effort = (
        {"steps": sizes.steps // 2, "lr": 0.03}
        if name in GAUSSIANS
        else {"steps": sizes.steps, "lr": 0.01}
    )
    result = gx.fit_guide(MODELS[model], guide, Y, SIGMA, **effort, progress=False)
    found = gx.diagnostics.psis(MODELS[model], guide, Y, SIGMA, num_samples=sizes.draws)
    weights, again = (
        found.log_weights.exp().numpy(),
        {k: x.numpy() for k, x in found.resample(2000).items()},
    )
    rows = {
        (model, name): Row(
            coordinates(found.draws),
            weights,
            result.seconds,
            found.elbo,
            found.khat,
            0,
            again,
        )
    }
    if name == IAF:
        rows[model, f"NUTS in {IAF}"] = transported(
            MODELS[model], guide, sizes, result.seconds
        )
    return rows


def transported(
    model: Callable[..., None], guide: gx.guides.AutoFlow, sizes: Sizes, fit: float
) -> Row:
    """NUTS draws the noise of the flow, whose posterior is nearly a standard normal."""
    neutra = NeuTraReparam(guide.requires_grad_(False))

    def latents(noise: dict[str, Tensor]) -> dict[str, Tensor]:
        return neutra.transform_sample(
            next(iter(noise.values())).unsqueeze(1)
        )  # before the plate's dim

    row = nuts(poutine.reparam(model, config=lambda site: neutra), latents, sizes)
    return row._replace(seconds=row.seconds + fit)


def nuts(
    model: Callable[..., None],
    latents: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    sizes: Sizes,
) -> Row:
    start = time.perf_counter()
    options = {
        "jit_compile": True,
        "ignore_jit_warnings": True,
        "max_tree_depth": sizes.depth,
    }
    kernel = NUTS(model, target_accept_prob=0.9, **options)
    mcmc = MCMC(kernel, sizes.chain, warmup_steps=sizes.warmup, disable_progbar=True)
    mcmc.run(Y, SIGMA)
    draws = coordinates(latents(mcmc.get_samples()))
    divergences = len(mcmc.diagnostics()["divergences"]["chain 0"])
    seconds = time.perf_counter() - start
    return Row(
        draws, np.full(len(draws), 1 / len(draws)), seconds, divergences=divergences
    )


def errors(row: Row, truth: Truth, weights: np.ndarray) -> str:
    """The largest error of a mean and of a standard deviation, in exact standard deviations."""
    true, sd = truth.mean.numpy(), truth.sd.numpy()
    mean = weights @ row.draws
    spread = np.sqrt(weights @ (row.draws - mean) ** 2)
    return (
        f"{np.abs((mean - true) / sd).max():>9.2f}{np.abs(spread / sd - 1).max():>9.2f}"
    )


def report(model: str, rows: dict[tuple[str, str], Row], truth: Truth) -> None:
    print(
        f"\n{model:<24}{'ELBO':>9}{'below':>8}{'k-hat':>8}{'means':>9}{'sds':>9}{'PSIS: means':>13}{'sds':>9}{'s':>7}"
    )
    for name in ROWS:
        row = rows[model, name]
        if name in GUIDES:
            numbers = (
                f"{row.elbo:>9.2f}{truth.log_evidence - row.elbo:>8.2f}{row.khat:>8.2f}"
            )
            after = f"{errors(row, truth, row.weights):>22}"
        else:
            ess = min(float(az.ess(x[None])) for x in row.draws.T)
            numbers, after = " " * 25, f"{f'{ess:.0f} effective draws':>22}"
        plain = errors(row, truth, np.full(len(row.draws), 1 / len(row.draws)))
        print(f"{name:<24}{numbers}{plain}{after}{row.seconds:>7.1f}")
    plain, moved = (rows[model, name].divergences for name in ROWS[-2:])
    print(f"divergences of NUTS: {plain}, in the flow {moved}")


def check(rows: dict[str, Row]) -> None:
    """Effects and leave-one-out by ArviZ: the draws of the guide with the highest ELBO, if k-hat lets it pass, drawn again."""
    name = max(rows, key=lambda name: (rows[name].khat <= 0.7, rows[name].elbo))
    draws = {site: torch.as_tensor(x) for site, x in rows[name].resampled.items()}
    data = gx.diagnostics.inference_data(
        non_centred, draws, Y, SIGMA, coords={"school": SCHOOLS}
    )
    print(
        f"\nArviZ, non-centred, {name}, {len(draws['mu'])} draws by the weights of PSIS:"
    )
    print(az.summary(data, var_names=["mu", "tau", "theta"], kind="stats").to_string())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a k above 0.7, which the table tells
        loo = az.loo(data, pointwise=True)
    print(f"\n{loo}")


def panel(axes: plt.Axes, row: Row, truth: Truth, color: str) -> None:
    """Draws of the first effect and log(tau), and the exact regions of highest density."""
    order = np.random.default_rng(0).permutation(len(row.draws))[:1500]
    axes.scatter(
        row.draws[order, 3],
        row.draws[order, 2],
        s=4,
        color=color,
        alpha=0.4,
        linewidths=0,
    )
    theta = torch.linspace(-25, 45, 281).double()
    inside = (truth.log_tau > -5) & (truth.log_tau < 4)
    first = dist.Normal(truth.first_mean[inside, None], truth.first_sd[inside, None])
    density = (truth.log_prob[inside, None] + first.log_prob(theta)).exp()
    ranked = density.flatten().sort(descending=True).values
    mass = ranked.cumsum(0) / ranked.sum()
    levels = [ranked[(mass < share).sum()].item() for share in (0.99, 0.9, 0.5)]
    axes.contour(
        theta, truth.log_tau[inside], density, levels, colors="black", linewidths=0.9
    )
    axes.set(xlim=(-20, 40), ylim=(-4.5, 3.7), xticks=(0, 20))


def picture(rows: dict[tuple[str, str], Row], truth: Truth, out: Path) -> None:
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    columns = [name for name in ROWS if name != "AutoNormal"]
    colors = [
        "tab:orange",
        "tab:purple",
        "tab:blue",
        "tab:cyan",
        "dimgray",
        "tab:green",
    ]
    figure, grid = plt.subplots(
        2, len(columns), figsize=(13, 6), sharex=True, sharey=True, layout="constrained"
    )
    for model, line in zip(MODELS, grid, strict=True):
        for name, axes, color in zip(columns, line, colors, strict=True):
            row = rows[model, name]
            panel(axes, row, truth, color)
            note = (
                f"k-hat {row.khat:.2f}"
                if name in GUIDES
                else f"divergences: {row.divergences}"
            )
            axes.set_title(f"{name}\n{note}", fontsize=11)
        line[0].set_ylabel(f"{model}\nlog(tau)")
    figure.supxlabel("effect of school A", fontsize=11)
    dot = Line2D(
        [], [], marker="o", linestyle="", color="gray", markersize=4, label="draws"
    )
    line = Line2D(
        [], [], color="black", linewidth=0.9, label="exact: regions of 50, 90 and 99 %"
    )
    figure.legend(
        handles=[dot, line], loc="outside upper center", ncols=2, frameon=False
    )
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("posterior.png"), metavar="FILE"
    )
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="few steps and draws, to see that everything runs",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    sizes = Sizes(20, 1000, 5, 10, 3) if args.smoke_test else Sizes()
    truth, tasks = exact(), [(model, name, sizes) for name in JOBS for model in MODELS]
    rows: dict[tuple[str, str], Row] = {}
    with ProcessPoolExecutor(
        2, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for found in pool.map(job, tasks):
            rows |= found

    print(
        f"exact log evidence {truth.log_evidence:.3f} nats, tau {truth.mean[1]:.2f} ± {truth.sd[1]:.2f}"
    )
    for model in MODELS:
        report(model, rows, truth)
    check({name: rows["non-centred", name] for name in GUIDES})
    picture(rows, truth, args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
