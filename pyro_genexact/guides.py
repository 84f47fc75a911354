"""Guides for Pyro models: :class:`AutoFlow`, a normalising flow over all continuous latents, and :class:`Amortized`.

:func:`~pyro_genexact.fit_guide` needs the likelihood: each observed site must have a distribution with ``log_prob``. For simulators
without one it raises a NotImplementedError. :func:`~pyro_genexact.fit_amortized` fits :class:`Amortized` to simulations alone.
"""

from .core.faces import publish
from .inference.autoflow import AutoFlow
from .simulation.amortized import Amortized

__all__ = ["Amortized", "AutoFlow"]

publish(globals())
