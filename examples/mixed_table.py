"""A table with columns of several kinds: density, new rows, imputation and completion.

    python examples/mixed_table.py [--out FILE] [--smoke-test]

The rows are 4638 births in Pennsylvania, 1989 to 1991, from a file of the package
statsmodels (Cattaneo, "Efficient semiparametric estimation of multi-valued treatment
effects under ignorability", Journal of Econometrics, 2010).

Each column is a site of the chain rule and has a head of its own (PerSite). In the
model, a MADE computes the heads' parameters from the columns to the left. The baseline
has the same heads, and a conditioner that ignores the other columns: its columns are
independent. A part of the gain is a logical tie: the months since the last birth are
0 for every first child.

The script prints three tables, with two standard errors where it says ±:

* Test nats: the mean log-probability of each column given those to its left. Real
  columns are standardised, so their nats refer to standardised values. The mother's
  age is recorded in whole years, and uniform noise on (0, 1) is added to it. Counts
  and categories are unchanged.
* Held-out cells: each cell is imputed from all other cells of its row, those to its
  right included. p(cell | others) is proportional to the probability of the whole
  row, which is evaluated for each value of the cell (on a grid for real columns). The
  imputed value is the median, scored by its absolute error in years, months, visits
  or kg, or the mode where values have no order, scored by accuracy.
* Completion: the last columns of a row are drawn given the first.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from itertools import pairwise
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

RESULTS = Path(statsmodels.__file__).parent / "treatment" / "tests" / "results"


class Kind(NamedTuple):
    """What a column holds.

    Attributes:
        name: of the kind.
        head: of the column's distribution.
        site: what the network reads: the number of categories, or () for a number.
        values: evenly spaced values that a missing cell may have.
        ordered: whether a missing cell is imputed by its median.
    """

    name: str
    head: gx.Head
    site: int | tuple[()]
    values: Tensor
    ordered: bool = False


def mixture(head: gx.Head) -> gx.Head:
    return gx.heads.Mixture(head, 3)


def category(size: int) -> Kind:
    return Kind("category", gx.heads.Categorical(size), size, torch.arange(float(size)))


BINARY = Kind("binary", gx.heads.Bernoulli(), 2, torch.arange(2.0))
COUNT = Kind(
    "count", mixture(gx.heads.NegativeBinomial()), (), torch.arange(300.0), True
)
REAL = Kind("real", mixture(gx.heads.Normal()), (), torch.linspace(-7, 7, 281), True)
COLUMNS = [  # name, name in the file, kind
    ("age, years", "mage", REAL),  # of the mother
    ("schooling", "medu", category(18)),  # years, of the mother
    ("white", "mrace", BINARY),
    ("married", "mmarried_", BINARY),
    # No child here has exactly 3 siblings, which a family of counts cannot represent.
    ("siblings", "siblings", category(12)),
    # Since the last birth; 0 for all first children and some others.
    ("months", "monthslb", COUNT),
    # Cigarettes a day: 0 is none, 1 is 1-5, 2 is 6-10, 3 is 11 or more.
    ("smoking, 0-3", "smoking", category(4)),
    ("alcohol", "alcohol", BINARY),
    # Of the first prenatal visit; 0 for no visit.
    ("trimester", "prenatal", category(4)),
    ("visits", "nprenatal", COUNT),
    ("weight, kg", "bweight", REAL),  # of the newborn
]
NAMES, SOURCES, KINDS = (list(part) for part in zip(*COLUMNS, strict=True))
IN_PICTURE = ("age, years", "siblings", "smoking, 0-3", "visits", "weight, kg")
SHOWN = [NAMES.index(name) for name in IN_PICTURE]


def births() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training, validation and test rows (N, 11), and the reals' units.

    The units are a shift and a scale (11,): row * scale + shift is in the units of the
    table.
    """
    generator = torch.Generator().manual_seed(0)
    table = pandas.read_csv(RESULTS / "cataneo2.csv")
    table = table.query("order > 0")  # 4 rows lack the order of birth
    table["siblings"], table["bweight"] = table.order - 1, table.bweight / 1000
    levels = {"0 daily": 0, "1-5 daily": 1, "6-10 daily": 2, "11+ daily": 3}
    table["smoking"] = table.msmoke.map(levels)
    y = torch.tensor(table[SOURCES].to_numpy(float), dtype=torch.float32)
    y[:, 0] += torch.rand(len(y), generator=generator)
    y = y[torch.randperm(len(y), generator=generator)]
    train, validation, test = y.split([3000, 638, 1000])
    real = torch.tensor([kind is REAL for kind in KINDS])
    shift = torch.where(real, train.mean(0), 0.0)
    scale = torch.where(real, train.std(0), 1.0)
    parts = ((part - shift) / scale for part in (train, validation, test))
    return *parts, shift, scale


def mean(x: Tensor) -> str:
    """The mean with two standard errors."""
    return f"{x.mean():.3f} ± {2 * x.std() / math.sqrt(len(x)):.3f}"


@torch.no_grad()
def report_nats(
    baseline: gx.Autoregressive, model: gx.Autoregressive, test: Tensor
) -> None:
    """Prints the test nats of each column."""
    before, after = (m().log_prob_sites(test) for m in (baseline, model))  # (N, 11)
    print(f"\n{'test nats':<24}{'independent':>12}{'model':>10}{'gain':>17}")
    for name, kind, a, b in zip(NAMES, KINDS, before.T, after.T, strict=True):
        nats = f"{a.mean():>12.3f}{b.mean():>10.3f}{mean(b - a):>17}"
        print(f"{name:<13}{kind.name:<11}{nats}")
    a, b = before.sum(1), after.sum(1)
    print(f"{'total':<24}{a.mean():>12.3f}{b.mean():>10.3f}{mean(b - a):>17}")
    print(f"totals: independent {mean(a)}, model {mean(b)}")


@torch.no_grad()
def impute(model: gx.Autoregressive, test: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Computes log p(y_t | all other cells) of each row (N,), and the imputed value (N,)."""
    kind = KINDS[t]
    rows = test.repeat(len(kind.values), 1, 1)  # (K, N, 11)
    rows[..., t] = kind.values.unsqueeze(1)
    # (K, N), in parts to save memory
    joint = torch.cat([model().log_prob(part) for part in rows.split(20)])
    # The probability of the others is the sum, or the integral, over the cell.
    others = joint.logsumexp(0) + (kind.values[1] - kind.values[0]).log()
    weights = joint.softmax(0)
    median, mode = (weights.cumsum(0) < 0.5).sum(0), weights.argmax(0)
    best = median if kind.ordered else mode
    return model().log_prob(test) - others, kind.values[best]


def report_imputation(
    baseline: gx.Autoregressive, model: gx.Autoregressive, test: Tensor, scale: Tensor
) -> None:
    """Prints how well each column is imputed by its marginal and by the model."""
    print(f"\n{'':<24}{'nats':>16}{'score':>20}")
    titles = f"{'marginal':>10}{'model':>10}"
    print(f"{'held-out cells':<24}{titles}{titles}")
    for t, (name, kind) in enumerate(zip(NAMES, KINDS, strict=True)):
        (a, guess_a), (b, guess_b) = (impute(m, test, t) for m in (baseline, model))
        c, d = (scale[t] * (guess - test[:, t]).abs() for guess in (guess_a, guess_b))
        c, d = (c, d) if kind.ordered else ((c == 0).float(), (d == 0).float())
        score = "mean |error|" if kind.ordered else "accuracy"
        nats = f"{a.mean():>10.3f}{b.mean():>10.3f}"
        scores = f"{c.mean():>10.3f}{d.mean():>10.3f}  {score}"
        print(f"{name:<13}{kind.name:<11}{nats}{scores}")


@torch.no_grad()
def report_completion(
    model: gx.Autoregressive, test: Tensor, shift: Tensor, scale: Tensor
) -> None:
    """Prints whether completed weights agree with the weights of the test rows."""
    given = NAMES.index("alcohol")
    completions = model().conditional_on_prefix(test[:, :given])
    weights = completions.sample((200,))[..., -1] * scale[-1] + shift[-1]  # (200, N)
    truth = test[:, -1] * scale[-1] + shift[-1]
    low, high = weights.quantile(torch.tensor([0.05, 0.95]), 0)
    inside = ((low <= truth) & (truth <= high)).float()
    print(
        f"\n{len(test)} test rows, completed 200 times from the first {given} columns"
    )
    print(f"true weight in the central 90% of the completions: {mean(inside)}")
    smokes = test[:, NAMES.index("smoking, 0-3")] > 0
    print(f"{'mean weight, kg':<24}{'true':>10}{'completed':>12}")
    for name, rows in (("mother smokes", smokes), ("mother does not smoke", ~smokes)):
        print(f"{name:<24}{truth[rows].mean():>10.2f}{weights[:, rows].mean():>12.2f}")


def bins(x: Tensor, real: bool) -> Tensor:
    """Edges of a histogram: 24 intervals for reals, one a value for whole numbers."""
    low, high = x.min(), x.max()
    return torch.linspace(low, high, 25) if real else torch.arange(low, high + 2) - 0.5


def draw_marginal(axes: plt.Axes, data: Tensor, samples: Tensor, edges: Tensor) -> None:
    """Shares of rows; the bars have two standard errors."""
    share = torch.histogram(data, edges).hist / len(data)
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    error = 2 * (share * (1 - share) / len(data)).sqrt()
    line = {"ecolor": "C0", "elinewidth": 0.7}
    axes.bar(centres, share, width, yerr=error, color="C0", alpha=0.35, error_kw=line)
    axes.stairs(torch.histogram(samples, edges).hist / len(samples), edges, color="C1")
    axes.set(yticks=[])


def draw_rows(axes: plt.Axes, data: Tensor, samples: Tensor) -> None:
    """Rows (N, 2) of the data and as many samples, in random order of drawing."""
    both = torch.cat([data, samples[: len(data)]])
    colours = ["C0"] * len(data) + ["C1"] * len(data)
    order = torch.randperm(len(both)).tolist()
    axes.scatter(*both[order].T, s=1.5, linewidths=0, c=[colours[k] for k in order])


def groups(x: Tensor, real: bool) -> Tensor:
    """Limits of groups of rows: fifths, or single values where there are few."""
    whole = x.unique()
    if not real and len(whole) <= 12:
        return torch.cat([whole - 0.5, whole[-1:] + 0.5])
    return torch.cat([x.quantile(torch.arange(5) / 5), x.max().view(1) + 1])


def draw_means(axes: plt.Axes, data: Tensor, samples: Tensor, limits: Tensor) -> None:
    """Means of the second column in groups of the first, in the data's units of sd."""
    centre, sd = data[:, 1].mean(), data[:, 1].std()
    points, line = [], []
    for low, high in pairwise(limits):
        inside = [(low <= rows[:, 0]) & (rows[:, 0] < high) for rows in (data, samples)]
        if inside[0].sum() >= 20:
            x, y = data[inside[0]].T
            error = 2 * y.std() / math.sqrt(len(y))
            points.append([x.mean(), (y.mean() - centre) / sd, error / sd])
            x, y = samples[inside[1]].T
            line.append([x.mean(), (y.mean() - centre) / sd])
    if points:
        axes.plot(*torch.tensor(line).T, "o-C1", markersize=2.5)
        bars = {"fmt": "oC0", "markersize": 2.5, "elinewidth": 0.8}
        axes.errorbar(*torch.tensor(points).T, **bars)
    axes.set(ylim=(-1.3, 1.3), yticks=[-1, 0, 1])


def label(axes: plt.Axes, edges: list[Tensor]) -> None:
    """Limits and labels of the matrix (5, 5) of axes."""
    last = len(SHOWN) - 1
    for i, row in enumerate(axes):
        for j, ax in enumerate(row):
            ax.set_xlim(edges[j][0], edges[j][-1])
            ax.tick_params(labelbottom=i == last, labelleft=j == 0 and i > 0)
            if j < i:
                ax.set_ylim(edges[i][0], edges[i][-1])
            if j > i:
                ax.yaxis.tick_right()
                ax.tick_params(labelright=j == last, right=False)
        row[0].set_ylabel(NAMES[SHOWN[i]] if i else "share of rows")
        if i < last:
            row[-1].yaxis.set_label_position("right")
            row[-1].set_ylabel(f"mean {NAMES[SHOWN[i]].split(',')[0]} (sd)")
        axes[-1, i].set_xlabel(NAMES[SHOWN[i]])


def picture(data: Tensor, samples: Tensor, out: Path) -> None:
    """Marginals on the diagonal, rows below it, conditional means above it."""
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    data, samples = data[:, SHOWN], samples[:, SHOWN]
    real = torch.tensor([KINDS[t] is REAL for t in SHOWN])
    edges = [bins(data[:, k], bool(real[k])) for k in range(len(SHOWN))]
    # Whole numbers are spread by uniform noise on (-0.35, 0.35) in the scatter plots.
    width = torch.where(real, 0.0, 0.7)
    spread = [x + width * (torch.rand(x.shape) - 0.5) for x in (data, samples)]
    figure, axes = plt.subplots(len(SHOWN), len(SHOWN), figsize=(7.0, 6.6))
    for i in range(len(SHOWN)):
        draw_marginal(axes[i, i], data[:, i], samples[:, i], edges[i])
        for j in range(i):
            draw_rows(axes[i, j], *(x[:, [j, i]] for x in spread))
            limits, pair = groups(data[:, i], bool(real[i])), [i, j]
            draw_means(axes[j, i], data[:, pair], samples[:, pair], limits)
    label(axes, edges)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("C0", "C1")]
    names = [f"{len(data)} test rows (bars: 2 standard errors)", "samples of the model"]
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    figure.savefig(out)


def fitted(
    train: Tensor, validation: Tensor, epochs: int
) -> tuple[gx.Autoregressive, gx.Autoregressive]:
    """The baseline and the model, trained."""
    head = gx.heads.PerSite([kind.head for kind in KINDS])
    T, P, site = len(KINDS), head.num_params, [kind.site for kind in KINDS]
    independent = gx.conditioners.Independent(T, P, site=site)
    made = gx.conditioners.MADE(T, P, site=site, activation=torch.tanh)
    baseline, model = (gx.Autoregressive(c, head, (T,)) for c in (independent, made))
    settings = {"validation": validation, "epochs": epochs}
    settings |= {"batch_size": 128, "patience": 15}
    slow = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3)
    gx.fit(baseline, train, optimizer=partial(torch.optim.Adam, lr=0.1), **settings)
    gx.fit(model, train, optimizer=slow, **settings)
    return baseline, model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = Path("mixed_table.png")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE")
    parser.add_argument("--smoke-test", action="store_true", help="a short test run")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    start = time.perf_counter()
    train, validation, test, shift, scale = births()
    test = test[:100] if args.smoke_test else test

    torch.manual_seed(0)
    baseline, model = fitted(train, validation, 2 if args.smoke_test else 40)
    report_nats(baseline, model, test)
    report_imputation(baseline, model, test, scale)
    report_completion(model, test, shift, scale)
    samples = model().sample((20 * len(test),))
    picture(test * scale + shift, samples * scale + shift, args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
