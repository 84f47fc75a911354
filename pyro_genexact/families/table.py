"""By family name: how parameters are predicted, the exact support, or why it cannot be a head."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any, NamedTuple

from torch.distributions import constraints

from .supports import ANGLE, UNIT, Counts, Sphere, innermost, open_interval, open_simplex


class Parameter(NamedTuple):
    """How to predict a parameter: its constraint, sizes ("k": the last of ``shape``), the bound of unconstrained numbers."""

    constraint: Any
    shape: tuple[str, ...] = ()
    bound: float | None = 10.0


def describe(constraint: Any) -> Parameter:
    """What ``arg_constraints`` says of a parameter; numbers of real ones are not bounded."""
    dims = 0 if constraints.is_dependent(constraint) else constraint.event_dim
    constraint = innermost(constraint)
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
