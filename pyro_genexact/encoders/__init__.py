"""Encoders: networks that turn one observation of any size into a vector of features, for amortised inference."""

from ..core.faces import publish
from .base import Encoder
from .series import Series
from .sets import DeepSet, SetEncoder, SetTransformer
from .vectors import Joint, Standardized, Vector

__all__ = ["DeepSet", "Encoder", "Joint", "Series", "SetEncoder", "SetTransformer", "Standardized", "Vector"]

publish(globals())
