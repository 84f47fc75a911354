"""Distributions that a call returns, as ordinary Pyro distributions."""

from . import divergences
from .autoregressive import AutoregressiveDistribution
from .continuous_categorical import ContinuousCategorical
from .crf import LinearChainCRF
from .discretized_logistic import DiscretizedLogistic
from .hidden_markov import HiddenMarkov
from .labels import LabelStrings
from .mixture import Mixture, UnionConstraint
from .per_site import PerSite, PerSiteConstraint
from .sequence import SequenceDistribution, TerminationCurve
from .stable import Stable
from .stopped import Stopped, StoppedConstraint
from .transformed import TransformedDistribution

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
    "SequenceDistribution",
    "Stable",
    "Stopped",
    "StoppedConstraint",
    "TerminationCurve",
    "TransformedDistribution",
    "UnionConstraint",
    "divergences",
]
