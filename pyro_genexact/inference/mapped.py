"""Functions of one draw, which ``torch.vmap`` maps over draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

CHUNK = 1000  # maximum number of draws in one pass without gradients


def mapped(function: Callable[[Any], Any], values: Any, randomness: str = "different") -> Any:
    """Returns what ``function`` returns for each draw, stacked; ``values``, a tensor or dict, have the draws in dim 0.

    The function cannot branch on values, so Pyro's validation, which does, is off meanwhile.
    """
    with pyro.validation_enabled(False):
        return torch.vmap(function, randomness=randomness, chunk_size=CHUNK)(values)


def rows(value: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Reshapes a value to (S, *shape), without dims of size 1 in between; expands values without a dim of size S."""
    if value.numel() == size * shape.numel():
        return value.reshape(size, *shape)
    return value.expand(size, *shape)
