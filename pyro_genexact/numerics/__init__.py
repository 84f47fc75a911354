"""Roots of increasing functions and integrals, elementwise over any batch, accurate to rounding or an error is raised.

The package uses them for all inverses, quantiles (:func:`root`, :func:`refine`, :func:`implicit`) and integrals
(:func:`integrate`) without a closed form, except in two families: samples of the continuous categorical distribution
apply Newton's method to a convex function, and the density of the stable distribution is integrated along its own path.
"""

from ..core.faces import publish
from .derivatives import implicit
from .errors import ConvergenceError
from .fixed_point import FixedPoint
from .quadrature import integrate, kronrod_rule
from .roots import bisect, find, root
from .vectors import refine

__all__ = [
    "ConvergenceError",
    "FixedPoint",
    "bisect",
    "find",
    "implicit",
    "integrate",
    "kronrod_rule",
    "refine",
    "root",
]

publish(globals())
