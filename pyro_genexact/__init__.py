"""Exact autoregressive models and normalising flows as ordinary Pyro distributions."""

from . import conditioners, distributions, flows, heads, transforms
from .base import Conditioner, Constant, DistributionModule, Head
from .flows import Flow

__version__ = "0.1.0"

__all__ = [
    "Conditioner",
    "Constant",
    "DistributionModule",
    "Flow",
    "Head",
    "__version__",
    "conditioners",
    "distributions",
    "flows",
    "heads",
    "transforms",
]
