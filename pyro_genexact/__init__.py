"""Exact autoregressive models and normalising flows as ordinary Pyro distributions."""

from . import conditioners, distributions, flows, heads, numerics, transforms
from .base import Conditioner, Constant, DistributionModule, Head, Steps
from .flows import Flow
from .models import Autoregressive, Conditional, OrderEnsemble
from .numerics import ConvergenceError
from .training import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "Autoregressive",
    "Conditional",
    "Conditioner",
    "Constant",
    "ConvergenceError",
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
    "numerics",
    "transforms",
]
