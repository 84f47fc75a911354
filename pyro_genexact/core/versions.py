"""Whether tensors were replaced or changed in place since: for caches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class _Values:
    """A copy of an inference tensor, which counts no versions, to see whether it was changed in place."""

    def __init__(self, t: Tensor) -> None:
        self.copy = t.clone()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and torch.equal(self.copy, other.copy)


def version_of(t: Tensor) -> Any:
    """What tells whether a tensor is what it was: its version and, unless it is of torch.func, its storage."""
    if t.is_inference():
        return _Values(t)
    try:
        return t._version, t.requires_grad, t.data_ptr()
    except RuntimeError:
        return t._version, t.requires_grad


def versions_of(tensors: Iterable[Tensor]) -> list[Any]:
    """:func:`version_of` of each."""
    tensors = list(tensors)
    try:  # nearly always all are plain, and asking each of them first would double the cost
        return [(t._version, t.requires_grad, t.data_ptr()) for t in tensors]
    except RuntimeError:
        return [version_of(t) for t in tensors]
