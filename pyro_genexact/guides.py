"""Automatic guides for Pyro models: :class:`AutoFlow`, a normalising flow over all continuous latents."""

from .core.faces import publish
from .inference.autoflow import AutoFlow

__all__ = ["AutoFlow"]

publish(globals())
