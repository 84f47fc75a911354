"""The cache of keys and values of a Transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.functional import transformed


class Cache:
    """Appends the keys and values of S new positions to a state's cache, layer by layer.

    Of the ``used`` positions it keeps the last ``seen``. Without grad it writes to the buffer in place, or moves to a
    buffer of ``capacity`` positions if the old one is full or, after a long chunk in front of a window, much too large.
    """

    def __init__(self, buffer: Tensor, used: int, seen: int, sites: int, capacity: int) -> None:
        self.buffer, self.kept, self.sites, self.capacity = buffer, slice(used - seen, used), sites, capacity
        self.made: list[Tensor] | None = [] if concatenates() else None

    def append(self, layer: int, both: Tensor) -> tuple[Tensor, Tensor]:
        """Appends ``both`` at a layer; returns the keys and values (B, heads, seen + S, width / heads) to attend to."""
        if self.made is not None:
            self.made.append(torch.cat([self.buffer[layer, ..., self.kept, :], both], 3))
            return self.made[-1][0], self.made[-1][1]
        if not layer:
            self._make_room(both)
        self.places[layer].copy_(both)
        return self.keys[layer], self.values[layer]

    def end(self) -> tuple[Tensor, int]:
        """Returns the buffer after all layers, and its number of used positions."""
        if self.made is not None:
            self.buffer, self.kept = torch.stack(self.made), slice(0, self.kept.stop - self.kept.start)
        return self.buffer, self.kept.stop + self.sites

    def _make_room(self, both: Tensor) -> None:
        leave = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        full, size = self.kept.stop + self.sites > self.buffer.shape[4], self.buffer.shape[4]
        if leave or full or size > 2 * self.capacity:
            old = self.buffer[..., self.kept, :]
            self.buffer = empty_cache(both, len(old), both.shape[1], self.capacity)
            self.buffer[..., : old.shape[4], :] = old
            self.kept = slice(0, old.shape[4])
        end = self.kept.stop + self.sites
        self.places = self.buffer[..., self.kept.stop : end, :].unbind(0)
        self.keys, self.values = (part.unbind(0) for part in self.buffer[..., self.kept.start : end, :].unbind(1))


def empty_cache(like: Tensor, depth: int, rows: int, capacity: int) -> Tensor:
    """Returns a buffer (depth, 2, B, heads, capacity, width / heads) with a head's keys and values adjacent in memory."""
    return like.new_empty(depth, rows, like.shape[-3], 2, capacity, like.shape[-1]).movedim(3, 1)


def concatenates() -> bool:
    """Returns whether buffers must not be written in place."""
    return torch.is_grad_enabled() or transformed()
