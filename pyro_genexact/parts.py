"""What modules consist of that users do not construct themselves: saved files have these names, which must stay."""

from .base import Slot
from .conditioners.attention import Layer
from .conditioners.encoding import Dense, SiteEncoder
from .conditioners.sweeps import Sweeps
from .core.buffers import Packed
from .core.faces import publish
from .core.independent import All, Independent
from .families.categorical import Categorical
from .families.continuous_bernoulli import ContinuousBernoulli
from .families.repaired import (
    Binomial,
    ExtendedBinomial,
    FisherSnedecor,
    GeneralizedPareto,
    Gumbel,
    InverseGamma,
    Kumaraswamy,
    Logistic,
    LogNormal,
    Pareto,
    RelaxedBernoulli,
    SkewLogistic,
    SoftAsymmetricLaplace,
    SoftLaplace,
    StudentT,
    Weibull,
)
from .families.repaired_vectors import (
    LogisticNormal,
    LowRankMultivariateNormal,
    MixtureOfDiagNormals,
    MixtureOfDiagNormalsSharedCovariance,
    Multinomial,
    MultivariateNormal,
    MultivariateStudentT,
    RelaxedOneHotCategorical,
    SineBivariateVonMises,
    SineSkewed,
    VonMises3D,
)
from .families.supports import AllPositive, Between, Counts, Sphere
from .families.zero_inflated import ZeroInflatedDistribution, ZeroInflatedNegativeBinomial, ZeroInflatedPoisson
from .flows.coupling_recipes import Diagonal
from .flows.zuko import ZukoBase, ZukoTransform
from .heads.composite import Grouping
from .heads.parameters import Cholesky, Link, Part
from .transforms.base import Adapted, Inverted
from .transforms.block_network import BlockLinear
from .transforms.coupling import FirstSite

__all__ = [
    "Adapted",
    "All",
    "AllPositive",
    "Between",
    "Binomial",
    "BlockLinear",
    "Categorical",
    "Cholesky",
    "ContinuousBernoulli",
    "Counts",
    "Dense",
    "Diagonal",
    "ExtendedBinomial",
    "FirstSite",
    "FisherSnedecor",
    "GeneralizedPareto",
    "Grouping",
    "Gumbel",
    "Independent",
    "InverseGamma",
    "Inverted",
    "Kumaraswamy",
    "Layer",
    "Link",
    "LogNormal",
    "Logistic",
    "LogisticNormal",
    "LowRankMultivariateNormal",
    "MixtureOfDiagNormals",
    "MixtureOfDiagNormalsSharedCovariance",
    "Multinomial",
    "MultivariateNormal",
    "MultivariateStudentT",
    "Packed",
    "Pareto",
    "Part",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "SineBivariateVonMises",
    "SineSkewed",
    "SiteEncoder",
    "SkewLogistic",
    "Slot",
    "SoftAsymmetricLaplace",
    "SoftLaplace",
    "Sphere",
    "StudentT",
    "Sweeps",
    "VonMises3D",
    "Weibull",
    "ZeroInflatedDistribution",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
    "ZukoBase",
    "ZukoTransform",
]

publish(globals())
