"""Posteriors whose standard deviation is ruled by a heavy tail: fits, exact draws and diagnostics compared with quadrature.

    OMP_NUM_THREADS=1 python tests/benchmarks/heavy_tail.py [--seeds 3] [--only lognormal] [--objectives elbo ...] [--markdown]

The model is a saturating curve, y_i ~ Normal(a (1 - exp(-b t_i)), s) at t = 1, 2, 4, 8 with a ~ Normal(0, 20) and s ~ HalfCauchy(1).
The curve is flat from the second point on, so the data bound b only from below, and the tail of b is that of its prior:
``lognormal`` has b ~ LogNormal(0, 1), whose sd a Gaussian in log b can give, and ``student`` and ``cubic`` have half a Student's t
with 5 and with 3 degrees of freedom, where the tail of log b is exponential. With 3, b^4 has no mean, and the sd of finitely many
draws is an uncertain number. ``wide`` has b ~ LogNormal(0, 1.5), where 0.1% of the mass makes half of the variance. ``few`` has the
first prior and three points, so that the density of s falls with s^-4, and ``bounded`` the first prior and a point at t = 0.3, which
bounds b from above as well.

The truth is a sum over a grid of b and s, with a integrated out. Each seed has a fit of ``AutoFlow`` with its defaults. Columns: the
sds of ``--draws`` draws of the guide, of the same draws with PSIS weights, and of as many proposals of ``sample_posterior`` with
"metropolis" and "importance", all divided by the true ones; the change of the sd by the weights, in percent; k-hat of the draws,
k-hat of the estimate of the mean of the latent's square (:meth:`Importance.khat_of`), and whether ``sample_posterior`` warned.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from timing import show
from torch import Tensor

import pyro_genexact as gx

LATENTS = ("a", "b", "s")
CHAINS, PROPOSALS = 4, 5


class Posterior(NamedTuple):
    prior: Callable[[], Any]  # of b
    t: tuple[float, ...]
    y: tuple[float, ...]

    def model(self) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 20.0))
        b = pyro.sample("b", self.prior())
        s = pyro.sample("s", dist.HalfCauchy(1.0))
        t, y = torch.tensor(self.t), torch.tensor(self.y)
        with pyro.plate("points", len(t)):
            pyro.sample("y", dist.Normal(a * (1 - torch.exp(-b * t)), s), obs=y)


def half_student(df: float) -> Any:
    return dist.FoldedDistribution(dist.StudentT(df))


FLAT = (1.0, 2.0, 4.0, 8.0), (9.4, 10.3, 9.8, 10.1)
POSTERIORS = {
    "lognormal": Posterior(lambda: dist.LogNormal(0.0, 1.0), *FLAT),
    "student": Posterior(lambda: half_student(5.0), *FLAT),
    "cubic": Posterior(lambda: half_student(3.0), *FLAT),
    "wide": Posterior(lambda: dist.LogNormal(0.0, 1.5), *FLAT),
    "few": Posterior(lambda: dist.LogNormal(0.0, 1.0), FLAT[0][:3], FLAT[1][:3]),
    "bounded": Posterior(lambda: dist.LogNormal(0.0, 1.0), (0.3, *FLAT[0]), (7.0, *FLAT[1])),
}


def truth(posterior: Posterior) -> dict[str, float]:
    """The sds of the latents: a has a Gaussian posterior given b and s, whose logarithms are on a grid."""
    log_b, log_s = torch.meshgrid(
        torch.linspace(-8, 16, 2401).double(), torch.linspace(-14, 10, 1201).double(), indexing="ij"
    )
    b, s = log_b.exp(), log_s.exp()
    t, y = torch.tensor(posterior.t).double(), torch.tensor(posterior.y).double()
    f = 1 - torch.exp(-b[..., None] * t)
    precision = f.square().sum(-1) / s**2 + 1 / 400
    mean = (f @ y) / s**2 / precision
    log_p = posterior.prior().log_prob(b) + log_b + dist.HalfCauchy(1.0).log_prob(s) + log_s
    log_p = log_p - len(t) * log_s - y.square().sum() / s**2 / 2 + precision * mean**2 / 2 - precision.log() / 2
    p = log_p.flatten().softmax(0).reshape(log_p.shape)
    assert max(p[0].sum(), p[-1].sum(), p[:, 0].sum(), p[:, -1].sum()) < 1e-6

    def sd(first: Tensor, second: Tensor) -> float:
        return ((p * second).sum() - (p * first).sum() ** 2).sqrt().item()

    return {"a": sd(mean, mean**2 + 1 / precision), "b": sd(b, b**2), "s": sd(s, s**2)}


def weighted_sd(found: Any, name: str) -> float:
    mean = found.expectation(lambda d: d[name].double())
    return found.expectation(lambda d: (d[name].double() - mean) ** 2).sqrt().item()


def exact(model: Callable[[], None], guide: Any, method: str, draws: int, seed: int) -> tuple[dict[str, float], bool]:
    """The sds of draws of ``sample_posterior``, and whether it warned."""
    size = {"draws": draws // (CHAINS * PROPOSALS), "chains": CHAINS, "proposals": PROPOSALS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = gx.sample_posterior(model, guide, method=method, seed=seed, predictions=False, progress=False, **size)
    return {name: float(data["posterior"][name].std()) for name in LATENTS}, any(
        "k-hat" in str(w.message) for w in caught
    )


def rows(title: str, seed: int, objective: str, draws: int) -> Iterator[list[str]]:
    posterior = POSTERIORS[title]
    true = truth(posterior)
    pyro.set_rng_seed(seed)
    guide = gx.guides.AutoFlow(posterior.model)
    options: Any = {} if objective == "elbo" else {"objective": objective}
    start = time.process_time()
    result = gx.fit_guide(posterior.model, guide, seed=seed, progress=False, **options)
    seconds = time.process_time() - start
    torch.manual_seed(seed)
    found = gx.diagnostics.psis(posterior.model, guide, num_samples=draws)
    print(f"{title}, {seed}, {objective}: ELBO {result.final:.3f}, log evidence {found.log_evidence:.3f}, {result.steps} steps, "
          f"{seconds:.0f} s, {found!r}", file=sys.stderr, flush=True)  # fmt: skip
    ways = {method: exact(posterior.model, guide, method, draws, seed) for method in ("metropolis", "importance")}
    for name in LATENTS:
        sds = [found.draws[name].double().std().item(), weighted_sd(found, name)]
        sds += [sd[name] for sd, _ in ways.values()]
        ratios = [f"{sd / true[name]:.3f}" for sd in sds]
        squares = found.khat_of(lambda d, name=name: d[name].double() ** 2).item()
        numbers = [f"{found.khat:.2f}", f"{squares:.2f}", f"{found.ess / draws:.2f}"]
        warned = "yes" if any(warned for _, warned in ways.values()) else "no"
        change = f"{100 * (sds[1] / sds[0] - 1):+.0f}"
        yield [f"{title}, {objective}, {seed}", name, f"{true[name]:.3f}", *ratios, change, *numbers, warned]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=[*POSTERIORS], default=[*POSTERIORS])
    parser.add_argument("--objectives", nargs="+", default=["elbo"], help="of fit_guide")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = [(t, seed, o) for t in options.only for o in options.objectives for seed in range(options.seeds)]
    table = [row for case in cases for row in rows(*case, options.draws)]
    names = [
        "guide",
        "PSIS",
        "metropolis",
        "importance",
        "change, %",
        "k-hat",
        "k-hat of square",
        "ESS / draws",
        "warned",
    ]
    show(["posterior, objective, seed", "latent", "true sd", *names], table, options.markdown)


if __name__ == "__main__":
    main()
