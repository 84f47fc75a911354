"""Decoding of strings: greedy, beams, exact mode, minimum Bayes risk; exact log-probabilities."""

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
