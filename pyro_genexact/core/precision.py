"""Keeps everything but networks in full precision under autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .leaves import map_leaves

P = ParamSpec("P")
R = TypeVar("R")
_DEVICES = [d for d in ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia") if torch.amp.is_autocast_available(d)]


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator that runs a function without autocast, for matrix products that are not the layers of a network.

    Cost: 0.2 µs per call when autocast is off.

    Example:
        >>> product = full_precision(torch.matmul)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     product(torch.ones(2, 2), torch.ones(2, 2)).dtype
        torch.float32
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        device = next((device for device in _DEVICES if torch.is_autocast_enabled(device)), None)
        if device is None:  # a third-party backend
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return run(*args, **kwargs)  # autocast may also be on for another device

    return run


@full_precision
def exactly(function: Callable[..., Any], *args: Any) -> Any:
    """Returns ``function(*args)``, computed without autocast."""
    return function(*args)


def at_least(x: Tensor, like: Tensor) -> Tensor:
    """Converts the output of a network to the dtype of its input ``like`` if autocast made it narrower."""
    same = x.dtype is like.dtype  # tested first because it is faster
    return x if same or x.dtype.itemsize >= like.dtype.itemsize else x.to(like.dtype)


def widened(given: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Converts the tensors of an argument to ``dtype`` if they are narrower and autocast is on.

    Such tensors may be the output of a network.
    """

    def wide(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype.itemsize < dtype.itemsize else x

    return map_leaves(wide, given) if torch._C._is_any_autocast_enabled() else given
