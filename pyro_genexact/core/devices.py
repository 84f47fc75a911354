"""The device of a module or of a collection of tensors, and its default."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """Returns the device of the first tensor, or torch's default device if there are no tensors."""
    return next((t.device for t in tensors), None) or torch.get_default_device()


def zeros_for(module: nn.Module, *shape: int) -> Tensor:
    """Returns zeros with the dtype and device of a module's tensors; on the CPU if it has no tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    like = next((t for t in tensors if t.is_floating_point()), None)
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.zeros(shape, device=device) if like is None else like.new_zeros(shape)
