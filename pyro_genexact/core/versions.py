"""Detects whether tensors were replaced or changed in place, for caches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .functional import compiling


class _Values:
    """A copy of an inference tensor, which has no version counter, to detect changes in place."""

    def __init__(self, t: Tensor) -> None:
        self.copy = t.clone()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and torch.equal(self.copy, other.copy)


def version_of(t: Tensor) -> Any:
    """Returns a key that differs after a tensor was changed: its version and, outside ``torch.func``, its address."""
    if t.is_inference():
        return _Values(t)
    try:
        return t._version, t.requires_grad, t.data_ptr()
    except RuntimeError:
        return t._version, t.requires_grad


def versions_of(tensors: Iterable[Tensor]) -> list[Any]:
    """Returns :func:`version_of` of each tensor; nothing while torch compiles, which detects no changes in place."""
    if compiling():
        return []
    tensors = list(tensors)
    try:  # works for ordinary tensors; testing each one first would double the cost
        return [(t._version, t.requires_grad, t.data_ptr()) for t in tensors]
    except RuntimeError:
        return [version_of(t) for t in tensors]
