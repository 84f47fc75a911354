"""Heads map the predicted parameters of a site to a distribution or a bijection of its value."""

from ..core.faces import publish
from .bijections import Affine, Shift
from .common_families import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    ContinuousCategorical,
    Dirichlet,
    Exponential,
    Gamma,
    Geometric,
    Laplace,
    LogNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
    StudentT,
    VonMises,
    ZeroInflatedPoisson,
)
from .composite import ConditionalHead, PerSite
from .filters import Filter, Forbid, MinLength, MinP, Tempered, TopK, TopP
from .mixture import DiscretizedLogistic, Mixture
from .networks import IntegratedPositive, MonotoneNetwork
from .parametric import Parametric
from .polynomial import Bernstein, SumOfSquares
from .sigmoidal import DeepSigmoid, LogisticMixtureCDF
from .sparse import BetaGaussian, EntmaxCategorical, MultivariateBetaGaussian
from .spline import CircularSpline, RationalQuadraticSpline
from .stopped import Stopped

__all__ = [
    "Affine",
    "Bernoulli",
    "Bernstein",
    "Beta",
    "BetaGaussian",
    "Binomial",
    "Categorical",
    "CircularSpline",
    "ConditionalHead",
    "ContinuousCategorical",
    "DeepSigmoid",
    "Dirichlet",
    "DiscretizedLogistic",
    "EntmaxCategorical",
    "Exponential",
    "Filter",
    "Forbid",
    "Gamma",
    "Geometric",
    "IntegratedPositive",
    "Laplace",
    "LogNormal",
    "LogisticMixtureCDF",
    "MinLength",
    "MinP",
    "Mixture",
    "MonotoneNetwork",
    "MultivariateBetaGaussian",
    "MultivariateNormal",
    "NegativeBinomial",
    "Normal",
    "OneHotCategorical",
    "Parametric",
    "PerSite",
    "Poisson",
    "RationalQuadraticSpline",
    "Shift",
    "Stopped",
    "StudentT",
    "SumOfSquares",
    "Tempered",
    "TopK",
    "TopP",
    "VonMises",
    "ZeroInflatedPoisson",
]

publish(globals())
