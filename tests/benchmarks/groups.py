"""Guides of hundreds of latents against exact log evidences: schools in groups, and a regression with many coefficients.

    OMP_NUM_THREADS=1 python tests/benchmarks/groups.py schools [--groups 50 500] [--guides NAME ...] [--known] [--steps N]
    OMP_NUM_THREADS=1 python tests/benchmarks/groups.py cost [--groups 50 500 5000] [--guides NAME ...]
    OMP_NUM_THREADS=1 python tests/benchmarks/groups.py regression [--latents 300] [--guides NAME ...] [--steps N]

``schools``: mu ~ Normal(0, 5), tau ~ HalfCauchy(5), theta_g ~ Normal(mu, tau), y_g ~ Normal(theta_g, sigma_g), with unequal sigma_g that
are known. mu is integrated out in closed form, and log tau by a sum over 20,000 points. With ``--known``, tau is 2. ``cost``: the CPU
time of a step of 16 draws, of all guides in turn, medians of ten rounds. ``regression``: y ~ Normal(X b, 1) with 400 rows, b ~ Normal(0, 1),
and correlated columns of X; the evidence is a multivariate normal density. Gaps are log evidence minus ELBO (nats), at the start and
after a fit by ``fit_guide`` with its defaults, or with ``--steps`` and ``--draws``. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from timing import show
from torch import Tensor

import pyro_genexact as gx

TAU, PRIOR = 2.0, 5.0


def schools(y: Tensor, sigma: Tensor, tau: float | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, PRIOR))
    scale: Any = pyro.sample("tau", dist.HalfCauchy(5.0)) if tau is None else tau
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, scale))
        pyro.sample("sigma", dist.Delta(sigma), obs=sigma)  # a site, so that Amortized reads it
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def simulated(groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sigma = 0.5 + 2 * torch.rand(groups, generator=generator)
    y = 1.5 + (TAU**2 + sigma**2).sqrt() * torch.randn(groups, generator=generator)
    return y, sigma


def given_tau(y: Tensor, sigma: Tensor, tau: Tensor) -> Tensor:
    """log p(y | tau) (K,) of scales (K,): y is normal with a diagonal covariance plus a constant."""
    y, variance = y.double(), sigma.double() ** 2 + tau.double().unsqueeze(-1) ** 2
    one, first, second = ((y**k / variance).sum(-1) for k in range(3))
    square = second - first**2 / (PRIOR**-2 + one)
    logdet = variance.log().sum(-1) + (1 + PRIOR**2 * one).log()
    return -(square + logdet + len(y) * math.log(2 * math.pi)) / 2


def evidence(y: Tensor, sigma: Tensor, tau: float | None) -> float:
    if tau is not None:
        return given_tau(y, sigma, torch.tensor([tau])).item()
    log_tau = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    parts = [given_tau(y, sigma, part.exp()) for part in log_tau.split(500)]
    prior = dist.HalfCauchy(torch.tensor(5.0, dtype=torch.float64)).log_prob(log_tau.exp()) + log_tau
    return (torch.cat(parts) + prior).logsumexp(0).item() + math.log(12 / 20_000)


def regression(x: Tensor, y: Tensor) -> None:
    with pyro.plate("coefficients", x.shape[1]):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b @ x.mT, 1.0), obs=y)


def rows_of(latents: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, latents, generator=generator)
    x = x + 0.7 * x[:, :1]
    return x, 0.3 * x @ torch.randn(latents, generator=generator) + torch.randn(400, generator=generator)


AutoFlow, flows = gx.guides.AutoFlow, gx.flows
SCHOOLS: dict[str, Callable[..., Any]] = {
    "AutoFlow(blocks)": lambda: AutoFlow(schools, blocks="schools"),
    "AutoFlow": lambda: AutoFlow(schools),
    "AutoNormal": lambda: AutoNormal(schools),
    "Amortized": lambda: gx.guides.Amortized(schools, observed=("y", "sigma"), recipe=flows.iaf),
}
REGRESSION: dict[str, Callable[..., Any]] = {
    **{name: lambda name=name: AutoFlow(regression, getattr(flows, name)) for name in ("iaf", "realnvp", "coupling_nsf")},
    **{f"realnvp, rank {r}": lambda r=r: AutoFlow(regression, flows.realnvp, rank=r) for r in (20, 100)},
    "AutoMultivariateNormal": lambda: AutoMultivariateNormal(regression),
    "AutoNormal": lambda: AutoNormal(regression),
}  # fmt: skip


def elbo(model: Any, guide: Any, *args: Any, draws: int = 200) -> float:
    with torch.no_grad(), pyro.validation_enabled(False):
        loss = Trace_ELBO(num_particles=draws, vectorize_particles=True, max_plate_nesting=1)
        return -loss.loss(model, guide, *args)


def compared(model: Any, guides: Any, truth: float, options: argparse.Namespace, *args: Any) -> list[list[str]]:
    found = []
    for name in options.guides or guides:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide, begin = guides[name](), time.process_time()
        guide(*args)
        start = time.process_time() - begin
        before = truth - elbo(model, guide, *args)
        begin = time.process_time()
        result = gx.fit_guide(model, guide, *args, steps=options.steps, num_particles=options.draws, progress=False)
        seconds = time.process_time() - begin
        found.append([
            name, f"{before:.2f}", f"{start:.1f}", f"{truth - result.final:.2f}", str(result.steps),
            f"{1e3 * seconds / result.steps:.0f}", f"{seconds:.0f}",
        ])  # fmt: skip
        print(*found[-1], sep=", ", flush=True)
    return found


HEADER = ["guide", "gap at the start", "seconds", "gap after the fit", "steps", "ms per step", "seconds of the fit"]


def cost(options: argparse.Namespace) -> None:
    names = options.guides or ["AutoFlow(blocks)"]
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    steps: dict[tuple[str, int], Any] = {}
    for groups in options.groups:
        args = simulated(groups)
        for name in names:
            pyro.set_rng_seed(0)
            guide = SCHOOLS[name]()
            begin = time.process_time()
            guide(*args)
            print(f"{name}, {groups} groups: {time.process_time() - begin:.1f} s for the start", flush=True)
            steps[name, groups] = lambda guide=guide, args=args: loss.loss_and_grads(schools, guide, *args)
    times: dict[Any, list[float]] = {key: [] for key in steps}
    for _ in range(11):
        for key, step in steps.items():
            begin = time.process_time()
            step()
            times[key].append(time.process_time() - begin)
    medians = {key: 1e3 * statistics.median(found[1:]) for key, found in times.items()}
    rows = [[name, *(f"{medians[name, groups]:.1f}" for groups in options.groups)] for name in names]
    show(["ms per step of 16 draws", *(f"{groups} groups" for groups in options.groups)], rows, options.markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["schools", "cost", "regression"])
    parser.add_argument("--groups", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--latents", type=int, default=300)
    parser.add_argument("--guides", nargs="+")
    parser.add_argument("--known", action="store_true", help="tau is known")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--draws", type=int)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "cost":
        return cost(options)
    if options.what == "regression":
        x, y = rows_of(options.latents)
        covariance = (x @ x.mT).double() + torch.eye(len(y), dtype=torch.float64)
        truth = (
            dist.MultivariateNormal(torch.zeros(len(y), dtype=torch.float64), covariance).log_prob(y.double()).item()
        )
        show(HEADER, compared(regression, REGRESSION, truth, options, x, y), options.markdown)
        return None
    for groups in options.groups:
        y, sigma = simulated(groups)
        args = (y, sigma, TAU) if options.known else (y, sigma)
        truth = evidence(y, sigma, TAU if options.known else None)
        print(f"{groups} groups, log evidence {truth:.3f}")
        show(HEADER, compared(schools, SCHOOLS, truth, options, *args), options.markdown)
    return None


if __name__ == "__main__":
    main()
