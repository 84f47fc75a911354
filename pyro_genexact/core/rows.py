"""Batches as rows: tensors (*batch, *event) as (B, *event), and some rows of them."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor


def flat_rows(tensor: Tensor, batch_shape: torch.Size, event_dims: int) -> Tensor:
    """A tensor that broadcasts with a batch, as one row (B, *event) for each of its elements."""
    event = tensor.shape[tensor.dim() - event_dims :]
    return tensor.expand(batch_shape + event).reshape(prod(batch_shape), *event)


def take_rows(field: Any, index: Tensor) -> Any:
    """The rows ``index`` (B',) of a tensor, or of those in a tuple, a list or a NamedTuple; anything else as it is."""
    if isinstance(field, Tensor):
        return field.index_select(0, index)
    if hasattr(field, "_fields"):
        return type(field)(*(take_rows(part, index) for part in field))
    return type(field)(take_rows(part, index) for part in field) if isinstance(field, (tuple, list)) else field
