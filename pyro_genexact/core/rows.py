"""Flattens batches to rows, and selects rows."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor


def flat_rows(tensor: Tensor, batch_shape: torch.Size, event_dims: int) -> Tensor:
    """Expands a tensor to ``(*batch_shape, *event)`` and flattens the batch, to shape (B, *event)."""
    event = tensor.shape[tensor.dim() - event_dims :]
    return tensor.expand(batch_shape + event).reshape(prod(batch_shape), *event)


def take_rows(field: Any, index: Tensor) -> Any:
    """Selects the rows ``index`` (B',) of a tensor, or of the tensors in a tuple, list or NamedTuple.

    Other objects are returned unchanged.
    """
    if isinstance(field, Tensor):
        return field.index_select(0, index)
    if hasattr(field, "_fields"):
        return type(field)(*(take_rows(part, index) for part in field))
    return type(field)(take_rows(part, index) for part in field) if isinstance(field, (tuple, list)) else field
