"""Roots of increasing functions and integrals, elementwise over any batch: right to rounding, or an error.

What has no formula goes through these: :func:`root`, :func:`refine` and :func:`implicit` for inverses and quantiles,
:func:`integrate` for integrals. Two families do on their own what is special to them: samples of the continuous
categorical distribution take Newton's steps on a convex function, and the stable distribution integrates along a path
between bounds of its own.
"""

from ..core.faces import publish
from .derivatives import implicit
from .errors import ConvergenceError
from .quadrature import integrate, kronrod_rule
from .roots import bisect, find, root
from .vectors import refine

__all__ = ["ConvergenceError", "bisect", "find", "implicit", "integrate", "kronrod_rule", "refine", "root"]

publish(globals())
