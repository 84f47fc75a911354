"""Lengths and padding masks of sequences that are padded to T sites. Values in the padding are never read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .functional import checkable
from .independent import with_check
from .shapes import broadcast_batches


def site_mask(lengths: Tensor, sites: int) -> Tensor:
    """Returns a mask (*lengths, T) that is False at padding."""
    return torch.arange(sites, device=lengths.device) < lengths.unsqueeze(-1)


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Reshapes a mask (B, T) to (B, T, 1, ...), with as many dims as ``like``."""
    return mask.reshape(*mask.shape, *[1] * (like.dim() - mask.dim()))


def present(lengths: Tensor, value: Tensor, dim: int = -1) -> Tensor:
    """Returns a mask of the sites along ``dim`` of a value, False at padding.

    Its shape is (*lengths, T), followed by a 1 for each later dim of the value.
    """
    mask = site_mask(lengths, value.shape[dim])
    return mask.reshape(*mask.shape, *[1] * (-1 - dim))


def zero_padding(value: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """Returns the value, broadcast with the lengths, with zeros in the padding.

    Raises:
        ValueError: if value and lengths do not broadcast.
    """
    broadcast_batches(value=value.shape[:dim], lengths=lengths.shape)
    return torch.where(present(lengths, value, dim), value, 0.0)


def filled_constraint(fill: Callable[[Tensor], Tensor], constraint: Any) -> Any:
    """Returns the constraint of values after ``fill`` was applied to them."""
    return with_check(constraint, partial(_check, fill, constraint))


def _check(fill: Callable[[Tensor], Tensor], constraint: Any, value: Tensor) -> Tensor:
    inside: Tensor = constraint.check(fill(value))
    return inside


def checked_integers(name: str, lengths: Any) -> Tensor:
    """Returns the lengths as int64, since bounds could overflow in narrower dtypes.

    Raises:
        TypeError: if they are not a tensor of integers.
    """
    kind = getattr(lengths, "dtype", None)
    if isinstance(lengths, Tensor) and not (kind.is_floating_point or kind.is_complex or kind == torch.bool):  # type: ignore[union-attr]
        return lengths.long()
    hint = " Use mask.sum(-1) to convert a mask of prefixes to lengths." if kind == torch.bool else ""
    raise TypeError(f"Expected {name} to be a tensor of integers; got {kind or type(lengths).__name__}.{hint}")


def checked_lengths(lengths: Tensor, sites: int, name: str = "lengths", of: str = "sites of the event") -> Tensor:
    """Returns the lengths as int64.

    Raises:
        TypeError: if they are not a tensor of integers.
        ValueError: if one is not between 0 and ``sites``.
    """
    lengths = checked_integers(name, lengths)
    if checkable(lengths) and ((lengths < 0) | (lengths > sites)).any():
        wrong = lengths[(lengths < 0) | (lengths > sites)][0]
        raise ValueError(f"Expected {name} between 0 and {sites} ({of}); got {int(wrong)}.")
    return lengths
