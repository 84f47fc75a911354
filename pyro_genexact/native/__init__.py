"""An optional C++ operator that runs the loop over the sites of :class:`~pyro_genexact.conditioners.MADE` on the CPU.

Build it once with ``python -m pyro_genexact.native build``, which needs a C++ compiler. From then on, every process
that samples on the CPU without grad uses it, for the heads ``Affine``, ``RationalQuadraticSpline``, ``Bernoulli`` and
``Categorical``. Without it, the same loop runs in Python. Both give the same samples from the same seed, up to rounding.
"""

from ..core.faces import publish
from .build import build
from .library import enabled, is_built, library_path

__all__ = ["build", "enabled", "is_built", "library_path"]

publish(globals())
