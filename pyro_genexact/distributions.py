"""Public names of this package's distributions, which are defined in other modules."""

from .autoregressive.distribution import AutoregressiveDistribution
from .autoregressive.sequence import SequenceDistribution, TerminationCurve
from .autoregressive.site_by_site import ChainRuleDistribution
from .chains import divergences as divergences  # the import registers the KL divergences
from .chains.crf import LinearChainCRF
from .chains.hidden_markov import HiddenMarkov
from .chains.labels import LabelStrings
from .core.faces import publish
from .families.beta_gaussian import BetaGaussian, MultivariateBetaGaussian
from .families.continuous_categorical import ContinuousCategorical
from .families.discretized_logistic import DiscretizedLogistic
from .families.entmax import EntmaxCategorical
from .families.mixture import Mixture, UnionConstraint
from .families.per_site import PerSite, PerSiteConstraint
from .families.stable import Stable
from .families.stopped import Stopped, StoppedConstraint
from .flows.transformed import TransformedDistribution

__all__ = [
    "AutoregressiveDistribution",
    "BetaGaussian",
    "ChainRuleDistribution",
    "ContinuousCategorical",
    "DiscretizedLogistic",
    "EntmaxCategorical",
    "HiddenMarkov",
    "LabelStrings",
    "LinearChainCRF",
    "Mixture",
    "MultivariateBetaGaussian",
    "PerSite",
    "PerSiteConstraint",
    "SequenceDistribution",
    "Stable",
    "Stopped",
    "StoppedConstraint",
    "TerminationCurve",
    "TransformedDistribution",
    "UnionConstraint",
]

publish(globals())
