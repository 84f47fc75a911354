"""Conditional densities with two modes: what the insured of an experiment spent, given who they were, by flows.

    python examples/conditional_flow.py [--out conditional_flow.png] [--smoke-test]

The data are the RAND Health Insurance Experiment, 1974-82, from a file that comes with statsmodels: a row is a person in a
year. The responses are log10 of the dollars for outpatient care and for all else (drugs, supplies, stays in hospital), in
rows where neither is zero. Few were in hospital, for sixty times what drugs cost (medians of $657 and $10.8 a year), so the second response is
skewed with two modes, whose weights, places and widths depend on age, sex, health, plan and income.

    scale ~ HalfNormal(0.2),    offset_g ~ Normal(0, scale),    y_i - offset_g(i) ~ density(x_i)

There is one offset for each of 30 cells of site and year, since prices and customs differ. The rows are in a plate with
subsampling. SVI finds the offsets' posterior together with the weights of the density, which is one of:

* Gaussian, network: mean and covariance by a network of the ten covariates;
* Gaussian, linear: a linear mean and one covariance;
* maf, nsf, naf: autoregressive flows with affine, spline and neural bijections.

Test nats are log (1/S) sum_s p(y | x, offset_s), over posterior draws, with respect to log10 dollars; more is better. The
gain is over the first model, row by row. Training, validation and test rows are of different persons, and standard errors
allow for rows of one person being alike.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas
import pyro
import pyro.distributions as dist
import statsmodels
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_genexact as gx

FILE = (
    Path(statsmodels.__file__).parent / "datasets" / "randhie" / "src" / "randhie.csv"
)
COVARIATES = [
    "xage",
    "female",
    "disea",
    "physlm",
    "xghindx",
    "mhi",
    "logc",
    "idp",
    "linc",
    "lnum",
]
C, CELLS, YEARS = len(COVARIATES), 30, 5
HIDDEN, DRAWS, NEAREST = 64, 20, 250
REFERENCE = "Gaussian, network"
SHOWN, COLORS = ("naf", REFERENCE), ("tab:blue", "tab:orange")


class Rows(NamedTuple):
    x: Tensor  # (N, C) covariates, standardised
    cell: Tensor  # (N,) of site and year
    y: Tensor  # (N, 2) log10 dollars
    person: Tensor  # (N,)


def spending() -> tuple[list[Rows], pandas.DataFrame]:
    """Training, validation and test rows, of different persons, and the covariates' mean and deviation (2, C)."""
    table = pandas.read_csv(FILE)
    table["rest"] = table.meddol - table.outpdol
    table = table[(table.outpdol > 0) & (table.rest > 0.05)]
    people = table.zper.drop_duplicates().sample(frac=1.0, random_state=0)
    a, b = int(0.65 * len(people)), int(0.75 * len(people))
    train, validation, test = (
        table[table.zper.isin(part)] for part in (people[:a], people[a:b], people[b:])
    )
    scaling = train[COVARIATES].agg(["mean", "std"])
    return [tensors(part, scaling) for part in (train, validation, test)], scaling


def tensors(table: pandas.DataFrame, scaling: pandas.DataFrame) -> Rows:
    x = (table[COVARIATES] - scaling.loc["mean"]) / scaling.loc["std"]
    cell = (table.site - 1) * YEARS + table.year - 1
    y = torch.tensor(table[["outpdol", "rest"]].to_numpy()).log10()
    cell, person = (
        torch.tensor(column.to_numpy()).long() for column in (cell, table.zper)
    )
    return Rows(torch.tensor(x.to_numpy()).float(), cell, y.float(), person)


class Spending(PyroModule):
    """The hierarchical model around any conditional density of two values."""

    def __init__(self, density: nn.Module) -> None:
        super().__init__()
        self.density = density

    def forward(self, data: Rows, batch: int) -> Tensor:
        scale = pyro.sample(
            "scale", dist.HalfNormal(data.x.new_full((2,), 0.2)).to_event(1)
        )
        with pyro.plate("cells", CELLS):
            offset = pyro.sample("offset", dist.Normal(0.0, scale).to_event(1))
        with pyro.plate("rows", len(data.x), subsample_size=batch) as rows:
            density = self.shifted(data.x[rows], offset[data.cell[rows]])
            return pyro.sample("y", density, obs=data.y[rows])

    def shifted(self, x: Tensor, offset: Tensor) -> dist.TransformedDistribution:
        shift = dist.transforms.AffineTransform(offset, 1.0, event_dim=1)
        return dist.TransformedDistribution(self.density(x), [shift])


Fits = dict[str, tuple[Spending, AutoNormal]]


class LinearMean(nn.Module):
    """A linear mean, and the same covariance everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.tril = nn.Linear(C, 2), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mean(x), self.tril.expand(*x.shape[:-1], 3)], -1)


def gaussian(network: nn.Module, y: Tensor) -> gx.Flow:
    """Normal given x, in units of the training rows' standardised y, as the flows are."""
    units = gx.transforms.Inverse(gx.transforms.Standardize.from_data(y))
    return gx.Flow(
        [units], gx.Conditional(network, gx.heads.MultivariateNormal(2), context=C)
    )


def densities(y: Tensor) -> dict[str, nn.Module]:
    perceptron = nn.Sequential(
        nn.Linear(C, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, 5),
    )
    sizes = {
        "context": C,
        "hidden": (HIDDEN, HIDDEN),
        "activation": torch.tanh,
        "standardize": y,
    }
    return {
        "Gaussian, network": gaussian(perceptron, y),
        "Gaussian, linear": gaussian(LinearMean(), y),
        "maf": gx.flows.maf(2, transforms=3, **sizes),
        "nsf": gx.flows.nsf(2, transforms=1, **sizes),
        "naf": gx.flows.naf(2, transforms=1, **sizes),
    }


def fit(
    model: Spending, train: Rows, validation: Rows, epochs: int, batch: int = 256
) -> AutoNormal:
    """SVI, keeping the weights with the best validation nats; returns the guide of scale and offset."""
    pyro.clear_param_store()
    guide = AutoNormal(
        poutine.block(model, hide=["y"]), init_loc_fn=init_to_median, init_scale=0.05
    )
    steps = -(-len(train.y) // batch)
    optimizer = pyro.optim.ClippedAdam(
        {"lr": 5e-3, "lrd": 0.05 ** (1 / (steps * epochs))}
    )
    per_row = 1 / len(train.y)
    svi = SVI(
        poutine.scale(model, per_row),
        poutine.scale(guide, per_row),
        optimizer,
        Trace_ELBO(),
    )
    best, kept = -math.inf, None
    for _ in range(epochs):
        for _ in range(steps):
            svi.step(train, batch)
        nats = log_prob(model, guide, validation, draws=1).mean().item()
        if nats > best:
            best, kept = nats, copy.deepcopy((model.state_dict(), guide.state_dict()))
    model.load_state_dict(kept[0])
    guide.load_state_dict(kept[1])
    return guide


@torch.no_grad()
def log_prob(
    model: Spending, guide: AutoNormal, rows: Rows, draws: int = DRAWS
) -> Tensor:
    """log (1/S) sum_s p(y | x, offset_s) (N,); with one draw, at the posterior median."""
    offsets = [
        guide.median() if draws == 1 else guide(rows, None) for _ in range(draws)
    ]
    parts = [
        model.shifted(rows.x, o["offset"][rows.cell]).log_prob(rows.y) for o in offsets
    ]
    return torch.stack(parts).logsumexp(0) - math.log(draws)


@torch.no_grad()
def uniforms(model: Spending, guide: AutoNormal, rows: Rows) -> Tensor:
    """The normal cdf of the noise that gives each row (N, 2): independent and uniform on (0, 1) if the model is right."""
    density = model.density(rows.x)
    noise = density.transforms[0].inv(rows.y - guide.median()["offset"][rows.cell])
    if isinstance(density.base_dist, torch.distributions.MultivariateNormal):
        normal = density.base_dist
        noise = torch.linalg.solve_triangular(
            normal.scale_tril, (noise - normal.loc)[..., None], upper=False
        )[..., 0]
    return torch.special.ndtr(noise)


def mean(values: Tensor, person: Tensor) -> str:
    """The mean with 2 standard errors; rows of one person are not independent."""
    _, index = person.unique(return_inverse=True)
    excess = torch.zeros(int(index.max()) + 1).index_add(
        0, index, values - values.mean()
    )
    return f"{values.mean():.3f} ± {2 * excess.norm() / len(values):.3f}"


def people(rows: Rows, scaling: pandas.DataFrame) -> list[tuple[str, Tensor, Tensor]]:
    """Four kinds of insured: name, typical covariates (C,) of that sex and age, and the y of the rows nearest to them."""
    age, female = (
        rows.x[:, k] * scaling.iloc[1, k] + scaling.iloc[0, k] for k in (0, 1)
    )
    found = []
    for name, years, sex in (
        ("boy of 6", 6, 0),
        ("man of 25", 25, 0),
        ("woman of 30", 30, 1),
        ("woman of 58", 58, 1),
    ):
        x = rows.x[((age - years).abs() < 3) & (female.round() == sex)].median(0).values
        nearest = (rows.x - x).square().sum(1).topk(NEAREST, largest=False).indices
        found.append((name, x, rows.y[nearest]))
    return found


@torch.no_grad()
def contours(
    axes: plt.Axes, density: nn.Module, x: Tensor, near: Tensor, color: str
) -> None:
    """Rows near x, and the smallest sets that hold 10, 50 and 90% of the density given x."""
    first, second = torch.linspace(-0.5, 3.6, 160), torch.linspace(-1.2, 4.6, 200)
    p = density(x).log_prob(torch.cartesian_prod(first, second)).exp()
    ordered = p.sort(descending=True).values
    mass = ordered.cumsum(0) / ordered.sum()
    levels = [ordered[(mass < share).sum()].item() for share in (0.9, 0.5, 0.1)]
    p = p.reshape(len(first), len(second)).T
    axes.contourf(
        first, second, p, levels=[*levels, math.inf], colors=[color], alpha=0.25
    )
    axes.contour(first, second, p, levels=levels, colors=[color], linewidths=1)
    axes.scatter(*near.T, s=5, color="black", alpha=0.5, linewidths=0)
    axes.set(xlim=(0.2, 3.3), ylim=(-0.7, 4.2))
    axes.set_xticks([1, 2, 3], ["$10", "$100", "$1000"])
    axes.set_yticks([0, 1, 2, 3, 4], ["$1", "$10", "$100", "$1000", "$10000"])


def calibration(
    axes: plt.Axes, found: dict[str, Tensor], column: int, persons: int
) -> None:
    """Empirical cdf of the uniforms minus their cdf, with the 95% band of as many independent values as persons."""
    for (name, u), color in zip(found.items(), COLORS, strict=True):
        ordered = u[:, column].sort().values
        axes.plot(
            ordered,
            (torch.arange(len(u)) + 0.5) / len(u) - ordered,
            color=color,
            label=name,
        )
    band = 1.358 / math.sqrt(persons)  # Kolmogorov and Smirnov
    axes.axhspan(-band, band, color="gray", alpha=0.2, linewidth=0, label="95% band")
    axes.set(xlabel="base uniform", xlim=(0, 1), ylim=(-0.1, 0.1))


def offsets(axes: plt.Axes, guide: AutoNormal) -> None:
    """Central 90% of each cell's factor."""
    for column, (name, color) in enumerate(
        (("outpatient care", "tab:green"), ("all else", "tab:purple"))
    ):
        low, middle, high = (
            10 ** q[:, column].detach()
            for q in guide.quantiles([0.05, 0.5, 0.95])["offset"]
        )
        place = torch.arange(CELLS) + torch.arange(CELLS) // YEARS + 0.35 * column
        bars = torch.stack([middle - low, high - middle])
        axes.errorbar(
            place, middle, bars, fmt="o", markersize=3, color=color, label=name
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(
        [(YEARS + 1) * k + 2 for k in range(CELLS // YEARS)],
        [f"site {k + 1}" for k in range(CELLS // YEARS)],
    )


def picture(
    fitted: Fits, everyone: Rows, test: Rows, scaling: pandas.DataFrame, out: Path
) -> None:
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure = plt.figure(figsize=(12, 10.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1.05))
    upper.suptitle(
        f"Densities given x (sets of 10, 50, 90%) and the {NEAREST} rows nearest to x",
        fontsize=12,
    )
    panels = upper.subplots(2, 4, sharex=True, sharey=True)
    for row, name, color in zip(panels, SHOWN, COLORS, strict=True):
        for axes, (who, x, near) in zip(row, people(everyone, scaling), strict=True):
            contours(axes, fitted[name][0].density, x, near, color)
            axes.set_title(who if name == SHOWN[0] else "", fontsize=11)
        row[0].set_ylabel(f"{name}\n\nall else")
    for axes in panels[1]:
        axes.set_xlabel("outpatient care")
    left, middle, right = lower.subplots(1, 3, width_ratios=(1, 1, 2))
    found = {name: uniforms(*fitted[name], test) for name in SHOWN}
    for column, (axes, title) in enumerate(
        ((left, "Outpatient care"), (middle, "All else, given that"))
    ):
        calibration(axes, found, column, len(test.person.unique()))
        axes.set_title(title, fontsize=12)
    left.set_ylabel("empirical minus uniform cdf")
    left.legend(frameon=False, fontsize=9, loc="upper left")
    middle.tick_params(labelleft=False)
    offsets(right, fitted[SHOWN[0]][1])
    right.set_title(
        "Offsets of site and year, as factors: median and central 90%", fontsize=12
    )
    right.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("conditional_flow.png"), metavar="FILE"
    )
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="one epoch, to see that everything runs",
    )
    args = parser.parse_args()
    (train, validation, test), scaling = spending()
    pyro.set_rng_seed(0)
    print(
        f"{len(train.y)} training rows, {len(test.y)} test rows of {len(test.person.unique())} persons\n"
    )
    print(
        f"{'':<20}{'test nats (± 2 s.e.)':>22}{'gain':>18}{'fit, s':>9}{'offsets, sd':>16}"
    )
    fitted, nats = {}, {}
    for name, density in densities(train.y).items():
        start = time.perf_counter()
        model = Spending(density)
        guide = fit(model, train, validation, epochs=1 if args.smoke_test else 20)
        seconds = time.perf_counter() - start
        fitted[name], nats[name] = (model, guide), log_prob(model, guide, test)
        gain = (
            mean(nats[name] - nats[REFERENCE], test.person) if name != REFERENCE else ""
        )
        spread = "  ".join(f"{s:.3f}" for s in guide.median()["scale"])
        print(
            f"{name:<20}{mean(nats[name], test.person):>22}{gain:>18}{seconds:>9.1f}{spread:>16}"
        )
    everyone = Rows(
        *(torch.cat(parts) for parts in zip(train, validation, test, strict=True))
    )
    picture(fitted, everyone, test, scaling, args.out)
    print(f"\nsaved {args.out}")


if __name__ == "__main__":
    main()
