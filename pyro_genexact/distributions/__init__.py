"""Distributions that a call returns, as ordinary Pyro distributions."""

from pyro.distributions import TransformedDistribution

from .autoregressive import AutoregressiveDistribution
from .continuous_categorical import ContinuousCategorical
from .discretized_logistic import DiscretizedLogistic
from .mixture import Mixture, UnionConstraint
from .per_site import PerSite, PerSiteConstraint
from .stable import Stable

__all__ = [
    "AutoregressiveDistribution",
    "ContinuousCategorical",
    "DiscretizedLogistic",
    "Mixture",
    "PerSite",
    "PerSiteConstraint",
    "Stable",
    "TransformedDistribution",
    "UnionConstraint",
]
