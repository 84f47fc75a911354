"""Buffers: copies of what the user gave, and derived ones (default device, unsaved, rebuilt on load)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Packed(NamedTuple):
    """A Boolean tensor in an eighth of a byte per entry: masks of wide layers would double a module on the host."""

    bits: bytes
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        flat = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=int(np.prod(self.shape, dtype=np.int64)))
        return torch.from_numpy(flat.astype(np.bool_)).view(self.shape)


class WithDerived(nn.Module):
    """A module whose derived buffers, and those of its parts, are restored before its state is loaded.

    Parts without tensors of their own follow the modules above them. It is a method and no hook, which pickles would hold.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        restore_derived(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def register_given(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Registers a copy of a tensor that the user gave: a state loaded into the module must not change the argument.

    A tensor that needs gradients stays the same, so that they reach it.
    """
    if value is not None:
        value = (
            value.contiguous() if value.requires_grad else value.detach().clone(memory_format=torch.contiguous_format)
        )
    module.register_buffer(name, value)


def register_derived(module: WithDerived, name: str, value: Tensor | None, dtype: torch.dtype | None = None) -> None:
    """Registers a buffer that is not saved, and restores it before each ``load_state_dict``.

    So ``module.to_empty(device=...)`` followed by ``load_state_dict`` gives a whole module, and checkpoints hold no masks.

    Args:
        module: gets the buffer, on the default device.
        value: not on ``meta``, whatever the default device; None registers an empty name.
        dtype: of the buffer; by default that of the value.
    """
    buffer = None if value is None else value.to(device=torch.get_default_device(), dtype=dtype, copy=True)
    module.register_buffer(name, buffer, persistent=False)
    if value is None:
        return
    derived = module.__dict__.setdefault("_derived", {})
    host = value.detach().cpu().clone()
    derived[name] = Packed(np.packbits(host.numpy()).tobytes(), tuple(host.shape)) if host.dtype == torch.bool else host


def without_derived(state: dict[str, Any]) -> dict[str, Any]:
    """The ``__dict__`` of a module for a file: its derived buffers, which :func:`restore_derived` fills, are empty."""
    if "_derived" not in state:
        return state
    buffers = {name: state["_buffers"][name].new_empty(0) for name in state["_derived"]}
    return state | {"_buffers": state["_buffers"] | buffers}


def restore_derived(module: nn.Module, state: Any = None, prefix: str = "", metadata: Any = None) -> None:
    """Fills the derived buffers of a module and its parts, where they are; with ``assign`` as the state is."""
    state, metadata, assigned = state or {}, metadata or {}, []
    if metadata.get("assign_to_params_buffers"):
        assigned = [t for name, t in state.items() if name.startswith(prefix)]
    number = next((t.dtype for t in assigned if t.is_floating_point()), None)
    for part in module.modules():
        for name, kept in part.__dict__.get("_derived", {}).items():
            buffer: Any = part._buffers[name]
            device = assigned[0].device if assigned else buffer.device
            if device.type == "meta" and metadata.get("assign_to_params_buffers") and not (assigned or prefix):
                device = torch.device("cpu")  # a module without saved tensors that is loaded by itself
            dtype = number if number is not None and buffer.is_floating_point() else buffer.dtype
            value = kept.tensor() if isinstance(kept, Packed) else kept
            part._buffers[name] = value.to(device=device, dtype=dtype, copy=True)
