"""Bijections with exact log-determinants: Pyro transforms, and modules whose call returns one."""

from ..core.faces import publish
from .affine import Affine
from .autoregressive import AutoregressiveTransform, ConditionedAutoregressive
from .base import Bijection, Chain, PlainTransform, RememberingTransform
from .block_autoregressive import BlockAutoregressive, ConditionedBlockAutoregressive
from .coupling import ConditionedCoupling, Coupling
from .linear import Permute, Reverse, Standardize
from .matrices import Householder, LULinear, Rotation
from .modules import BijectionModule, Inverse
from .monotone import Monotone
from .patches import Patches
from .prefixes import Prefixes
from .residual import ConditionedResidual, Planar, Radial, Sylvester
from .spline import CircularRationalQuadratic, RationalQuadratic
from .support import HalfLine, Interval, Simplex, ToSupport

__all__ = [
    "Affine",
    "AutoregressiveTransform",
    "Bijection",
    "BijectionModule",
    "BlockAutoregressive",
    "Chain",
    "CircularRationalQuadratic",
    "ConditionedAutoregressive",
    "ConditionedBlockAutoregressive",
    "ConditionedCoupling",
    "ConditionedResidual",
    "Coupling",
    "HalfLine",
    "Householder",
    "Interval",
    "Inverse",
    "LULinear",
    "Monotone",
    "Patches",
    "Permute",
    "PlainTransform",
    "Planar",
    "Prefixes",
    "Radial",
    "RationalQuadratic",
    "RememberingTransform",
    "Reverse",
    "Rotation",
    "Simplex",
    "Standardize",
    "Sylvester",
    "ToSupport",
]

publish(globals())
