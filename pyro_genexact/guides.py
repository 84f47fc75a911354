"""Public name of the automatic guide AutoFlow, which inference/autoflow.py defines."""

from .core.faces import publish
from .inference.autoflow import AutoFlow

__all__ = ["AutoFlow"]

publish(globals())
