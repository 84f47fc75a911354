"""Decoding of discrete sequences and arrays, with their exact log-probabilities.

Search for probable values (:func:`greedy`, :func:`beam_search`, :func:`exact_mode`), sampling without replacement
(:func:`stochastic_beam_search`) and decisions that maximise an expected utility (:func:`minimum_bayes_risk`).
"""

from ..core.faces import publish
from . import utilities
from .branch_and_bound import Mode, exact_mode
from .risk import BayesDecision, minimum_bayes_risk
from .search import Decoded, beam_search, greedy
from .stochastic import StochasticBeam, stochastic_beam_search

__all__ = [
    "BayesDecision",
    "Decoded",
    "Mode",
    "StochasticBeam",
    "beam_search",
    "exact_mode",
    "greedy",
    "minimum_bayes_risk",
    "stochastic_beam_search",
    "utilities",
]

publish(globals())
