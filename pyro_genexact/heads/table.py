"""What the families' own classes don't tell, and the table of all families."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

from ..distributions.stable import Stable

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


class _Counts(constraints.Constraint):
    """Vectors of counts that sum to the total (torch's own admits smaller sums)."""

    is_discrete = True
    event_dim = 1

    def __init__(self, total: int | Tensor) -> None:
        self.upper_bound = total

    def check(self, value: Tensor) -> Tensor:
        """Whether they are."""
        return ((value >= 0) & (value % 1 == 0)).all(-1) & (value.sum(-1) == self.upper_bound)


class _Sphere(constraints.Constraint):
    """Unit vectors."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether they are."""
        return dist.constraints.sphere.check(value)

    def anchor(self, like: Tensor) -> Tensor:
        """One of them."""
        return torch.eye(1, like.shape[-1], dtype=like.dtype, device=like.device)[0]


@dataclass(frozen=True)
class _Between:
    """The check of an interval without its ends, where densities may be infinite."""

    low: Any
    high: Any

    def __call__(self, value: Tensor) -> Tensor:
        return (self.low < value) & (value < self.high)


@dataclass(frozen=True)
class _AllPositive:
    """The check of a simplex without its faces, where densities may be infinite."""

    def __call__(self, value: Tensor) -> Tensor:
        return (value > 0).all(-1) & constraints.simplex.check(value)


def _open_interval(low: Any, high: Any) -> Any:
    """An interval, for ``biject_to`` as others, that checks strictly."""
    interval: Any = constraints.interval(low, high)
    interval.check = _Between(low, high)
    return interval


def _open_simplex() -> Any:
    """A simplex, for ``biject_to`` as others, that checks strictly."""
    simplex: Any = copy.copy(constraints.simplex)
    simplex.check = _AllPositive()
    return simplex


class _InverseGamma(dist.InverseGamma):  # type: ignore[name-defined]
    """With a log_prob that holds near 0 (torch's is +inf where the square of 1 / x overflows)."""

    def log_prob(self, value: Tensor) -> Tensor:
        a, b = self.concentration, self.rate
        return a * b.log() - torch.lgamma(a) - (a + 1) * value.log() - b / value


class _Kumaraswamy(dist.Kumaraswamy):  # type: ignore[name-defined]
    """With a log_prob that holds where x ** concentration1 is below the precision of 1 (torch's is -inf there)."""

    def log_prob(self, value: Tensor) -> Tensor:
        a, b = self.concentration1, self.concentration0
        rest = torch.log(-torch.expm1(a * value.log()))
        return a.log() + b.log() + torch.xlogy(a - 1, value) + (b - 1) * rest


class _Weibull(dist.Weibull):  # type: ignore[name-defined]
    """With finite gradients where torch's divides by the square of a tiny power."""

    def log_prob(self, value: Tensor) -> Tensor:
        k, z = self.concentration, value.log() - self.scale.log()
        return k.log() + k * z - value.log() - (k * z).exp()


class _RelaxedBernoulli(dist.RelaxedBernoulli):  # type: ignore[name-defined]
    """With a log_prob that is finite for large logits."""

    def log_prob(self, value: Tensor) -> Tensor:
        jacobian = value.log() + torch.log1p(-value)
        z = self.logits - self.temperature * (value.log() - torch.log1p(-value))
        return self.temperature.log() + z - 2 * softplus(z) - jacobian


class _SoftAsymmetricLaplace(dist.SoftAsymmetricLaplace):  # type: ignore[name-defined]
    """With finite gradients in the tails, where erfc is 0."""

    def log_prob(self, value: Tensor) -> Tensor:
        x, s = (value - self.loc) / self.scale, self.softness
        left, right = (self._half(side, s, r) for side, r in ((x, self.asymmetry), (-x, self.asymmetry.reciprocal())))
        total = self.asymmetry + self.asymmetry.reciprocal()
        return torch.logaddexp(left, right) - math.log(2) - (total * self.scale).log()

    @staticmethod
    def _half(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """log of exp(x / r + s² / 2r²) erfc(z), z = (x + s² / r) / s√2; z² = x² / 2s² + x / r + s² / 2r²."""
        z = (x + s * s / r) / (s * math.sqrt(2))
        far = torch.special.erfcx(z.clamp(min=0)).log() - (x / s).square() / 2
        near = x / r + (s / r).square() / 2 + torch.special.erfc(z.clamp(max=0)).log()
        return torch.where(z > 0, far, near)


class _MixtureOfDiagNormals(dist.MixtureOfDiagNormals):  # type: ignore[name-defined]
    """With samples of any shape, also of a batch."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        wide = self.expand(torch.Size(sample_shape) + self.batch_shape)
        return super(_MixtureOfDiagNormals, wide).rsample()


class _MixtureOfDiagNormalsSharedCovariance(dist.MixtureOfDiagNormalsSharedCovariance):  # type: ignore[name-defined]
    """With samples of any shape, also of a batch."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        wide = self.expand(torch.Size(sample_shape) + self.batch_shape)
        return super(_MixtureOfDiagNormalsSharedCovariance, wide).rsample()


class _SineBivariateVonMises(dist.SineBivariateVonMises):  # type: ignore[name-defined]
    """With samples that carry no gradient, as they are not reparameterised."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return super().sample(sample_shape)


class _SineSkewed(dist.SineSkewed):  # type: ignore[name-defined]
    """With samples that carry no gradient, as they are not reparameterised."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return super().sample(torch.Size(sample_shape))


REPAIRED: dict[str, type[Distribution]] = {
    "InverseGamma": _InverseGamma,
    "Kumaraswamy": _Kumaraswamy,
    "MixtureOfDiagNormals": _MixtureOfDiagNormals,
    "MixtureOfDiagNormalsSharedCovariance": _MixtureOfDiagNormalsSharedCovariance,
    "RelaxedBernoulli": _RelaxedBernoulli,
    "SineBivariateVonMises": _SineBivariateVonMises,
    "SineSkewed": _SineSkewed,
    "SoftAsymmetricLaplace": _SoftAsymmetricLaplace,
    "Stable": Stable,
    "StableWithLogProb": Stable,
    "Weibull": _Weibull,
}
"""Families whose own log_prob, gradient or samples are wrong in places."""

if hasattr(dist, "GeneralizedPareto"):  # since torch 2.8

    class _GeneralizedPareto(dist.GeneralizedPareto):  # type: ignore[name-defined]
        """With positive concentration, and a log_prob in every dtype."""

        def log_prob(self, value: Tensor) -> Tensor:
            c = self.concentration
            return -self.scale.log() - (1 / c + 1) * torch.log1p(c * (value - self.loc) / self.scale)

    REPAIRED["GeneralizedPareto"] = _GeneralizedPareto

_STABILITY = {"stability": Parameter(constraints.interval(0.2, 2.0))}  # below, densities are spikes
PARAMETERS: dict[str, dict[str, Parameter]] = {
    "GeneralizedPareto": {"concentration": _positive()},  # a negative one would move the end of the support
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
    "Weibull": {"concentration": Parameter(constraints.positive, (), 4.0)},  # its power must not overflow
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

_ANGLE = constraints.interval(-pi, pi)
_UNIT = _open_interval(0.0, 1.0)
SUPPORTS: dict[str, Callable[[Any], Any]] = {
    "AffineBeta": lambda d: _open_interval(d.low, d.high),
    "Beta": lambda d: _UNIT,
    "Chi2": lambda d: constraints.positive,
    "Dirichlet": lambda d: _open_simplex(),
    "DirichletMultinomial": lambda d: _Counts(d.total_count),
    "ExtendedBetaBinomial": lambda d: constraints.integer_interval(0, d.total_count),
    "ExtendedBinomial": lambda d: constraints.integer_interval(0, d.total_count),
    "Gamma": lambda d: constraints.positive,
    "GeneralizedPareto": lambda d: constraints.greater_than_eq(d.loc),
    "Kumaraswamy": lambda d: _UNIT,
    "LogisticNormal": lambda d: _open_simplex(),
    "Multinomial": lambda d: _Counts(d.total_count),
    "ProjectedNormal": lambda d: _Sphere(),
    "RelaxedBernoulli": lambda d: _UNIT,
    "RelaxedOneHotCategorical": lambda d: _open_simplex(),
    "SineBivariateVonMises": lambda d: constraints.independent(_ANGLE, 1),
    "SineSkewed": lambda d: constraints.independent(_ANGLE, 1),
    "Uniform": lambda d: constraints.half_open_interval(d.low, d.high),
    "VonMises": lambda d: _ANGLE,
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
    "OMTMultivariateNormal": _SINGLE,
    "OneOneMatching": _SINGLE,
    "OneTwoMatching": _SINGLE,
    "Rejector": "its parts are functions",
    "RelaxedBernoulliStraightThrough": _QUANTISED,
    "RelaxedOneHotCategoricalStraightThrough": _QUANTISED,
    "SpanningTree": _MATRIX,
    "TorchDistribution": "it is abstract",
    "TruncatedPolyaGamma": "its log_prob and samples are approximations",
    "Unit": "it has no value",
    "VonMises3D": "it has no sampler",
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
        "Categorical Dirichlet LogisticNormal MultivariateNormal MultivariateStudentT NanMaskedMultivariateNormal "
        "OneHotCategorical OneHotCategoricalStraightThrough OrderedLogistic ProjectedNormal"
    )
    return settings.get(name, vector if name in vectors.split() else {})
