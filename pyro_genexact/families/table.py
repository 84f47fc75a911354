"""Tables by family name: how its parameters are predicted, its exact support, or why it cannot be a head."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any, NamedTuple

from torch.distributions import constraints

from .supports import ANGLE, UNIT, Counts, Sphere, innermost, open_interval, open_simplex


class Parameter(NamedTuple):
    """How a parameter is predicted.

    Attributes:
        constraint: its constraint.
        shape: the names of its sizes; "k" is the last size of the head's ``shape``.
        bound: the bound of its unconstrained numbers, or None.
    """

    constraint: Any
    shape: tuple[str, ...] = ()
    bound: float | None = 10.0


def describe(constraint: Any) -> Parameter:
    """Returns how to predict a parameter with this constraint; the numbers of real parameters are not bounded."""
    dims = 0 if constraints.is_dependent(constraint) else constraint.event_dim
    constraint = innermost(constraint)
    return Parameter(constraint, ("k",) * dims, None if constraint is constraints.real else 10.0)


def _real(*shape: str) -> Parameter:
    return Parameter(constraints.real, shape, None)


def _positive(*shape: str) -> Parameter:
    return Parameter(constraints.positive, shape)


_TAIL = Parameter(constraints.positive, (), 4.0)  # with a larger bound, most samples of heavy tails overflow
_ODDS = Parameter(constraints.real, (), 10.0)  # bounded because these logits scale the counts
_STABILITY = {"stability": Parameter(constraints.interval(0.2, 2.0))}  # for smaller stability, densities are spikes
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
"""Overrides for families whose ``arg_constraints`` are incomplete or too wide."""

OFFSETS = {"df": log(4), "df1": log(4), "df2": log(4), "stability": log(2.6)}
"""Offsets of the bounded numbers of parameters for which 0 is a poor start (one degree of freedom has no mean)."""

ALTERNATIVES = (
    ("logits", "probs"),
    ("gate_logits", "gate"),
    ("scale_tril", "covariance_matrix", "precision_matrix"),
    ("weighted_correlation", "correlation"),
)
"""Groups of equivalent parameters, of which the first one is predicted."""

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
"""Supports for families whose own support is too wide, or includes ends where the density is infinite or NaN."""

_WRAPPER = "it wraps another distribution: make a head of that one"
_MATRIX = "its values are matrices"
_SERIES = "its values are whole series, not sites"
_SINGLE = "it does not support a batch of parameters"
_QUANTISED = "its samples are discrete, but its log_prob is the density of relaxed samples"
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
    "LogNormalNegativeBinomial": "it has no sampler, and its log_prob is approximated by quadrature",
    "MaskedDistribution": _WRAPPER,
    "MaskedMixture": _WRAPPER,
    "MixtureSameFamily": "its components are a batch: use the head Mixture",
    "NanMaskedMultivariateNormal": "its values may have missing entries: use MultivariateNormal",
    "NanMaskedNormal": "its values may be missing: use Normal",
    "OMTMultivariateNormal": _SINGLE,
    "OneHotCategoricalStraightThrough": "the gradient of its samples is biased by design: use OneHotCategorical",
    "OneOneMatching": _SINGLE,
    "OneTwoMatching": _SINGLE,
    "Rejector": "its arguments are functions",
    "RelaxedBernoulliStraightThrough": _QUANTISED,
    "RelaxedOneHotCategoricalStraightThrough": _QUANTISED,
    "SpanningTree": _MATRIX,
    "TorchDistribution": "it is abstract",
    "TruncatedPolyaGamma": "its log_prob and samples are approximations",
    "Unit": "its values are empty",
    "Wishart": _MATRIX,
}
"""Reasons why families cannot be heads, for families that would fail without an error or with an unclear one."""
