"""Exact autoregressive models and normalising flows as ordinary Pyro distributions."""

from . import conditioners, distributions, flows, heads, transforms
from .base import Conditioner, Constant, DistributionModule, Head
from .flows import Flow
from .training import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "Conditioner",
    "Constant",
    "DistributionModule",
    "FitResult",
    "Flow",
    "Head",
    "__version__",
    "conditioners",
    "distributions",
    "fit",
    "flows",
    "heads",
    "transforms",
]
