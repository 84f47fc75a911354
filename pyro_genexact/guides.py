"""Automatic guides for Pyro models: :class:`AutoFlow`, a normalising flow over all continuous latents.

Fitting a guide needs the likelihood: each observed site must have a distribution with ``log_prob``. For simulators without
one, :func:`~pyro_genexact.fit_guide` raises a NotImplementedError.
"""

from .core.faces import publish
from .inference.autoflow import AutoFlow

__all__ = ["AutoFlow"]

publish(globals())
