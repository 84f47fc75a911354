"""Bijections with exact log-determinants, as Pyro transforms and as modules that return them."""

from .affine import Affine
from .autoregressive import AutoregressiveTransform, ConditionedAutoregressive
from .base import Chain, Inverse, PlainTransform, RememberingTransform
from .linear import Permute, Reverse, Standardize
from .monotone import Monotone
from .support import HalfLine, Interval, Simplex, ToSupport

__all__ = [
    "Affine",
    "AutoregressiveTransform",
    "Chain",
    "ConditionedAutoregressive",
    "HalfLine",
    "Interval",
    "Inverse",
    "Monotone",
    "Permute",
    "PlainTransform",
    "RememberingTransform",
    "Reverse",
    "Simplex",
    "Standardize",
    "ToSupport",
]
