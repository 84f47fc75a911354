"""A table of Pyro's families: which of them can be heads, and why the others cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
from torch.distributions import Distribution

from .common_families import Normal, Poisson, VonMises
from .parametric import Parametric


class Family(NamedTuple):
    """A row of the table: a distribution class of Pyro and an example of a head of it.

    Attributes:
        name: the name of the class.
        head: a small head, or None if the class cannot be a head.
        reason: the reason why it cannot, or "".
    """

    name: str
    head: Parametric | None
    reason: str


def families() -> list[Family]:
    """Returns a row for every distribution class that Pyro exports.

    Example:
        >>> rows = families()
        >>> [row.head for row in rows if row.name == "BetaBinomial"]
        [Parametric(BetaBinomial, total_count=7)]
        >>> [row.reason for row in rows if row.name == "Delta"]
        ['a point mass has no density']
    """
    rows = []
    for name in sorted(dir(dist)):
        family = getattr(dist, name)
        if not (isinstance(family, type) and issubclass(family, Distribution)):
            continue
        try:
            rows.append(Family(name, Parametric(family, **_settings(name)), ""))
        except ValueError as error:
            rows.append(Family(name, None, str(error).partition(f"{name}: ")[2].rstrip(".")))
    return rows


def markdown() -> str:
    """Returns the table of :func:`families` in Markdown: the families that can be heads, then the others."""
    rows = families()
    lines = ["| family | example | site | predicted | P | samples |", "|---|---|---|---|---|---|"]
    for name, head, _ in rows:
        if head is not None:
            predicted = ", ".join(f"{n} {s}" if s else n for n, s in head.parameters_of.items())
            kind = "reparameterised" if head.has_rsample else "not reparameterised"
            lines.append(f"| {name} | `{head}` | {head.site_shape} | {predicted} | {head.num_params} | {kind} |")
    lines += ["", "| not a head | why |", "|---|---|"]
    return "\n".join(lines + [f"| {row.name} | {row.reason} |" for row in rows if row.head is None])


def _settings(name: str) -> dict[str, Any]:
    vector = {"shape": (3,)}
    settings: dict[str, dict[str, Any]] = {
        "AffineBeta": {"loc": -1.0, "scale": 3.0},
        "BetaBinomial": {"total_count": 7},
        "Binomial": {"total_count": 7},
        "DirichletMultinomial": {"shape": (3,), "total_count": 4},
        "ExtendedBetaBinomial": {"total_count": 7},
        "ExtendedBinomial": {"total_count": 7},
        "FoldedDistribution": {"base_dist": Parametric(dist.StudentT)},
        "GeneralizedPareto": {"loc": 0.5},
        "LowRankMultivariateNormal": {"shape": (3,), "rank": 1},
        "MixtureOfDiagNormals": {"shape": (2,), "components": 3},
        "MixtureOfDiagNormalsSharedCovariance": {"shape": (2,), "components": 3},
        "Multinomial": {"shape": (3,), "total_count": 4},
        "Pareto": {"scale": 1.5},
        "RelaxedBernoulli": {"temperature": 0.7},
        "RelaxedOneHotCategorical": {"shape": (3,), "temperature": 0.7},
        "SineSkewed": {"shape": (1,), "base_dist": VonMises((1,))},
        "TransformedDistribution": {
            "base_distribution": Normal(),
            "transforms": [dist.transforms.AffineTransform(0.0, 2.0), dist.transforms.ExpTransform()],
        },
        "Uniform": {"low": -1.0, "high": 2.0},
        "ZeroInflatedDistribution": {"base_dist": Poisson()},
    }
    vectors = (
        "Categorical Dirichlet LogisticNormal MultivariateNormal MultivariateStudentT OneHotCategorical OrderedLogistic "
        "ProjectedNormal VonMises3D"
    )
    return settings.get(name, vector if name in vectors.split() else {})
