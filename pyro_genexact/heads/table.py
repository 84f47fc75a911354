"""What the families' own classes don't tell, and the table of all families."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro.distributions as dist
from torch.distributions import Distribution, constraints

from ..families.supports import ANGLE, UNIT, Counts, Sphere, open_interval, open_simplex

if TYPE_CHECKING:
    from .parametric import Parametric


class Parameter(NamedTuple):
    """How to predict a parameter: its constraint, sizes ("k": the last of ``shape``), the bound of unconstrained numbers."""

    constraint: Any
    shape: tuple[str, ...] = ()
    bound: float | None = 10.0


def describe(constraint: Any) -> Parameter:
    """What ``arg_constraints`` says of a parameter; numbers of real ones are not bounded."""
    dims = 0 if constraints.is_dependent(constraint) else constraint.event_dim
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return Parameter(constraint, ("k",) * dims, None if constraint is constraints.real else 10.0)


def _real(*shape: str) -> Parameter:
    return Parameter(constraints.real, shape, None)


def _positive(*shape: str) -> Parameter:
    return Parameter(constraints.positive, shape)


_TAIL = Parameter(constraints.positive, (), 4.0)  # beyond, most samples of heavy tails overflow
_ODDS = Parameter(constraints.real, (), 10.0)  # they are a scale of the counts
_STABILITY = {"stability": Parameter(constraints.interval(0.2, 2.0))}  # below, densities are spikes
PARAMETERS: dict[str, dict[str, Parameter]] = {
    "FisherSnedecor": {"df1": _TAIL, "df2": _TAIL},
    "GeneralizedPareto": {"concentration": _TAIL},  # a negative one would move the end of the support
    "Geometric": {"logits": _ODDS},
    "LogNormal": {"scale": _TAIL},
    "LogisticNormal": {"loc": _real("k"), "scale": _positive("k")},
    "LowRankMultivariateNormal": {"cov_factor": _real("k", "rank")},
    "MixtureOfDiagNormals": {
        "locs": _real("components", "k"),
        "coord_scale": _positive("components", "k"),
        "component_logits": _real("components"),
    },
    "MixtureOfDiagNormalsSharedCovariance": {
        "locs": _real("components", "k"),
        "coord_scale": _positive("k"),
        "component_logits": _real("components"),
    },
    "MultivariateStudentT": {"df": _TAIL},
    "NegativeBinomial": {"logits": _ODDS},
    "Pareto": {"alpha": _TAIL},
    # Pyro's log_prob clamps the density of directions opposite to a longer vector
    "ProjectedNormal": {"concentration": Parameter(constraints.real, ("k",), 3.5)},
    # Pyro's normaliser is a series of 50 terms
    "SineBivariateVonMises": {
        "phi_concentration": Parameter(constraints.positive, (), 3.0),
        "psi_concentration": Parameter(constraints.positive, (), 3.0),
        "weighted_correlation": Parameter(constraints.interval(-1.0, 1.0)),
    },
    "Stable": _STABILITY,
    "StableWithLogProb": _STABILITY,
    "StudentT": {"df": _TAIL},
    "Weibull": {"concentration": _TAIL},
    "ZeroInflatedNegativeBinomial": {"logits": _ODDS},
}
"""What ``arg_constraints`` doesn't tell."""

OFFSETS = {"df": log(4), "df1": log(4), "df2": log(4), "stability": log(2.6)}
"""Added to the bounded number where 0 would be a poor start: one degree of freedom has no mean, stability 1.1 neither."""

ALTERNATIVES = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix", "precision_matrix"),
    ("weighted_correlation", "correlation"),
)
"""Several ways to tell the same: the first is predicted."""

SUPPORTS: dict[str, Callable[[Any], Any]] = {
    "AffineBeta": lambda d: open_interval(d.low, d.high),
    "Beta": lambda d: UNIT,
    "Chi2": lambda d: constraints.positive,
    "Dirichlet": lambda d: open_simplex(),
    "DirichletMultinomial": lambda d: Counts(d.total_count),
    "ExtendedBetaBinomial": lambda d: constraints.integer_interval(0, d.total_count),
    "ExtendedBinomial": lambda d: constraints.integer_interval(0, d.total_count),
    "Gamma": lambda d: constraints.positive,
    "Multinomial": lambda d: Counts(d.total_count),
    "ProjectedNormal": lambda d: Sphere(),
    "Uniform": lambda d: constraints.half_open_interval(d.low, d.high),
    "VonMises": lambda d: ANGLE,
    "VonMises3D": lambda d: Sphere(),
}
"""Where the family's own support is wider than its mass, or has ends where its density is infinite or NaN."""

_WRAPPER = "it is another distribution's frame: make a head of that one"
_MATRIX = "its values are matrices"
_SERIES = "its values are whole series, not sites"
_SINGLE = "it takes no batch of parameters"
_QUANTISED = "its samples are discrete, its log_prob a density of the relaxed ones"
REASONS: dict[str, str] = {
    "AVFMultivariateNormal": _SINGLE,
    "CoalescentTimes": "its samples ignore the rate",
    "CoalescentTimesWithRate": "it has no sampler",
    "Delta": "a point mass has no density",
    "DiscreteHMM": _SERIES,
    "Empirical": "its parameters have no fixed size",
    "ExpandedDistribution": _WRAPPER,
    "ExponentialFamily": "it is abstract",
    "GammaGaussianHMM": _SERIES,
    "GaussianHMM": _SERIES,
    "GaussianMRF": _SERIES,
    "GaussianScaleMixture": _SINGLE,
    "GroupedNormalNormal": "it has no sampler",
    "ImproperUniform": "its mass is infinite",
    "Independent": _WRAPPER,
    "IndependentHMM": _SERIES,
    "LKJ": _MATRIX,
    "LKJCholesky": _MATRIX,
    "LKJCorrCholesky": _MATRIX,
    "LinearHMM": _SERIES,
    "LogNormalNegativeBinomial": "it has no sampler, and its log_prob is a quadrature",
    "MaskedDistribution": _WRAPPER,
    "MaskedMixture": _WRAPPER,
    "MixtureSameFamily": "its components are a batch: use the head Mixture",
    "NanMaskedMultivariateNormal": "missing entries are no values: use MultivariateNormal",
    "NanMaskedNormal": "missing entries are no values: use Normal",
    "OMTMultivariateNormal": _SINGLE,
    "OneHotCategoricalStraightThrough": "the gradient of its samples is biased by design: use OneHotCategorical",
    "OneOneMatching": _SINGLE,
    "OneTwoMatching": _SINGLE,
    "Rejector": "its parts are functions",
    "RelaxedBernoulliStraightThrough": _QUANTISED,
    "RelaxedOneHotCategoricalStraightThrough": _QUANTISED,
    "SpanningTree": _MATRIX,
    "TorchDistribution": "it is abstract",
    "TruncatedPolyaGamma": "its log_prob and samples are approximations",
    "Unit": "it has no value",
    "Wishart": _MATRIX,
}
"""Why a family is no head, where trying it would not tell, or not clearly."""


class Family(NamedTuple):
    """A row of the table: a distribution that Pyro exports, and a head of it, or why there is none.

    Attributes:
        name: of the class.
        head: a head of small size, or None.
        reason: why there is no head, or "".
    """

    name: str
    head: Parametric | None
    reason: str


def families() -> list[Family]:
    """All distributions that Pyro exports, each tried as a head.

    Example:
        >>> rows = families()
        >>> [row.head for row in rows if row.name == "BetaBinomial"]
        [Parametric(BetaBinomial, total_count=7)]
        >>> [row.reason for row in rows if row.name == "Delta"]
        ['a point mass has no density']
    """
    from .parametric import Parametric

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
    """The table of :func:`families` in Markdown: those that can be heads, then the others with the reason."""
    rows = families()
    lines = ["| family | example | site | predicted | P | samples |", "|---|---|---|---|---|---|"]
    for name, head, _ in rows:
        if head is not None:
            predicted = ", ".join(f"{n} {s}" if s else n for n, s in head.parameters_of.items())
            kind = "reparameterised" if head.has_rsample else "plain"
            lines.append(f"| {name} | `{head}` | {head.site_shape} | {predicted} | {head.num_params} | {kind} |")
    lines += ["", "| not a head | why |", "|---|---|"]
    return "\n".join(lines + [f"| {row.name} | {row.reason} |" for row in rows if row.head is None])


def _settings(name: str) -> dict[str, Any]:
    from .parametric import Normal, Parametric, Poisson, VonMises

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
