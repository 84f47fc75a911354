"""Buffers that follow from a module's arguments: no part of its ``state_dict``, rebuilt when a state is loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class _Packed(NamedTuple):
    """A Boolean tensor in an eighth of a byte per entry: masks of wide layers would double a module on the host."""

    bits: np.ndarray[Any, Any]
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        flat = np.unpackbits(self.bits, count=int(np.prod(self.shape, dtype=np.int64)))
        return torch.from_numpy(flat.astype(np.bool_)).view(self.shape)


def register_derived(module: nn.Module, name: str, value: Tensor | None, dtype: torch.dtype | None = None) -> None:
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
    if "_derived" not in module.__dict__:
        module._derived = {}  # type: ignore[assignment]
        module.register_load_state_dict_pre_hook(_restore)
    host = value.detach().cpu().clone()
    packed: Any = _Packed(np.packbits(host.numpy()), tuple(host.shape)) if host.dtype == torch.bool else host
    module._derived[name] = packed  # type: ignore[index, operator]


def _restore(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
    """Fills the derived buffers, on the device where the module is; with ``assign``, where the state is."""
    assigned = next((t.device for name, t in state.items() if name.startswith(prefix)), torch.device("cpu"))
    derived: Any = module._derived
    for name, kept in derived.items():
        buffer: Any = module._buffers[name]
        device = assigned if metadata.get("assign_to_params_buffers") else buffer.device
        value = kept.tensor() if isinstance(kept, _Packed) else kept
        module._buffers[name] = value.to(device=device, dtype=buffer.dtype, copy=True)
