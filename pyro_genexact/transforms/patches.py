"""Patches: the volume-preserving bijection of an image and the sequence of its patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import constraints

from ..core.checks import check_sizes, check_widths
from ..core.independent import independent
from .base import PlainTransform


class Patches(PlainTransform, TransformModule):
    """Cuts an image into square patches, in raster order; log|det dy/dx| = 0.

    x has shape (*batch, C, H, W), or (*batch, H, W) for images of one channel. y has shape (*batch, T, d), with
    T = (H / p) (W / p) patches of d = C p^2 numbers each, channel by channel and row by row.

    Args:
        image_shape: (C, H, W) or (H, W).
        patch: p, the side of a patch in pixels.

    Attributes:
        grid: (H / p, W / p), the rows and columns of patches.
        site_shape: (d,), the shape of a patch.

    Raises:
        ValueError: if a size is not a positive integer, the shape has another number of dims, or p does not divide H
            and W. In calls, for values of another shape.

    Example:
        >>> import torch
        >>> Patches((4, 4), 2)(torch.arange(16.0).view(4, 4))
        tensor([[ 0.,  1.,  4.,  5.],
                [ 2.,  3.,  6.,  7.],
                [ 8.,  9., 12., 13.],
                [10., 11., 14., 15.]])
    """

    keeps_volume = True
    codomain = independent(constraints.real, 2)

    def __init__(self, image_shape: Sequence[int], patch: int) -> None:
        super().__init__()
        check_widths(1, image_shape=image_shape)
        check_sizes(1, patch=patch)
        self.image_shape, self.patch = tuple(image_shape), patch
        if len(image_shape) not in (2, 3):
            raise ValueError(f"Expected image_shape to be (C, H, W) or (H, W); got {self.image_shape}.")
        *channels, height, width = self.image_shape
        if height % patch or width % patch:
            raise ValueError(f"Expected patch to divide the height and width of {self.image_shape}; got {patch}.")
        self.channels = channels[0] if channels else 1
        self.grid = height // patch, width // patch
        self.site_shape = (self.channels * patch**2,)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return independent(constraints.real, len(self.image_shape))  # type: ignore[no-any-return]

    def _call(self, x: Tensor) -> Tensor:
        shape, (rows, columns) = self.forward_shape(x.shape), self.grid
        x = x.reshape(-1, self.channels, rows, self.patch, columns, self.patch).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(shape)

    def _inverse(self, y: Tensor) -> Tensor:
        shape, (rows, columns) = self.inverse_shape(y.shape), self.grid
        y = y.reshape(-1, rows, columns, self.channels, self.patch, self.patch).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns zeros of the batch shape."""
        return y.new_zeros(y.shape[:-2])

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return _replaced(shape, self.image_shape, self._sites)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return _replaced(shape, self._sites, self.image_shape)

    @property
    def _sites(self) -> tuple[int, ...]:
        return self.grid[0] * self.grid[1], *self.site_shape


def _replaced(shape: torch.Size, old: tuple[int, ...], new: tuple[int, ...]) -> torch.Size:
    """Returns the shape with the event shape ``new`` in place of ``old``."""
    if tuple(shape[-len(old) :]) != old:
        raise ValueError(f"Expected value.shape[-{len(old)}:] == {old} (event of the transform); got {tuple(shape)}.")
    return torch.Size((*shape[: -len(old)], *new))
