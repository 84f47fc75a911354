"""Checks and converts the dtypes of values that users pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def numbers(name: str, value: Any) -> Tensor:
    """Returns floating-point and Boolean tensors unchanged, and tensors of integers as int64.

    Bounds could overflow in narrow integer dtypes, and torch has few operations for unsigned ones.

    Raises:
        TypeError: if the value is not a tensor, or complex.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be of class Tensor; got {type(value).__name__}.")
    kind = value.dtype
    if kind.is_complex:
        raise TypeError(f"Expected {name} to have a real dtype; got {kind}.")
    return value if kind.is_floating_point or kind == torch.bool else value.long()


def at_least_single(x: Tensor) -> Tensor:
    """Converts half precision to single precision, which is enough for sums over sites."""
    return x if x.dtype.itemsize >= 4 or not x.is_floating_point() else x.float()


def in_every_dtype(number: float) -> dict[torch.dtype, Tensor]:
    """Returns a number as a zero-dim CPU tensor of each dtype.

    Operations with such a tensor take a quarter of the time of those with a Python number, and work on every device.
    """
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {dtype: torch.tensor(number, dtype=dtype, device="cpu") for dtype in kinds}


def filled_like(number: Any, like: Tensor) -> Tensor:
    """Returns a number, or a tensor, with the dtype and device of ``like``; a number is not copied from the host."""
    if isinstance(number, Tensor):
        return number.to(like.device, like.dtype)
    return torch.full((), number, dtype=like.dtype, device=like.device)


def floating(value: Tensor, like: Iterable[Tensor]) -> Tensor:
    """Converts integers and Booleans to the dtype of the first floating-point tensor in ``like``, at least float32."""
    if value.is_floating_point():
        return value
    dtype = next((t.dtype for t in like if t.is_floating_point()), torch.get_default_dtype())
    return value.to(torch.promote_types(dtype, torch.float32))


def checked_value(distribution: Any, value: Any) -> Tensor:
    """Returns the value as converted by :func:`numbers`.

    Raises:
        ValueError: if the distribution validates its arguments and the value is outside its support.
    """
    value = numbers("value", value)
    if distribution._validate_args:
        distribution._validate_sample(value)
    return value
