"""Conditional densities of two responses: medical spending given ten covariates.

    python examples/conditional_flow.py [--out conditional_flow.png] [--smoke-test]

The data are from the RAND Health Insurance Experiment, 1974 to 1982, in a file that is
part of statsmodels. Each row is one person in one year. The two responses are log10 of
the dollars for outpatient care and for all else (drugs, supplies and stays in
hospital), in rows where neither is zero. Few people were in hospital, but a stay costs
about sixty times as much as drugs (medians of $657 and $10.8 per year). The second
response is therefore skewed with two modes, and their weights, locations and widths
depend on age, sex, health, insurance plan and income.

    scale ~ HalfNormal(0.2),    offset_g ~ Normal(0, scale)
    y_i - offset_g(i) ~ density(x_i)

There is one offset for each of 30 cells of site and year, because prices and customs
differ. The rows are in a plate with subsampling. SVI fits the posterior of the offsets
together with the weights of the density, which is one of:

* Gaussian, network: a network of the covariates computes the mean and the covariance;
* Gaussian, linear: the mean is linear and the covariance is constant;
* maf, nsf, naf: autoregressive flows with affine, spline and neural bijections.

Test nats are log (1/S) sum_s p(y | x, offset_s) over posterior draws, per row, with
respect to log10 dollars; higher is better. The gain is the mean difference from the
first model. Training, validation and test rows are of different persons, and the
standard errors account for the similarity of rows of one person.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas
import pyro
import pyro.distributions as dist
import statsmodels
import torch
from _plots import calibration
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_genexact as gx

FILE = (
    Path(statsmodels.__file__).parent / "datasets" / "randhie" / "src" / "randhie.csv"
)
COVARIATES = ["xage", "female", "disea", "physlm", "xghindx", "mhi", "logc"]
COVARIATES += ["idp", "linc", "lnum"]
C, CELLS, YEARS = len(COVARIATES), 30, 5
HIDDEN, DRAWS, NEAREST = 64, 20, 250
REFERENCE = "Gaussian, network"
SHOWN = ("naf", REFERENCE)  # in the figure


class Rows(NamedTuple):
    x: Tensor  # (N, C) covariates, standardised
    cell: Tensor  # (N,) of site and year
    y: Tensor  # (N, 2) log10 dollars
    person: Tensor  # (N,)


def spending() -> tuple[list[Rows], pandas.DataFrame]:
    """Returns training, validation and test rows, which are of different persons.

    The second value has the mean and the deviation of each covariate (2, C).
    """
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
    """Normal given x, in units of the standardised training y, as the flows are."""
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
    """Runs SVI, keeps the weights with the best validation nats, returns the guide."""
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
    """Computes log (1/S) sum_s p(y | x, offset_s) (N,); one draw is the posterior median."""
    offsets = [
        guide.median() if draws == 1 else guide(rows, None) for _ in range(draws)
    ]
    parts = [
        model.shifted(rows.x, o["offset"][rows.cell]).log_prob(rows.y) for o in offsets
    ]
    return torch.stack(parts).logsumexp(0) - math.log(draws)


@torch.no_grad()
def uniforms(model: Spending, guide: AutoNormal, rows: Rows) -> Tensor:
    """The normal cdf of each row's base noise (N, 2).

    The values are independent and uniform on (0, 1) if the model is right. The first
    is the cdf of outpatient care, the second that of all else given outpatient care.
    """
    density = model.density(rows.x)
    noise = density.transforms[0].inv(rows.y - guide.median()["offset"][rows.cell])
    if isinstance(density.base_dist, torch.distributions.MultivariateNormal):
        normal = density.base_dist
        noise = torch.linalg.solve_triangular(
            normal.scale_tril, (noise - normal.loc)[..., None], upper=False
        )[..., 0]
    return torch.special.ndtr(noise)


def mean(values: Tensor, person: Tensor) -> str:
    """The mean with two standard errors, which allow for several rows per person."""
    _, index = person.unique(return_inverse=True)
    excess = torch.zeros(int(index.max()) + 1).index_add(
        0, index, values - values.mean()
    )
    return f"{values.mean():.3f} ± {2 * excess.norm() / len(values):.3f}"


def people(rows: Rows, scaling: pandas.DataFrame) -> dict[str, tuple[Tensor, Tensor]]:
    """Median covariates (C,) of four kinds of people, and y of the nearest rows."""
    columns = rows.x[:, :2].T
    age, female = (
        c * scaling.iloc[1, k] + scaling.iloc[0, k] for k, c in enumerate(columns)
    )
    kinds = {"boy, 6": (6, 0), "man, 25": (25, 0)}
    kinds |= {"woman, 30": (30, 1), "woman, 58": (58, 1)}
    found = {}
    for name, (years, sex) in kinds.items():
        x = rows.x[((age - years).abs() < 3) & (female.round() == sex)].median(0).values
        nearest = (rows.x - x).square().sum(1).topk(NEAREST, largest=False).indices
        found[name] = x, rows.y[nearest]
    return found


@torch.no_grad()
def contours(
    axes: plt.Axes, density: nn.Module, x: Tensor, near: Tensor, color: str
) -> None:
    """Rows near x, and the smallest sets that hold 10, 50 and 90% of the density."""
    first, second = torch.linspace(-0.5, 3.6, 160), torch.linspace(-1.2, 4.6, 200)
    p = density(x).log_prob(torch.cartesian_prod(first, second)).exp()
    ordered = p.sort(descending=True).values
    mass = ordered.cumsum(0) / ordered.sum()
    levels = [ordered[(mass < share).sum()].item() for share in (0.9, 0.5, 0.1)]
    p = p.reshape(len(first), len(second)).T
    axes.contourf(first, second, p, [*levels, math.inf], colors=[color], alpha=0.2)
    axes.contour(first, second, p, levels, colors=[color], linewidths=0.9)
    axes.scatter(*near.T, s=3, color="black", alpha=0.5, linewidths=0)
    axes.set(xlim=(0.2, 3.3), ylim=(-0.7, 4.2))
    axes.set_xticks([1, 2, 3], ["10", "100", "1000"])
    axes.set_yticks([0, 1, 2, 3, 4], ["1", "10", "100", "1000", "10000"])


def offsets(axes: plt.Axes, guide: AutoNormal) -> None:
    """The posterior median and central 90% of each cell's factor."""
    quantiles = guide.quantiles([0.05, 0.5, 0.95])["offset"]
    for column, (name, marker) in enumerate(
        {"outpatient": "o", "all else": "s"}.items()
    ):
        low, middle, high = (10 ** q[:, column].detach() for q in quantiles)
        place = torch.arange(CELLS) + torch.arange(CELLS) // YEARS + 0.4 * column
        bars = torch.stack([middle - low, high - middle])
        style = {"markersize": 2.5, "linewidth": 0.8, "color": f"C{column + 2}"}
        axes.errorbar(place, middle, bars, fmt=marker, label=name, **style)
    axes.axhline(1.0, color="black", linewidth=0.8)
    sites = range(CELLS // YEARS)
    axes.set_xticks([(YEARS + 1) * k + 2 for k in sites], [str(k + 1) for k in sites])
    axes.set(xlabel="site, with up to five years", ylabel="factor of spending")
    axes.set_ylim(0.55, 1.85)
    axes.grid(False, axis="x")


def picture(
    fitted: Fits, everyone: Rows, test: Rows, scaling: pandas.DataFrame, out: Path
) -> None:
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure = plt.figure(figsize=(7, 6.2))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.9, 1))
    panels = upper.subplots(2, 4, sharex=True, sharey=True)
    kinds = people(everyone, scaling)
    for k, (line, name) in enumerate(zip(panels, SHOWN, strict=True)):
        for axes, (who, (x, near)) in zip(line, kinds.items(), strict=True):
            contours(axes, fitted[name][0].density, x, near, f"C{k}")
            axes.set_title(who if k == 0 else "")
        line[0].set_ylabel(f"({'ab'[k]}) {name}", fontsize=8.5)
    upper.supxlabel("outpatient care (dollars per year)")
    upper.supylabel("all else (dollars per year)")
    checks = lower.subplots(1, 3, width_ratios=(1, 1, 1.7))
    values = {name: uniforms(*fitted[name], test) for name in SHOWN}
    for column, title in enumerate(("(c) outpatient care", "(d) all else, given that")):
        axes, found = checks[column], {n: u[:, column] for n, u in values.items()}
        calibration(axes, found, len(test.person.unique()))
        axes.set_title(title, loc="left")
        axes.set_ylim(-0.085, 0.14)
    checks[0].legend(loc="upper left")
    checks[1].set(ylabel="", yticklabels=[])
    offsets(checks[2], fitted[SHOWN[0]][1])
    checks[2].set_title("(e) offsets of site and year", loc="left")
    checks[2].legend(loc="upper right", ncols=2)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("conditional_flow.png"), metavar="FILE"
    )
    parser.add_argument(
        "--smoke-test", action="store_true", help="run one epoch to check the code"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    begin = time.perf_counter()
    (train, validation, test), scaling = spending()
    pyro.set_rng_seed(0)
    persons = len(test.person.unique())
    print(
        f"{len(train.y)} training rows; {len(test.y)} test rows of {persons} persons\n"
    )
    print(
        f"{'density':<20}{'test nats per row':>20}{'gain':>18}{'fit, s':>9}"
        f"{'scale of offsets':>19}"
    )
    fitted, nats = {}, {}
    for name, density in densities(train.y).items():
        start = time.perf_counter()
        model = Spending(density)
        guide = fit(model, train, validation, epochs=1 if args.smoke_test else 20)
        seconds = time.perf_counter() - start
        fitted[name], nats[name] = (model, guide), log_prob(model, guide, test)
        gain = mean(nats[name] - nats[REFERENCE], test.person)
        gain = "" if name == REFERENCE else gain
        spread = "  ".join(f"{s:.3f}" for s in guide.median()["scale"])
        row = f"{mean(nats[name], test.person):>20}{gain:>18}{seconds:>9.1f}"
        print(f"{name:<20}{row}{spread:>19}", flush=True)
    parts = zip(train, validation, test, strict=True)
    everyone = Rows(*(torch.cat(part) for part in parts))
    picture(fitted, everyone, test, scaling, args.out)
    print(f"\n{time.perf_counter() - begin:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
