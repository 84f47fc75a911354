"""Distributions that a call returns, as ordinary Pyro distributions."""

from pyro.distributions import TransformedDistribution

from . import divergences
from .autoregressive import AutoregressiveDistribution
from .continuous_categorical import ContinuousCategorical
from .crf import LinearChainCRF
from .discretized_logistic import DiscretizedLogistic
from .hidden_markov import HiddenMarkov
from .labels import LabelStrings
from .mixture import Mixture, UnionConstraint
from .per_site import PerSite, PerSiteConstraint
from .stable import Stable

__all__ = [
    "AutoregressiveDistribution",
    "ContinuousCategorical",
    "DiscretizedLogistic",
    "HiddenMarkov",
    "LabelStrings",
    "LinearChainCRF",
    "Mixture",
    "PerSite",
    "PerSiteConstraint",
    "Stable",
    "TransformedDistribution",
    "UnionConstraint",
    "divergences",
]
