"""NUTS in a hierarchical model with a learned likelihood and with the exact one: posterior means, sds and times.

    python tests/benchmarks/learned_likelihood.py [--simulations 10000] [--draws 4000] [--groups 8] [--rows 20] [--no-nuts]

The likelihood of a row is a skew logistic distribution with location and scale of its group and a common asymmetry. It is
learned from simulations of one group. The hierarchical model has several groups, whose locations and scales have hyperpriors.
The learned posterior is compared with the exact one by weights of the exact draws, by NUTS, and by weights of the draws of NUTS.
The comparisons by weights do not have the noise of a second chain, which is .06 sds or more for 2000 draws of each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

import pyro_genexact as gx


def exact(mu: Tensor, sigma: Tensor, asymmetry: Tensor) -> Any:
    return dist.SkewLogistic(mu, sigma, asymmetry)


def simulator(rows: int) -> None:
    """One group; its output has no density that a program could read."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-0.5, 0.8))
    asymmetry = pyro.sample("asymmetry", dist.LogNormal(0.0, 0.7))
    with pyro.plate("rows", rows):
        y = exact(*(x.expand(*x.shape[:-1], rows) for x in (mu, sigma, asymmetry))).sample()
        pyro.deterministic("y", y, event_dim=0)


def hierarchy(likelihood: Callable[..., Any], groups: int, rows: int, y: Tensor | None = None) -> None:
    centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
    between = pyro.sample("between", dist.LogNormal(0.0, 0.5))
    log_scale = pyro.sample("log_scale", dist.Normal(-0.5, 0.5))
    spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.3))
    asymmetry = pyro.sample("asymmetry", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", groups, dim=-1):
        mu = pyro.sample("mu", dist.Normal(centre, between))
        sigma = pyro.sample("sigma", dist.LogNormal(log_scale, spread))
        with pyro.plate("rows", rows, dim=-2):
            pyro.sample("y", likelihood(mu, sigma, asymmetry), obs=y)


def run(likelihood: Callable[..., Any], y: Tensor, draws: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """Returns draws by latent, and the seconds; Pyro's compilation makes both runs several times faster."""
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    kernel = NUTS(hierarchy, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, draws, warmup_steps=500, disable_progbar=True)
    mcmc.run(likelihood, y.shape[-1], y.shape[-2], y)
    return mcmc.get_samples(), time.perf_counter() - start


def gradient(likelihood: Callable[..., Any], y: Tensor, repeats: int = 50) -> float:
    """Returns the median milliseconds of the log-likelihood and its gradient."""
    times = []
    for _ in range(repeats):
        mu, sigma = (torch.ones(y.shape[-1]).requires_grad_() for _ in range(2))
        start = time.perf_counter()
        likelihood(mu, sigma, torch.tensor(1.2)).log_prob(y).sum().backward()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


@torch.no_grad()
def weights(draws: dict[str, Tensor], learned: Callable[..., Any], y: Tensor) -> Tensor:
    """Returns the weights (S,) that turn draws of the exact posterior into draws of the learned one."""
    totals = []
    for likelihood in (learned, exact):
        given = [draws[name].unsqueeze(-2) for name in ("mu", "sigma")]
        asymmetry = draws["asymmetry"][:, None, None].expand_as(given[0])
        totals.append(likelihood(*given, asymmetry).log_prob(y).sum((-1, -2)))
    return (totals[0] - totals[1]).softmax(0)


def compare(way: str, reference: dict[str, Tensor], found: dict[str, Tensor], weight: Tensor) -> None:
    """Prints differences of weighted draws to the reference, in units of its standard deviations."""
    weight, worst = weight / weight.sum(), [0.0, 0.0]
    for name, value in reference.items():
        w = weight.reshape(-1, *[1] * (value.dim() - 1))
        mean, sd = (w * found[name]).sum(0), value.std(0)
        shift, ratio = (mean - value.mean(0)) / sd, (w * (found[name] - mean).square()).sum(0).sqrt() / sd
        worst = [max(worst[0], shift.abs().max().item()), max(worst[1], (ratio - 1).abs().max().item())]
        print(f"{way} {name:<10} shifts {[round(x, 3) for x in shift.reshape(-1).tolist()]}")
        print(f"{way} {'':<10} sd ratios {[round(x, 3) for x in ratio.reshape(-1).tolist()]}")
    print(
        f"{way}: largest shift of a mean {worst[0]:.3f} reference sds (target 0.1), largest change of an sd {worst[1]:.3f} (0.1), "
        f"{1 / weight.square().sum():.0f} effective draws of {len(weight)}",
        flush=True,
    )


def errors(draws: dict[str, Tensor]) -> tuple[float, float]:
    """Returns the largest standard errors of a mean and of an sd, relative to the sd, by effective sample sizes."""
    means, sds = [], []
    for value in draws.values():
        square = (value - value.mean(0)).square()
        means.append(effective_sample_size(value[None]).min().rsqrt().item())
        relative = square.std(0) / square.mean(0) / 2
        sds.append((relative * effective_sample_size(square[None]).rsqrt()).max().item())
    return max(means), max(sds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--no-nuts", dest="nuts", action="store_false", help="only weights of the exact draws")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    learned = gx.likelihood(simulator, options.rows, simulations=options.simulations, vectorize=True, progress=False)
    print(
        f"learned from {options.simulations} simulations of {options.rows} rows in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    pyro.set_rng_seed(1)
    truth = {
        "centre": torch.tensor(1.0),
        "between": torch.tensor(1.0),
        "log_scale": torch.tensor(-0.5),
        "spread": torch.tensor(0.35),
    }
    condition = pyro.condition(hierarchy, {**truth, "asymmetry": torch.tensor(1.6)})
    y = pyro.poutine.trace(condition).get_trace(exact, options.groups, options.rows).nodes["y"]["value"]
    print(f"ms per gradient: exact {gradient(exact, y):.2f}, learned {gradient(learned, y):.2f}", flush=True)
    reference, seconds = run(exact, y, options.draws, 2)
    print(f"exact NUTS in {seconds:.0f} s", flush=True)
    compare("weighted", reference, reference, weights(reference, learned, y))
    if options.nuts:
        found, seconds = run(learned, y, options.draws, 2)
        print(f"learned NUTS in {seconds:.0f} s")
        for name, draws in (("exact", reference), ("learned", found)):
            print("standard errors of {}: at most {:.3f} sds for means, {:.3f} for sds".format(name, *errors(draws)))
        compare("NUTS", reference, found, torch.ones(options.draws))
        way = (
            "exact posterior by weights of the learned NUTS, against these draws"  # without the noise of a second chain
        )
        compare(way, found, found, 1 / weights(found, learned, y))


if __name__ == "__main__":
    main()
