"""A table with columns of several kinds: its density, synthetic rows, missing cells and completions, by one model.

    python examples/mixed_table.py [--out mixed_table.png] [--smoke-test]

The rows are 4638 births in Pennsylvania, 1989-91 (Cattaneo, "Efficient semiparametric estimation of multi-valued
treatment effects under ignorability", Journal of Econometrics 2010), from a file that comes with statsmodels. A column
is a site of the chain rule and has a head of its own (PerSite). MADE predicts the heads' parameters from the columns
before; the baseline has the same heads and a conditioner that ignores them, which leaves independent marginals. Part of
the gain is a plain tie: the months since the birth before are 0 for every first child.

* Reals are standardised, so that their nats are of standardised values. A mother's age, in whole years, gets uniform
  noise first, without which it has no density. Counts are as they are.
* A missing cell is imputed from all other cells of its row, those after it too: p(cell | others) is proportional to the
  probability of the whole row, evaluated with every value that the cell may have (on a grid for reals). The imputed
  value is the median, whose absolute error is in years, months, visits and kg; or the mode of what has no order.
* A completion draws the last columns of a row given the first.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas
import statsmodels
import torch
from torch import Tensor

import pyro_genexact as gx

FILE = (
    Path(statsmodels.__file__).parent
    / "treatment"
    / "tests"
    / "results"
    / "cataneo2.csv"
)


class Kind(NamedTuple):
    name: str
    head: gx.Head
    site: (
        int | tuple[()]
    )  # what the network reads: one of so many categories, or a number
    values: Tensor  # evenly spaced, that a missing cell may have
    ordered: bool = False


def category(size: int) -> Kind:
    return Kind("category", gx.heads.Categorical(size), size, torch.arange(float(size)))


BINARY = Kind("binary", gx.heads.Bernoulli(), 2, torch.arange(2.0))
COUNT = Kind(
    "count",
    gx.heads.Mixture(gx.heads.NegativeBinomial(), 3),
    (),
    torch.arange(300.0),
    ordered=True,
)
REAL = Kind(
    "real",
    gx.heads.Mixture(gx.heads.Normal(), 3),
    (),
    torch.linspace(-7, 7, 281),
    ordered=True,
)
COLUMNS = [  # our name, the file's name, kind
    ("age, years", "mage", REAL),  # of the mother
    ("schooling", "medu", category(18)),  # years, of the mother
    ("white", "mrace", BINARY),
    ("married", "mmarried_", BINARY),
    (
        "siblings",
        "siblings",
        category(12),
    ),  # nobody here has 3, which no count family could tell
    (
        "months",
        "monthslb",
        COUNT,
    ),  # since the birth before; 0 for all first children and some others
    (
        "smoking, 0-3",
        "smoking",
        category(4),
    ),  # none, 1-5, 6-10, 11 or more cigarettes a day
    ("alcohol", "alcohol", BINARY),
    (
        "trimester",
        "prenatal",
        category(4),
    ),  # of the first prenatal visit; 0 for no visit
    ("visits", "nprenatal", COUNT),
    ("weight, kg", "bweight", REAL),  # of the newborn
]
NAMES, SOURCES, KINDS = (list(part) for part in zip(*COLUMNS, strict=True))
SHOWN = [
    NAMES.index(name)
    for name in ("age, years", "siblings", "smoking, 0-3", "visits", "weight, kg")
]


def births() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training, validation and test rows (N, 11); shift and scale (11,) that give the reals their units back."""
    generator = torch.Generator().manual_seed(0)
    table = pandas.read_csv(FILE).query("order > 0")  # 4 rows lack the order of birth
    table["siblings"], table["bweight"] = table.order - 1, table.bweight / 1000
    table["smoking"] = table.msmoke.map(
        {"0 daily": 0, "1-5 daily": 1, "6-10 daily": 2, "11+ daily": 3}
    )
    y = torch.tensor(table[SOURCES].to_numpy(float), dtype=torch.float32)
    y[:, 0] += torch.rand(len(y), generator=generator)
    train, validation, test = y[torch.randperm(len(y), generator=generator)].split(
        [3000, 638, 1000]
    )
    real = torch.tensor([kind is REAL for kind in KINDS])
    shift, scale = (
        torch.where(real, train.mean(0), 0.0),
        torch.where(real, train.std(0), 1.0),
    )
    train, validation, test = (
        (part - shift) / scale for part in (train, validation, test)
    )
    return train, validation, test, shift, scale


def mean(x: Tensor) -> str:
    """The mean with 2 standard errors."""
    return f"{x.mean():.3f} ± {2 * x.std() / math.sqrt(len(x)):.3f}"


@torch.no_grad()
def report_nats(
    baseline: gx.Autoregressive, model: gx.Autoregressive, test: Tensor
) -> None:
    before, after = (m().log_prob_sites(test) for m in (baseline, model))  # (N, 11)
    print(f"\n{'test nats (± 2 s.e.)':<24}{'independent':>12}{'model':>10}{'gain':>17}")
    for name, kind, a, b in zip(NAMES, KINDS, before.T, after.T, strict=True):
        print(
            f"{name:<13}{kind.name:<11}{a.mean():>12.3f}{b.mean():>10.3f}{mean(b - a):>17}"
        )
    a, b = before.sum(1), after.sum(1)
    print(f"{'total':<24}{a.mean():>12.3f}{b.mean():>10.3f}{mean(b - a):>17}")
    print(f"totals: independent {mean(a)}, model {mean(b)}")


@torch.no_grad()
def impute(model: gx.Autoregressive, test: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """log p(y_t | all other cells) of each row (N,), and the imputed value (N,)."""
    values = KINDS[t].values  # (K,)
    rows = test.repeat(len(values), 1, 1)  # (K, N, 11)
    rows[..., t] = values.unsqueeze(1)
    joint = torch.cat(
        [model().log_prob(part) for part in rows.split(20)]
    )  # (K, N), in parts to save memory
    total = (
        joint.logsumexp(0) + (values[1] - values[0]).log()
    )  # log p(others): the sum, or integral, over the cell
    weights = joint.softmax(0)
    best = (
        (weights.cumsum(0) < 0.5).sum(0) if KINDS[t].ordered else weights.argmax(0)
    )  # median or mode
    return model().log_prob(test) - total, values[best]


def report_imputation(
    baseline: gx.Autoregressive, model: gx.Autoregressive, test: Tensor, scale: Tensor
) -> None:
    print(
        f"\n{'held-out cells':<24}{'nats: marginal':>16}{'imputed':>10}{'score: marginal':>18}{'imputed':>10}"
    )
    for t, (name, kind) in enumerate(zip(NAMES, KINDS, strict=True)):
        (a, guess_a), (b, guess_b) = (impute(m, test, t) for m in (baseline, model))
        c, d = (scale[t] * (guess - test[:, t]).abs() for guess in (guess_a, guess_b))
        c, d = (c, d) if kind.ordered else ((c == 0).float(), (d == 0).float())
        score = "mean |error|" if kind.ordered else "accuracy"
        print(
            f"{name:<13}{kind.name:<11}{a.mean():>16.3f}{b.mean():>10.3f}{c.mean():>18.3f}{d.mean():>10.3f}  {score}"
        )


@torch.no_grad()
def report_completion(
    model: gx.Autoregressive, test: Tensor, shift: Tensor, scale: Tensor
) -> None:
    given = NAMES.index("alcohol")
    completed = (
        model().conditional_on_prefix(test[:, :given]).sample((200,))
    )  # (200, N, 4)
    weights, truth = (
        rows[..., -1] * scale[-1] + shift[-1] for rows in (completed, test)
    )
    low, high = weights.quantile(torch.tensor([0.05, 0.95]), 0)
    inside = ((low <= truth) & (truth <= high)).float()
    print(
        f"\n{len(test)} test rows completed 200 times from their first {given} columns:"
    )
    print(f"weights within the central 90% of their completions: {mean(inside)}")
    smokes = test[:, NAMES.index("smoking, 0-3")] > 0
    for name, rows in (("smokers' children", smokes), ("others", ~smokes)):
        print(
            f"mean weight of {name}: {truth[rows].mean():.2f} kg, completed {weights[:, rows].mean():.2f} kg"
        )


def picture(data: Tensor, samples: Tensor, out: Path) -> None:
    """Two scatter matrices with the same axes; jitter spreads the whole numbers."""
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    both, real = (
        torch.stack([data, samples])[..., SHOWN],
        torch.tensor([KINDS[t] is REAL for t in SHOWN]),
    )
    spread = both + torch.where(real, 0.0, 0.7) * (torch.rand(both.shape) - 0.5)
    low, high = both.amin((0, 1)), both.amax((0, 1))
    columns = zip(low, high, real, strict=True)
    edges = [
        torch.linspace(a, b, 25) if r else torch.arange(a, b + 2) - 0.5
        for a, b, r in columns
    ]
    figure = plt.figure(figsize=(14, 7), layout="constrained")
    titles = (("Data", "tab:blue"), ("Samples", "tab:orange"))
    for part, y, spread_y, (title, color) in zip(
        figure.subfigures(1, 2), both, spread, titles, strict=True
    ):
        part.suptitle(title)
        axes = part.subplots(len(SHOWN), len(SHOWN), sharex="col")
        for i, t in enumerate(SHOWN):
            limits = edges[i][[0, -1]].tolist()
            axes[-1, i].set(xlabel=NAMES[t], xlim=limits)
            axes[i, i].hist(y[:, i].numpy(), bins=edges[i].numpy(), color=color)
            axes[i, i].set_yticks([])
            for j in range(i):
                axes[i, j].scatter(
                    spread_y[:, j],
                    spread_y[:, i],
                    s=4,
                    alpha=0.3,
                    linewidths=0,
                    color=color,
                )
                axes[i, j].set(ylim=limits, ylabel="" if j else NAMES[t])
                axes[i, j].tick_params(labelleft=j == 0)
                axes[j, i].set_axis_off()
        part.align_ylabels()
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mixed_table.png"), metavar="FILE"
    )
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="few epochs and rows, to see that everything runs",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    train, validation, test, shift, scale = births()
    test = test[:100] if args.smoke_test else test

    torch.manual_seed(0)
    head = gx.heads.PerSite([kind.head for kind in KINDS])
    T, P, site = len(KINDS), head.num_params, [kind.site for kind in KINDS]
    baseline = gx.Autoregressive(
        gx.conditioners.Independent(T, P, site=site), head, (T,)
    )
    model = gx.Autoregressive(
        gx.conditioners.MADE(T, P, site=site, activation=torch.tanh), head, (T,)
    )
    settings = {
        "epochs": 2 if args.smoke_test else 40,
        "batch_size": 128,
        "patience": 15,
        "validation": validation,
    }
    gx.fit(baseline, train, optimizer=partial(torch.optim.Adam, lr=0.1), **settings)
    gx.fit(
        model,
        train,
        optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3),
        **settings,
    )

    report_nats(baseline, model, test)
    report_imputation(baseline, model, test, scale)
    report_completion(model, test, shift, scale)
    picture(
        test * scale + shift, model().sample((len(test),)) * scale + shift, args.out
    )
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
