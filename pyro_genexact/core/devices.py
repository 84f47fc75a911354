"""Default devices: which device is used where the user names none, and zeros on it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """The device of the first tensor; torch's default device where there is none."""
    return next((t.device for t in tensors), None) or torch.get_default_device()


def zeros_for(module: nn.Module, *shape: int) -> Tensor:
    """Zeros of the dtype and on the device of a module's tensors; on the CPU where it has none."""
    tensors = [*module.parameters(), *module.buffers()]
    like = next((t for t in tensors if t.is_floating_point()), None)
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.zeros(shape, device=device) if like is None else like.new_zeros(shape)
