"""Exact autoregressive models and normalising flows as ordinary Pyro distributions."""

from . import conditioners, decoding, diagnostics, distributions, flows, guides, heads, numerics, semirings, transforms
from .base import Conditioner, Constant, DistributionModule, Head, Padded, Source, Steps
from .distributions import HiddenMarkov, LinearChainCRF
from .flows import Flow
from .models import CRF, Autoregressive, Conditional, OrderEnsemble, Sequence
from .numerics import ConvergenceError
from .svi import GuideResult, fit_guide
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
    "GuideResult",
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
    "diagnostics",
    "distributions",
    "fit",
    "fit_guide",
    "flows",
    "guides",
    "heads",
    "numerics",
    "semirings",
    "transforms",
]
