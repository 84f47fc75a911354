"""Networks that encode context and history: the parameters of each site from the sites before it."""

from .made import MADE, MADEState, MaskedLinear

__all__ = ["MADE", "MADEState", "MaskedLinear"]
