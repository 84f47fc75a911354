"""What the parameters of a site mean: a distribution or a strictly monotone bijection of its value."""

from .bijections import Affine
from .composite import ConditionalHead, PerSite
from .mixture import DiscretizedLogistic, Mixture
from .parametric import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
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
    Parametric,
    Poisson,
    StudentT,
    VonMises,
    ZeroInflatedPoisson,
)
from .simplex import ContinuousCategorical

__all__ = [
    "Affine",
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "ConditionalHead",
    "ContinuousCategorical",
    "Dirichlet",
    "DiscretizedLogistic",
    "Exponential",
    "Gamma",
    "Geometric",
    "Laplace",
    "LogNormal",
    "Mixture",
    "MultivariateNormal",
    "NegativeBinomial",
    "Normal",
    "OneHotCategorical",
    "Parametric",
    "PerSite",
    "Poisson",
    "StudentT",
    "VonMises",
    "ZeroInflatedPoisson",
]
