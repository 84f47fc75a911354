"""An optional C++ operator that runs the loop over the sites of :class:`~pyro_genexact.conditioners.MADE` on the CPU.

Build it once with ``python -m pyro_genexact.native build``, which needs a C++ compiler. From then on, every process
that samples on the CPU without grad uses it. The whole loop is one call for the heads ``Affine``,
``RationalQuadraticSpline``, ``SumOfSquares``, ``Bernstein``, ``DeepSigmoid`` with one layer, ``Bernoulli`` and
``Categorical``; for other heads, each site is one call. Without the operator, the same loop runs in Python. Both give the
same samples from the same seed, up to rounding.
"""

from ..core.faces import publish
from .build import build
from .library import enabled, is_built, library_path

__all__ = ["build", "enabled", "is_built", "library_path"]

publish(globals())
