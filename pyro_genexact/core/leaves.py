"""Finds and replaces the tensors in distributions, transforms, modules and collections of these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.transforms import _InverseTransform

from .binding import Bound

FORGOTTEN: dict[str, Any] = dict.fromkeys(("_inv", "_last", "_watched", "_plan")) | {"_cached_x_y": (None, None)}
"""The cache attributes of transforms, with the values of an empty cache."""


def tensors_in(value: Any) -> list[Tensor]:
    """Returns all tensors in a distribution, transform, constraint or module, or in a collection of these."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Bound):
        return value.tensors
    if isinstance(value, _InverseTransform):
        return tensors_in(value.inv)
    if isinstance(value, nn.Module):
        plain = [part for part in value.__dict__.values() if isinstance(part, Tensor)]
        value = [*value._parameters.values(), *value._buffers.values(), *value._modules.values(), *plain]
    elif isinstance(value, (Distribution, Transform, constraints.Constraint)):
        value = {name: part for name, part in value.__dict__.items() if name not in FORGOTTEN}
    elif is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (list, tuple)) else []


def parameters_of(module: nn.Module) -> Iterator[Tensor]:
    """Yields the parameters of a module and its parts; a shared parameter comes once for each part that has it."""
    yield from (p for p in module._parameters.values() if p is not None)
    for part in module._modules.values():
        if part is not None:
            yield from parameters_of(part)


def map_leaves(fn: Callable[[Any], Any], value: Any, kind: type = Tensor) -> Any:
    """Copies a distribution, transform, constraint or collection of these, with ``fn`` applied to each tensor.

    Tensors in the check of a constraint are included. The caches of transforms are emptied.

    Args:
        fn: maps a tensor, or an instance of ``kind``, to its replacement.
        value: the object to copy.
        kind: the class of the objects to replace.
    """
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        parts = [map_leaves(fn, part, kind) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: map_leaves(fn, part, kind) for name, part in value.items()}
    if isinstance(value, _InverseTransform):
        return map_leaves(fn, value.inv, kind).inv
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_leaves(fn, getattr(value, f.name), kind) for f in fields(value)})
    if isinstance(value, (Distribution, Transform, constraints.Constraint)):
        value = copy.copy(value)
        parts = value.__dict__
        if isinstance(value, Transform):
            parts.update({name: forgotten for name, forgotten in FORGOTTEN.items() if name in parts})
        parts.update({name: map_leaves(fn, part, kind) for name, part in parts.items()})
    return value
