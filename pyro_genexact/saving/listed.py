"""The list of classes and functions to which a saved file may refer, by exact name.

A file can call them with any arguments, and can set any attribute of instances. So nothing on the list imports modules,
evaluates code, opens files or returns attributes of other objects by name. The list contains no instances, since a file
could change their attributes for the whole process.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn.module import _Context  # an attribute of each PyroModule
from torch import nn
from torch.distributions import Distribution, Transform, constraints, transforms
from torch.nn import functional

from ..contexts import Features
from ..core.faces import PUBLISHED

_FACES = ("", ".conditioners", ".distributions", ".encoders", ".flows", ".heads", ".parts", ".transforms")
_KINDS = (nn.Module, Distribution, Transform, constraints.Constraint, Features)
_FAMILIES = """
    AffineBeta AsymmetricLaplace Bernoulli Beta BetaBinomial Binomial Categorical Cauchy Chi2 ContinuousBernoulli
    Delta Dirichlet DirichletMultinomial Exponential ExtendedBetaBinomial ExtendedBinomial FisherSnedecor
    FoldedDistribution Gamma GammaPoisson GeneralizedPareto Geometric Gumbel HalfCauchy HalfNormal Independent
    InverseGamma Kumaraswamy LKJ LKJCholesky Laplace LogNormal Logistic LogisticNormal LowRankMultivariateNormal
    MaskedDistribution MixtureOfDiagNormals MixtureOfDiagNormalsSharedCovariance MixtureSameFamily Multinomial
    MultivariateNormal MultivariateStudentT NegativeBinomial Normal OneHotCategorical OneHotCategoricalStraightThrough
    OrderedLogistic Pareto Poisson ProjectedNormal RelaxedBernoulli RelaxedBernoulliStraightThrough
    RelaxedOneHotCategorical RelaxedOneHotCategoricalStraightThrough SineBivariateVonMises SineSkewed SkewLogistic
    SoftAsymmetricLaplace SoftLaplace Stable StableWithLogProb StudentT TransformedDistribution Uniform Unit VonMises
    VonMises3D Weibull Wishart ZeroInflatedDistribution ZeroInflatedNegativeBinomial ZeroInflatedPoisson
"""
_MAPS = """
    CholeskyTransform CorrLCholeskyTransform CorrMatrixCholeskyTransform DiscreteCosineTransform ELUTransform
    HaarTransform LeakyReLUTransform LowerCholeskyAffine Normalize OrderedTransform Permute PositivePowerTransform
    SimplexToOrderedTransform SoftplusLowerCholeskyTransform SoftplusTransform
"""
_FUNCTIONS = {
    torch: """
        abs atan celu cos erf exp expm1 log1p log_softmax relu rrelu selu sigmoid sin sinh asinh softmax square tan tanh
    """,
    functional: """
        celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_softmax logsigmoid mish relu relu6 rrelu
        selu sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink
    """,
}


def full_name(value: Any) -> str:
    """Returns the name that a pickle uses for a class or function."""
    return f"{value.__module__}.{value.__name__ if callable_of_c(value) else value.__qualname__}"


def callable_of_c(value: Any) -> bool:
    """Returns whether this is a C function such as ``torch.tanh``, whose qualified name differs from its name in the module."""
    return isinstance(value, type(len))


def listed() -> dict[str, Any]:
    """Returns the allowed classes and functions of this package, of torch and of Pyro by full name."""
    ours = {
        name: value
        for name, value in PUBLISHED.items()
        for face, _, last in [name.rpartition(".")]
        if (face in _OUR_FACES or name == _AMORTIZED) and isinstance(value, type)
        if face == _PARTS or issubclass(value, _KINDS)
    }
    return ours | _OTHERS


def _constraints() -> list[Any]:
    """Returns the classes of the constraints that torch and Pyro export."""
    exported = [getattr(dist.constraints, name) for name in dist.constraints.__all__]
    kinds = [kind if isinstance(kind, type) else type(kind) for kind in exported]
    kinds = [kind for kind in kinds if issubclass(kind, constraints.Constraint)]
    return [kind for kind in kinds if kind is not constraints.dependent_property]


def _others() -> list[Any]:
    modules = [getattr(nn, name) for name in nn.modules.__all__]
    families = [getattr(place, name, None) for name in _FAMILIES.split() for place in (dist, torch.distributions)]
    maps = [getattr(transforms, name) for name in transforms.__all__]
    maps += [getattr(dist.transforms, name) for name in _MAPS.split() if hasattr(dist.transforms, name)]
    functions = [getattr(place, name) for place, names in _FUNCTIONS.items() for name in names.split()]
    return [
        *(kind for kind in modules if issubclass(kind, nn.Module)),
        *(kind for kind in families if kind is not None),
        *(kind for kind in maps if isinstance(kind, type)),
        transforms._InverseTransform,
        _Context,
        *_constraints(),
        *functions,
    ]


_PACKAGE = __name__.partition(".")[0]
_AMORTIZED = f"{_PACKAGE}.guides.Amortized"  # the other guides keep a model
_OUR_FACES, _PARTS = {_PACKAGE + face for face in _FACES}, f"{_PACKAGE}.parts"
_OTHERS = {full_name(value): value for value in _others()}
