"""Exact autoregressive models and normalising flows as ordinary Pyro distributions."""

from . import conditioners, decoding, distributions, flows, heads, numerics, semirings, transforms
from .base import Conditioner, Constant, DistributionModule, Head, Padded, Source, Steps
from .distributions import HiddenMarkov, LinearChainCRF
from .flows import Flow
from .models import CRF, Autoregressive, Conditional, OrderEnsemble, Sequence
from .numerics import ConvergenceError
from .training import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "CRF",
    "Autoregressive",
    "Conditional",
    "Conditioner",
    "Constant",
    "ConvergenceError",
    "DistributionModule",
    "FitResult",
    "Flow",
    "Head",
    "HiddenMarkov",
    "LinearChainCRF",
    "OrderEnsemble",
    "Padded",
    "Sequence",
    "Source",
    "Steps",
    "__version__",
    "conditioners",
    "decoding",
    "distributions",
    "fit",
    "flows",
    "heads",
    "numerics",
    "semirings",
    "transforms",
]
