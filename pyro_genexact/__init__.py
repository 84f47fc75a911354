"""Exact autoregressive models and normalising flows as ordinary Pyro distributions."""

from . import conditioners, distributions, flows, heads, transforms
from .base import Conditioner, Constant, DistributionModule, Head, Steps
from .flows import Flow
from .models import Autoregressive, Conditional, OrderEnsemble
from .training import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "Autoregressive",
    "Conditional",
    "Conditioner",
    "Constant",
    "DistributionModule",
    "FitResult",
    "Flow",
    "Head",
    "OrderEnsemble",
    "Steps",
    "__version__",
    "conditioners",
    "distributions",
    "fit",
    "flows",
    "heads",
    "transforms",
]
