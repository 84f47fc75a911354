"""Affine and Shift: heads of elementwise affine bijections."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..base import Head
from ..core.checks import check_positive, check_widths
from ..core.values import in_every_dtype
from ..transforms.affine import Affine as AffineTransform
from .parameters import bounded


class Affine(Head):
    r"""y = x exp(s) + m with m = phi[..., :n] and s = bound tanh(phi[..., n:] / bound), n the numbers of a site.

    Log-scales so stay within ±bound smoothly, and phi = 0 is the identity.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)``.
        bound: of the log-scale, positive.

    Raises:
        ValueError: for a bound that is not positive.

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
        self._bounds = in_every_dtype(bound)

    def forward(self, phi: Tensor, first: int = 0) -> AffineTransform:
        """phi (*batch, S, P) to the transform of values (*batch, S, *shape)."""
        if self.site_shape:
            phi = phi.unflatten(-1, (2, *self.site_shape))
        shift, raw = phi.unbind(-1 - len(self.site_shape))
        return AffineTransform(shift, bounded(raw, self._bounds[phi.dtype]), len(self.site_shape))


class Shift(Head):
    """y = x + phi, which keeps volumes: the head of NICE.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)``.

    Raises:
        ValueError: for sizes that are no positive integers.

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
        """phi (*batch, S, P) to the transform of values (*batch, S, *shape)."""
        shift = phi if self.site_shape else phi.squeeze(-1)
        return AffineTransform(shift, phi.new_zeros(()), len(self.site_shape))
