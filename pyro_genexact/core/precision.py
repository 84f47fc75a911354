"""Under autocast networks may round, exact mathematics does not: ``full_precision``, ``widened``, ``at_least``."""

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
    """The function, run without autocast: for matrix products that are exact mathematics, not the layers of a network.

    Cost: 0.2 µs a call where autocast is off.

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
        if device is None:  # a device of another's backend
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return run(*args, **kwargs)  # on to the next device, if there is one

    return run


@full_precision
def exactly(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, without autocast."""
    return function(*args)


def at_least(x: Tensor, like: Tensor) -> Tensor:
    """What a network predicts from ``like``, in its dtype where autocast made it narrower."""
    same = x.dtype is like.dtype  # the faster question
    return x if same or x.dtype.itemsize >= like.dtype.itemsize else x.to(like.dtype)


def widened(given: Any, dtype: torch.dtype = torch.float32) -> Any:
    """An argument, which under autocast a network may have predicted: its narrower tensors in this dtype."""

    def wide(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype.itemsize < dtype.itemsize else x

    return map_leaves(wide, given) if torch._C._is_any_autocast_enabled() else given
