"""Networks that encode context and history: the parameters of each site from the sites before it."""

from .made import MADE, MADEState
from .masked import MaskedLinear

__all__ = ["MADE", "MADEState", "MaskedLinear"]
