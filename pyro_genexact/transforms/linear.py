"""Permute, Reverse and Standardize: fixed permutations of sites, and fixed shift and scale of features."""

from __future__ import annotations

from functools import partial

import torch
from pyro.distributions import TransformModule
from torch import Tensor
from torch.distributions import constraints

from ..core.buffers import register_given
from ..core.checks import check_last
from ..core.independent import REAL_VECTOR, independent
from ..core.lengths import checked_integers, filled_constraint, zero_padding
from ..core.shapes import broadcast_shapes
from .base import PlainTransform


class _Reordering(PlainTransform, TransformModule):
    """Base class of permutations of the sites; the dims from ``dim`` on are one event."""

    keeps_volume = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim >= 0:
            raise ValueError(f"Expected dim to be a negative integer (counted from the right); got {dim}.")
        self.dim = dim

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return independent(constraints.real, -self.dim)  # type: ignore[no-any-return]

    codomain = domain  # type: ignore[assignment]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns zeros of the batch shape."""
        return x.new_zeros(x.shape[: self.dim])


class Permute(_Reordering):
    """Permutes the sites: y[..., i] = x[..., permutation[i]], with log|det dy/dx| = 0.

    Args:
        permutation: integers (T,), each of 0 ... T-1 once.
        dim: the dim of the sites: -1 for vectors (*batch, T), -2 for series of vectors (*batch, T, k).

    Raises:
        ValueError: if ``permutation`` is not a permutation, or ``dim`` is not negative.

    Example:
        >>> import torch
        >>> Permute(torch.tensor([2, 0, 1]))(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    permutation: Tensor

    def __init__(self, permutation: Tensor, dim: int = -1) -> None:
        super().__init__(dim)
        if (
            permutation.is_floating_point()
            or permutation.dim() != 1
            or (not permutation.is_meta and permutation.sort()[0].tolist() != list(range(len(permutation))))
        ):
            raise ValueError(f"Expected permutation to hold each of 0 ... T-1 once; got {permutation.tolist()}.")
        register_given(self, "permutation", permutation)

    def _call(self, x: Tensor) -> Tensor:
        return _sized(x, self.dim, len(self.permutation)).index_select(self.dim, self.permutation)

    def _inverse(self, y: Tensor) -> Tensor:
        return _sized(y, self.dim, len(self.permutation)).index_select(self.dim, self.permutation.argsort())


class Reverse(_Reordering):
    """Reverses the order of the sites: y[..., i] = x[..., T-1-i], with log|det dy/dx| = 0.

    Args:
        dim: the dim of the sites: -1 for vectors (*batch, T), -2 for series of vectors (*batch, T, k).
        lengths: integers (*batch) in 0 ... T; the first n sites of each row are reversed, and y[..., i] = 0 for i >= n.

    Raises:
        TypeError: if ``lengths`` is not a tensor of integers.
        ValueError: if ``dim`` is not negative.

    Example:
        >>> import torch
        >>> Reverse()(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 2., 1.])
        >>> Reverse(lengths=torch.tensor(2))(torch.tensor([1.0, 2.0, 3.0]))
        tensor([2., 1., 0.])
    """

    lengths: Tensor | None

    def __init__(self, dim: int = -1, lengths: Tensor | None = None) -> None:
        super().__init__(dim)
        register_given(self, "lengths", None if lengths is None else checked_integers("lengths", lengths))

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        domain = independent(constraints.real, -self.dim)
        if self.lengths is None:
            return domain
        return filled_constraint(partial(zero_padding, lengths=self.lengths, dim=self.dim), domain)  # type: ignore[no-any-return]

    codomain = domain  # type: ignore[assignment]

    def on_prefixes(self, lengths: Tensor) -> Reverse:
        """Returns the transform of the first sites of each row, given lengths (*batch); later sites are zero."""
        new = Reverse(self.dim)
        new._buffers["lengths"] = lengths  # not copied
        return new

    def _call(self, x: Tensor) -> Tensor:
        if self.lengths is None:
            return x.flip(self.dim)
        x, sites = zero_padding(x, self.lengths, self.dim), x.shape[self.dim]
        places = torch.arange(1, sites + 1, device=self.lengths.device)
        index = (self.lengths.long().unsqueeze(-1) - places) % sites  # at padding, an index of padding
        return x.gather(self.dim, index.reshape(*index.shape, *[1] * (-1 - self.dim)).expand_as(x))

    _inverse = _call

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns zeros of the batch shape."""
        return x.new_zeros(self.forward_shape(x.shape)[: self.dim])

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        if self.lengths is None:
            return shape
        return broadcast_shapes(shape[: self.dim], self.lengths.shape) + shape[self.dim :]


class Standardize(PlainTransform, TransformModule):
    """Standardises features: y = (x - shift) / scale, with log|det dy/dx| = -sum log scale.

    The result has the dtype of the values.

    Args:
        shift: real (D,), or of the shape of images, such as (C, H, W).
        scale: positive, of the shape of ``shift``.

    Raises:
        ValueError: if the shapes differ, or a scale is not positive and finite.

    Example:
        >>> import torch
        >>> t = Standardize.from_data(torch.tensor([[1.0], [3.0]]))
        >>> t(torch.tensor([3.0])), t.inv(torch.tensor([0.0]))
        (tensor([1.]), tensor([2.]))
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        if not shift.dim() or shift.shape != scale.shape:
            raise ValueError(
                f"Expected shift and scale of shape (D,); got {tuple(shift.shape)} and {tuple(scale.shape)}."
            )
        bad = ~(scale > 0) | ~scale.isfinite() | ~shift.isfinite()
        if not bad.is_meta and bad.any():
            raise ValueError(f"Expected finite shift and positive finite scale; got others at features {_places(bad)}.")
        register_given(self, "shift", shift)
        register_given(self, "scale", scale)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return REAL_VECTOR if self.shift.dim() == 1 else independent(constraints.real, self.shift.dim())  # type: ignore[no-any-return]

    codomain = domain  # type: ignore[assignment]

    @classmethod
    def from_data(cls, data: Tensor) -> Standardize:
        """Returns the transform that gives data (N, *event) mean 0 and standard deviation 1 (with denominator N).

        Raises:
            ValueError: if ``data`` has no rows, is not finite or is constant in a feature.
        """
        if data.dim() < 2 or len(data) == 0 or not data.is_floating_point():
            raise ValueError(
                f"Expected data to be real, of shape (rows >= 1, D); got {data.dtype} of shape {tuple(data.shape)}."
            )
        if not data.is_meta and (constant := (data == data[0]).all(0)).any():
            raise ValueError(
                f"Expected data to vary in each feature; got constant values at features {_places(constant)}."
            )
        return cls(data.mean(0), data.std(0, correction=0))

    def _call(self, x: Tensor) -> Tensor:
        return (self._sized(x) - self.shift.to(x.dtype)) / self.scale.to(x.dtype)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(y.dtype), self._sized(y), self.scale.to(y.dtype))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns -sum log scale, of the batch shape."""
        return -self.scale.log().sum().to(x.dtype).expand(x.shape[: -self.shift.dim()])

    def _sized(self, value: Tensor) -> Tensor:
        for dim, size in enumerate(reversed(self.shift.shape), 1):
            check_last(value, size, "the size of the transform", -dim)
        return value


def _places(which: Tensor) -> list[int]:
    """Returns the indices of the features, counted in raster order, that are marked."""
    return which.flatten().nonzero()[:, 0].tolist()


def _sized(value: Tensor, dim: int, size: int) -> Tensor:
    check_last(value, size, "the size of the transform", dim)
    return value
