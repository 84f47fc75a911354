"""Roots of increasing functions and integrals, elementwise over any batch: right to rounding, or an error.

Everything in this package that has no formula goes through these: :func:`root` and :func:`implicit` for what is inverted,
:func:`integrate` for what is integrated.
"""

from .derivatives import implicit
from .errors import ConvergenceError
from .quadrature import integrate, kronrod_rule
from .roots import bisect, find, root

__all__ = ["ConvergenceError", "bisect", "find", "implicit", "integrate", "kronrod_rule", "root"]
