"""Heads of elementwise affine bijections."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..base import Head
from ..core.checks import check_positive, check_widths
from ..core.shapes import parts_of
from ..core.values import in_every_dtype
from ..transforms.affine import Affine as AffineTransform
from .parameters import bounded


class Affine(Head):
    """An affine bijection y = x exp(s) + m of each of the n numbers of a site.

        m = phi[..., :n],    s = bound tanh(phi[..., n:] / bound)

    Log-scales are smoothly kept within ±bound, and phi = 0 gives the identity. P = 2 n. Both directions are
    elementwise.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)``.
        bound: the bound of the log-scales, positive.

    Raises:
        ValueError: if ``bound`` is not positive and finite, or ``shape`` contains anything but positive integers.

    Reference: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation", NeurIPS 2017.

    Example:
        >>> import torch
        >>> t = Affine()(torch.zeros(4, 3, 2))
        >>> t(torch.ones(4, 3)).shape
        torch.Size([4, 3])
    """

    def __init__(self, shape: tuple[int, ...] = (), bound: float = 7.0) -> None:
        super().__init__()
        check_widths(1, shape=shape)
        check_positive(bound=bound)
        self.site_shape, self.num_params = tuple(shape), 2 * prod(shape)
        self.bound, self._bounds = float(bound), in_every_dtype(bound)

    @property
    def native(self) -> tuple[str, list[float]] | None:
        """The name and the settings of the head in the native loop, unless a subclass changed the head."""
        return ("affine", [self.bound]) if type(self).forward is Affine.forward else None

    def forward(self, phi: Tensor, first: int = 0) -> AffineTransform:
        """Returns the transform of values (*batch, S, *shape) for phi (*batch, S, P)."""
        if self.site_shape:
            phi = phi.unflatten(-1, (2, *self.site_shape))
        shift, raw = parts_of(phi, -1 - len(self.site_shape))
        return AffineTransform(shift, bounded(raw, self._bounds[phi.dtype]), len(self.site_shape))


class Shift(Head):
    """A volume-preserving bijection y = x + phi, as in NICE, with P the number of values of a site.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)``.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Reference: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", ICLR workshop 2015.

    Example:
        >>> import torch
        >>> Shift()(torch.ones(4, 3, 1))(torch.ones(4, 3))[0]
        tensor([2., 2., 2.])
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        check_widths(1, shape=shape)
        self.site_shape, self.num_params = tuple(shape), prod(shape)

    def forward(self, phi: Tensor, first: int = 0) -> AffineTransform:
        """Returns the transform of values (*batch, S, *shape) for phi (*batch, S, P)."""
        shift = phi if self.site_shape else phi.squeeze(-1)
        return AffineTransform(shift, phi.new_zeros(()), len(self.site_shape))
