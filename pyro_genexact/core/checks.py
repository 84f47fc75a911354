"""Checks of arguments. Each error names the argument, the expected value and the actual one."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .functional import checkable, visible


def check_sizes(least: int, **sizes: Any) -> None:
    """Raises a ValueError unless every argument is an integer of at least ``least``."""
    for name, size in sizes.items():
        if not _is_size(size, least):
            raise ValueError(f"Expected {name} to be an integer >= {least}; got {size!r}.")


def check_widths(least: int, **widths: Any) -> None:
    """Raises a ValueError unless every argument is a sequence of integers of at least ``least``."""
    for name, sizes in widths.items():
        if not isinstance(sizes, (tuple, list)) or not all(_is_size(size, least) for size in sizes):
            raise ValueError(f"Expected {name} to be a sequence of integers >= {least}; got {sizes!r}.")


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_numbers(**numbers: Any) -> None:
    """Raises a TypeError unless every argument is a real number."""
    for name, number in numbers.items():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"Expected {name} to be a number; got {number!r}.")


def check_positive(**numbers: Any) -> None:
    """Raises a TypeError unless every argument is a real number, and a ValueError unless it is positive and finite."""
    check_numbers(**numbers)
    for name, number in numbers.items():
        if not 0 < number < inf:
            raise ValueError(f"Expected {name} to be positive and finite; got {number}.")


def check_like(name: str, value: Tensor, like: Tensor) -> None:
    """Raises a ValueError unless the value has the dtype and device of ``like``, a parameter."""
    if value.dtype != like.dtype:
        raise ValueError(f"Expected {name}.dtype == {like.dtype} (that of the parameters); got {value.dtype}.")
    if value.device != like.device:
        raise ValueError(f"Expected {name}.device == {like.device} (that of the parameters); got {value.device}.")


def check_last(value: Tensor, size: int, of: str, dim: int = -1) -> None:
    """Raises a ValueError unless the value has the given size along ``dim``, a negative index."""
    if value.dim() < -dim or value.shape[dim] != size:
        raise ValueError(f"Expected value.shape[{dim}] == {size} ({of}); got {tuple(value.shape)}.")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raises a TypeError unless the argument is an instance of the class ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"Expected {name} to be of class {kind.__name__}; got {type(value).__name__}.")


def permutation(order: Any, sites: int, name: str = "order") -> Tensor:
    """Returns the order (T,) as a tensor of integers.

    Raises:
        TypeError: if it is neither a tensor nor a list.
        ValueError: if it is not a permutation of the sites.
    """
    if not isinstance(order, (Tensor, list, tuple)):
        raise TypeError(f"Expected {name} to be a tensor or a list of integers; got {order!r}.")
    try:
        given = order if isinstance(order, Tensor) else torch.tensor(order, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # not a list of numbers
        given = torch.empty((), device="cpu")
    if not visible(given) or (isinstance(order, Tensor) and not checkable(order)):
        return order if given.is_meta and isinstance(order, Tensor) else given.long()
    whole = not (given.is_floating_point() or given.dtype == torch.bool) and given.dim() == 1
    if not whole or sorted(given.tolist()) != list(range(sites)):
        got = order.tolist() if isinstance(order, Tensor) else order
        raise ValueError(f"Expected {name} to be a permutation of 0 ... {sites - 1} (the sites); got {got}.")
    return given.long()
