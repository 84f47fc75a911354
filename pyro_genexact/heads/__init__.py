"""What the parameters of a site mean: a distribution or a strictly monotone bijection of its value."""

from .bijections import Affine

__all__ = ["Affine"]
