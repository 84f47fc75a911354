"""Batches as rows: tensors (*batch, *event) as (B, *event)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def flat_rows(tensor: Tensor, batch_shape: torch.Size, event_dims: int) -> Tensor:
    """A tensor that broadcasts with a batch, as one row (B, *event) for each of its elements."""
    event = tensor.shape[tensor.dim() - event_dims :]
    return tensor.expand(batch_shape + event).reshape(prod(batch_shape), *event)


def at_least_single(x: Tensor) -> Tensor:
    """Half precision as single, which is enough for sums over sites."""
    return x if x.dtype.itemsize >= 4 or not x.is_floating_point() else x.float()
