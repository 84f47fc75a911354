"""Registers buffers: copies of tensors that the user passed, and derived buffers that are rebuilt instead of saved."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Packed(NamedTuple):
    """A Boolean tensor with one bit per entry, so that the host copies of the masks of wide layers stay small.

    Attributes:
        bits: the packed entries.
        shape: the shape of the tensor.
    """

    bits: bytes
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Returns the unpacked tensor, on the CPU."""
        flat = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=int(np.prod(self.shape, dtype=np.int64)))
        return torch.from_numpy(flat.astype(np.bool_)).view(self.shape)


class WithDerived(nn.Module):
    """A module that restores its derived buffers, and those of its submodules, before a state is loaded.

    The device of a submodule without tensors follows that of its parent. This class overrides a method instead of
    registering a hook because hooks would be part of pickles.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        restore_derived(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def register_given(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Registers a copy of a tensor that the user passed, so that loading a state does not change the user's tensor.

    A tensor that requires gradients is registered itself, so that gradients reach it.
    """
    if value is not None:
        value = (
            value.contiguous() if value.requires_grad else value.detach().clone(memory_format=torch.contiguous_format)
        )
    module.register_buffer(name, value)


def register_derived(module: WithDerived, name: str, value: Tensor | None, dtype: torch.dtype | None = None) -> None:
    """Registers a buffer that is not saved, but restored before each ``load_state_dict``.

    A module is therefore complete after ``module.to_empty(device=...)`` and ``load_state_dict``, and checkpoints do not
    contain masks.

    Args:
        module: the module that gets the buffer, on the default device.
        name: the name of the buffer.
        value: a tensor on a real device, even if the default device is ``meta``; None registers an empty buffer.
        dtype: the dtype of the buffer; by default that of the value.
    """
    buffer = None if value is None else value.to(device=torch.get_default_device(), dtype=dtype, copy=True)
    module.register_buffer(name, buffer, persistent=False)
    if value is None:
        return
    derived = module.__dict__.setdefault("_derived", {})
    host = value.detach().cpu().clone()
    derived[name] = Packed(np.packbits(host.numpy()).tobytes(), tuple(host.shape)) if host.dtype == torch.bool else host


def without_derived(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the ``__dict__`` of a module with empty derived buffers, which :func:`restore_derived` fills again."""
    if "_derived" not in state:
        return state
    buffers = {name: state["_buffers"][name].new_empty(0) for name in state["_derived"]}
    return state | {"_buffers": state["_buffers"] | buffers}


def restore_derived(module: nn.Module, state: Any = None, prefix: str = "", metadata: Any = None) -> None:
    """Restores the derived buffers of a module and its submodules, on their present devices.

    If the state is loaded with ``assign=True``, the buffers get the device and floating-point dtype of the state.
    """
    state, metadata, assigned = state or {}, metadata or {}, []
    if metadata.get("assign_to_params_buffers"):
        assigned = [t for name, t in state.items() if name.startswith(prefix)]
    number = next((t.dtype for t in assigned if t.is_floating_point()), None)
    for part in module.modules():
        for name, kept in part.__dict__.get("_derived", {}).items():
            buffer: Any = part._buffers[name]
            device = assigned[0].device if assigned else buffer.device
            if device.type == "meta" and metadata.get("assign_to_params_buffers") and not (assigned or prefix):
                device = torch.device("cpu")  # the state of a top-level module without saved tensors has no device
            dtype = number if number is not None and buffer.is_floating_point() else buffer.dtype
            value = kept.tensor() if isinstance(kept, Packed) else kept
            part._buffers[name] = value.to(device=device, dtype=dtype, copy=True)
