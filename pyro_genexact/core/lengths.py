"""Lengths and padding masks of sequences padded to T sites: what stands in the padding is never read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .functional import visible
from .independent import with_check
from .shapes import broadcast_batches


def site_mask(lengths: Tensor, sites: int) -> Tensor:
    """Which of T sites are no padding, (*lengths, T)."""
    return torch.arange(sites, device=lengths.device) < lengths.unsqueeze(-1)


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """(B, T) as (B, T, 1, ...), with as many dims as ``like``."""
    return mask.reshape(*mask.shape, *[1] * (like.dim() - mask.dim()))


def present(lengths: Tensor, value: Tensor, dim: int = -1) -> Tensor:
    """Which sites of a value, its dim ``dim``, are no padding: (*lengths, T), then 1 for each later dim of the value."""
    mask = site_mask(lengths, value.shape[dim])
    return mask.reshape(*mask.shape, *[1] * (-1 - dim))


def zero_padding(value: Tensor, lengths: Tensor, dim: int = -1) -> Tensor:
    """The value, broadcast with the lengths, with zeros for padding; a ValueError where they do not broadcast."""
    broadcast_batches(value=value.shape[:dim], lengths=lengths.shape)
    return torch.where(present(lengths, value, dim), value, 0.0)


def filled_constraint(fill: Callable[[Tensor], Tensor], constraint: Any) -> Any:
    """The constraint of filled values."""
    return with_check(constraint, partial(_check, fill, constraint))


def _check(fill: Callable[[Tensor], Tensor], constraint: Any, value: Tensor) -> Tensor:
    inside: Tensor = constraint.check(fill(value))
    return inside


def checked_integers(name: str, lengths: Any) -> Tensor:
    """The lengths as int64, since bounds overflow in the narrow kinds; a TypeError unless they are a tensor of integers."""
    kind = getattr(lengths, "dtype", None)
    if isinstance(lengths, Tensor) and not (kind.is_floating_point or kind.is_complex or kind == torch.bool):  # type: ignore[union-attr]
        return lengths.long()
    hint = " A mask of prefixes has the lengths mask.sum(-1)." if kind == torch.bool else ""
    raise TypeError(f"Expected {name} to be a tensor of integers; got {kind or type(lengths).__name__}.{hint}")


def checked_lengths(lengths: Tensor, sites: int, name: str = "lengths", of: str = "sites of the event") -> Tensor:
    """The lengths; a TypeError unless they are integers, a ValueError unless each is between 0 and the sites."""
    lengths = checked_integers(name, lengths)
    if visible(lengths) and ((lengths < 0) | (lengths > sites)).any():
        wrong = lengths[(lengths < 0) | (lengths > sites)][0]
        raise ValueError(f"Expected {name} between 0 and {sites} ({of}); got {int(wrong)}.")
    return lengths
