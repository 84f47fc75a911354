"""Reference posteriors of posteriordb: automatic guides of this library, of Pyro and of NumPyro compared with long runs of NUTS.

    OMP_NUM_THREADS=1 python tests/benchmarks/posteriors --data DIR [--only NAME ...] [--guides NAME ...]
    python tests/benchmarks/posteriors --data DIR [--only NAME ...] --check

DIR holds ``NAME.data.json`` and ``NAME.npz`` (means, standard deviations and 2000 reference draws) of fourteen posteriors of
stan-dev/posteriordb. Guides of this library are fitted by ``fit_guide`` with default settings; Pyro's by the same function in the
time of the first, with the better of two learning rates; NumPyro's by its SVI with as many steps and draws per step, also with the
better of two learning rates. Columns: ELBO (nats), Pareto k-hat and effective sample size of 10 000 draws, and, over the
coordinates, the largest error of a mean in reference standard deviations and the worst ratio of standard deviations, plain and
PSIS-corrected; seconds of CPU, on one thread those of a quiet machine. A peer's guide whose fits raise has the name of the error
and NaN; the message is on stderr. NumPyro's guides need the extra ``bench``.

``--check`` fits nothing. It compares the models with the reference draws, as ``check.py`` describes.
"""

import argparse
from pathlib import Path

from check import check
from data import POSTERIORS
from guides import DEFAULT, NUMPYRO, OURS, PYRO, attempted, better, fit_numpyro, fit_pyro, fit_torch


def table(name, guides, folder):
    """The rows of one posterior."""
    posterior = POSTERIORS[name]
    data, reference = posterior.read(folder, name)
    common = posterior.model, data, posterior.layout, reference
    seconds, steps = 60.0, 5000  # unless a flow says otherwise
    for guide in guides:
        if guide in OURS:
            row = fit_torch(guide, *common)
            if guide == "AutoFlow(iaf)":
                seconds, steps = row["seconds"], row["steps"]
        elif guide in PYRO:
            row = better(*(attempted(fit_pyro, guide, *common, seconds, lr) for lr in (0.03, 0.01)))
        else:
            row = better(*(attempted(fit_numpyro, guide, *common, steps, lr) for lr in (0.01, 0.003)))
        yield row


def line(cells):
    return f"| {' | '.join(cells)} |"


def cell(key, value):
    digits = {"seconds": 1, "z": 2}.get(key, 3)
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def show(rows):
    """Prints each row of a table in Markdown as soon as it is known."""
    for i, row in enumerate(rows):
        if not i:
            print(line(row), line("---" for _ in row), sep="\n")
        print(line(cell(*item) for item in row.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(POSTERIORS))
    parser.add_argument("--guides", nargs="*", default=DEFAULT, choices=[*OURS, *PYRO, *NUMPYRO])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    names = [next(name for name in POSTERIORS if part in name) for part in args.only]
    if args.check:
        show(check(names, args.data))
        return
    for name in names:
        print(f"\n{name}\n")
        show(table(name, args.guides, args.data))


if __name__ == "__main__":
    main()
