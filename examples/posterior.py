"""Guides for the eight schools, in two parametrisations, against the exact posterior.

    python examples/posterior.py [--out posterior.png] [--smoke-test]

The data are the effects of coaching on test scores in eight schools, in points, with
their standard errors (Rubin, "Estimation in Parallel Randomized Experiments", 1981). In
the non-centred model the latents are mu, tau and eight standardised effects, which are
nearly independent given the data. In the centred model they are mu, tau and the effects
themselves. A small tau confines these effects to a narrow range, so the posterior is a
funnel. Both models have the same posterior of the effects. Given tau, this posterior is
Gaussian, and one integral over a grid of tau yields the exact means, standard
deviations and evidence.

The example compares flows as guides with Gaussian guides, with Pyro's AutoIAFNormal and
with NUTS. The tables report:

* ELBO: the evidence lower bound in nats;
* gap: the log evidence minus the ELBO, which is the KL divergence of the guide from the
  posterior in nats;
* k-hat: the Pareto shape of the importance ratios: the median and the range of five
  sets of 10,000 draws. Above 0.7, neither the draws nor their corrections are reliable;
* means, sds: the largest error of a mean and of a standard deviation among mu, tau,
  log(tau) and the eight effects, in standard deviations of the exact posterior. The
  first pair is for the guide's draws, the second for the same draws weighted by
  Pareto-smoothed importance sampling (PSIS);
* s: the seconds of the fit, or of the chain.

The flows take 2000 steps. The Gaussians take 1000 steps with a learning rate that is
three times as high. Longer fits give smaller k-hats: without ``steps``, ``fit_guide``
continues until the ELBO is flat, which takes the flows 4000 to 8000 steps. NUTS runs
one chain on the latents, and one on the noise of the fitted flow (NeuTra). Its
effective draws are those of the worst coordinate. The jobs run in two processes with
one thread each, and each job's seconds are measured while another job runs.
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
from statistics import median
from typing import Any, NamedTuple

import arviz as az
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
JOBS = ["AutoFlow, nsf", IAF, "NUTS", "AutoIAFNormal", *GAUSSIANS]  # long ones first
ROWS = [*GUIDES, "NUTS", f"NUTS in {IAF}"]


class Sizes(NamedTuple):
    steps: int = 2000
    draws: int = 10_000  # of a guide
    warmup: int = 200
    chain: int = 400
    depth: int = 10  # of NUTS's trees
    sets: int = 5  # of draws, for k-hat


class Row(NamedTuple):
    """The result of a job; coordinates are mu, tau, log(tau) and the effects."""

    draws: np.ndarray  # (S, 11)
    weights: np.ndarray  # (S,), a sum of 1
    seconds: float
    elbo: float = math.nan
    khats: tuple[float, ...] = ()  # one for each set of draws
    divergences: int = 0
    resampled: dict[str, np.ndarray] = {}


class Truth(NamedTuple):
    log_evidence: float
    mean: Tensor  # (11,)
    sd: Tensor
    log_tau: Tensor  # (K,) a grid
    log_prob: Tensor  # (K,) of log(tau)
    first_mean: Tensor  # (K,) of the first effect given tau
    first_sd: Tensor  # (K,)


def exact() -> Truth:
    """Integrates over log(tau) on a grid; mu and the effects are Gaussian given tau."""
    log_tau = torch.linspace(-12, 8, 4001).double()[:, None]
    y, sigma = Y.double(), SIGMA.double()
    tau = log_tau.exp()
    variance = tau**2 + sigma**2  # of y given mu and tau
    v = 1 / (1 / 5**2 + (1 / variance).sum(1, keepdim=True))  # of mu given tau and y
    m = v * (y / variance).sum(1, keepdim=True)
    prior = (
        dist.HalfCauchy(5.0).log_prob(tau) + log_tau + dist.Normal(0.0, 5.0).log_prob(m)
    )
    likelihood = dist.Normal(m, variance.sqrt()).log_prob(y).sum(1, keepdim=True)
    # Bayes' rule at mu = m
    log_p = (prior + likelihood - dist.Normal(m, v.sqrt()).log_prob(m))[:, 0]
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
    """The rows of one guide or of NUTS, for one model.

    The job of the iaf also runs NUTS on the noise of the flow.
    """
    model, name, sizes = task
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    if name == "NUTS":
        return {(model, name): nuts(MODELS[model], lambda draws: draws, sizes)}
    guide = GUIDES[name](MODELS[model])
    effort = {"steps": sizes.steps, "lr": 0.01}
    if name in GAUSSIANS:
        effort = {"steps": sizes.steps // 2, "lr": 0.03}
    result = gx.fit_guide(MODELS[model], guide, Y, SIGMA, **effort, progress=False)
    psis = partial(gx.diagnostics.psis, MODELS[model], guide, Y, SIGMA)
    found, *others = (psis(num_samples=sizes.draws) for _ in range(sizes.sets))
    row = Row(
        coordinates(found.draws),
        found.log_weights.exp().numpy(),
        result.seconds,
        found.elbo,
        (found.khat, *(other.khat for other in others)),
        0,
        {site: x.numpy() for site, x in found.resample(2000).items()},
    )
    rows = {(model, name): row}
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
    """The largest error of a mean and of a deviation, in exact standard deviations."""
    true, sd = truth.mean.numpy(), truth.sd.numpy()
    mean = weights @ row.draws
    spread = np.sqrt(weights @ (row.draws - mean) ** 2)
    return (
        f"{np.abs((mean - true) / sd).max():>7.2f}{np.abs(spread / sd - 1).max():>6.2f}"
    )


def report(model: str, rows: dict[tuple[str, str], Row], truth: Truth) -> None:
    print(f"\n{'':<56}{'draws':>13}{'PSIS':>13}")
    print(
        f"{model:<24}{'ELBO':>8}{'gap':>6}{'k-hat (range)':>18}"
        f"{'means':>7}{'sds':>6}{'means':>7}{'sds':>6}{'s':>6}"
    )
    for name in ROWS:
        row = rows[model, name]
        plain = errors(row, truth, np.full(len(row.draws), 1 / len(row.draws)))
        if name in GUIDES:
            khat = (
                f"{median(row.khats):.2f} ({min(row.khats):.2f}-{max(row.khats):.2f})"
            )
            numbers = f"{row.elbo:>8.2f}{truth.log_evidence - row.elbo:>6.2f}{khat:>18}"
            after = errors(row, truth, row.weights)
        else:
            ess = min(float(az.ess(x[None])) for x in row.draws.T)
            numbers, after = f"{f'{ess:.0f} effective draws':>32}", " " * 13
        print(f"{name:<24}{numbers}{plain}{after}{row.seconds:>6.1f}")
    plain, moved = (rows[model, name].divergences for name in ROWS[-2:])
    print(f"Divergences of NUTS: {plain}; in the noise of the flow: {moved}")


def check(rows: dict[str, Row]) -> None:
    """Prints ArviZ's summary and leave-one-out of the best reliable guide.

    The guide is the one with the highest ELBO among those with a k-hat up to 0.7.
    """
    name = max(rows, key=lambda n: (median(rows[n].khats) <= 0.7, rows[n].elbo))
    draws = {site: torch.as_tensor(x) for site, x in rows[name].resampled.items()}
    data = gx.diagnostics.inference_data(
        non_centred, draws, Y, SIGMA, coords={"school": SCHOOLS}
    )
    print(f"\nArviZ, non-centred, {name}: {len(draws['mu'])} draws, resampled by PSIS")
    print(az.summary(data, var_names=["mu", "tau", "theta"], kind="stats").to_string())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a k above 0.7, which the table shows
        loo = az.loo(data, pointwise=True)
    print(f"\n{loo}")


def panel(axes: plt.Axes, row: Row, truth: Truth, color: str) -> None:
    """Draws of the first effect and log(tau), and exact highest density regions."""
    order = np.random.default_rng(0).permutation(len(row.draws))[:1500]
    dots = {"s": 2, "color": color, "alpha": 0.5, "linewidths": 0}
    axes.scatter(row.draws[order, 3], row.draws[order, 2], **dots, rasterized=True)
    theta = torch.linspace(-25, 45, 281).double()
    inside = (truth.log_tau > -7) & (truth.log_tau < 4)
    first = dist.Normal(truth.first_mean[inside, None], truth.first_sd[inside, None])
    density = (truth.log_prob[inside, None] + first.log_prob(theta)).exp()
    ranked = density.flatten().sort(descending=True).values
    mass = ranked.cumsum(0) / ranked.sum()
    levels = [ranked[(mass < share).sum()].item() for share in (0.99, 0.9, 0.5)]
    lines = {"colors": "black", "linewidths": 0.7}
    axes.contour(theta, truth.log_tau[inside], density, levels, **lines)
    axes.set(xlim=(-20, 40), ylim=(-6, 3.7), xticks=(0, 20))


def picture(rows: dict[tuple[str, str], Row], truth: Truth, out: Path) -> None:
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    titles = {
        "AutoMultivariateNormal": "AutoMultivariate-\nNormal",
        "AutoIAFNormal": "AutoIAFNormal\n(Pyro)",
        IAF: "AutoFlow,\niaf",
        "AutoFlow, nsf": "AutoFlow,\nnsf",
        "NUTS": "NUTS",
        f"NUTS in {IAF}": "NUTS in\nAutoFlow, iaf",
    }
    figure, grid = plt.subplots(2, 6, figsize=(7, 4), sharex=True, sharey=True)
    for letter, model, line in zip("ab", MODELS, grid, strict=True):
        for k, (axes, (name, title)) in enumerate(
            zip(line, titles.items(), strict=True)
        ):
            row = rows[model, name]
            panel(axes, row, truth, f"C{k}" if k < 4 else "0.4")
            axes.set_title(title if letter == "a" else "", fontsize=7.5)
            note = f"{row.divergences} divergent"
            if name in GUIDES:
                note = f"k-hat {median(row.khats):.2f}"
            axes.text(0.05, 0.03, note, transform=axes.transAxes, fontsize=7)
        line[0].set_ylabel(f"({letter}) {model}\nlog(tau)")
    figure.supxlabel("effect of school A (points)", fontsize=8)
    dot = Line2D([], [], marker="o", linestyle="", color="gray", label="draws")
    curve = Line2D([], [], color="black", linewidth=0.7)
    curve.set_label("exact regions of 50, 90 and 99%")
    figure.legend(handles=[dot, curve], loc="outside upper center", ncols=2)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("posterior.png"), metavar="FILE"
    )
    parser.add_argument(
        "--smoke-test", action="store_true", help="run a few steps to check the code"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    sizes = Sizes(20, 1000, 5, 10, 3, 2) if args.smoke_test else Sizes()
    truth, tasks = exact(), [(model, name, sizes) for name in JOBS for model in MODELS]
    rows: dict[tuple[str, str], Row] = {}
    setup = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(2, **setup) as pool:
        for found in pool.map(job, tasks):
            rows |= found

    tau = f"{truth.mean[1]:.2f} ± {truth.sd[1]:.2f}"
    print(f"Exact log evidence {truth.log_evidence:.3f} nats; tau {tau} points")
    for model in MODELS:
        report(model, rows, truth)
    check({name: rows["non-centred", name] for name in GUIDES})
    picture(rows, truth, args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
