"""The objectives of ``fit_guide`` and their gradients, on posteriors with a default ``AutoFlow``.

    OMP_NUM_THREADS=1 python tests/benchmarks/objectives.py [--data DIR] [--only NAME ...] [--seeds 2] [--markdown]

The posteriors are Neal's funnel in ten dimensions and the eight schools, non-centred, and with ``--data`` the fourteen of
posteriordb whose names contain one of ``--only``. Each fit ends when its bound is flat. Columns: steps and seconds of CPU on one
thread (means over seeds), and from 20,000 draws the ELBO (nats), the Pareto k-hat and the effective sample size relative to the draws
(medians over seeds).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import pyro
import torch
from neutra import funnel
from sample_posterior import SIGMA, Y
from timing import show

import pyro_genexact as gx

sys.path.insert(0, str(Path(__file__).parent / "posteriors"))
from data import POSTERIORS
from models import eight_schools

WAYS = {
    "elbo": {},
    "elbo, path gradient": {"path_gradient": True},
    "iwae": {"objective": "iwae"},
    "iwae, all gradients": {"objective": "iwae", "path_gradient": False},
    "forward": {"objective": "forward"},
    "forward, all gradients": {"objective": "forward", "path_gradient": False},
}
DRAWS = 20_000


def fit(model, args, seed, options):
    """Returns steps, seconds, ELBO, k-hat and relative ESS."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = gx.guides.AutoFlow(model)
    start = time.process_time()
    result = gx.fit_guide(model, guide, *args, seed=seed, progress=False, **options)
    seconds = time.process_time() - start
    found = gx.diagnostics.psis(model, guide, *args, num_samples=DRAWS)
    return result.steps, seconds, found.elbo, found.khat, found.ess / DRAWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", nargs="*", default=["garch"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    posteriors = {"funnel": (funnel, ()), "eight schools": (eight_schools, (Y, SIGMA))}
    if options.data is not None:
        for name, posterior in POSTERIORS.items():
            if any(part in name for part in options.only):
                posteriors[name] = posterior.model, posterior.read(options.data, name)[0]
    rows = []
    for name, (model, args) in posteriors.items():
        for way, kwargs in WAYS.items():
            columns = list(zip(*(fit(model, args, seed, kwargs) for seed in range(options.seeds)), strict=True))
            steps, seconds = map(statistics.fmean, columns[:2])
            elbo, khat, ess = map(statistics.median, columns[2:])
            rows.append([name, way, f"{steps:.0f}", f"{seconds:.1f}", f"{elbo:.3f}", f"{khat:.2f}", f"{ess:.3f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    show(["posterior", "objective", "steps", "s", "ELBO", "k-hat", "ESS / draws"], rows, options.markdown)


if __name__ == "__main__":
    main()
