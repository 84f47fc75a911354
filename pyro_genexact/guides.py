"""Flows as automatic guides."""

from .core.faces import publish
from .inference.autoflow import AutoFlow

__all__ = ["AutoFlow"]

publish(globals())
