"""Dtypes of the values that users give: complex refused, integers widened, or made floating."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def numbers(name: str, value: Any) -> Tensor:
    """Real numbers and Booleans as they are, integers of any width as int64; a TypeError for all else.

    Bounds overflow in the narrow kinds of integers, and torch has few operations for the unsigned ones.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be of class Tensor; got {type(value).__name__}.")
    kind = value.dtype
    if kind.is_complex:
        raise TypeError(f"Expected {name} of real numbers; got {kind}.")
    return value if kind.is_floating_point or kind == torch.bool else value.long()


def at_least_single(x: Tensor) -> Tensor:
    """Half precision as single, which is enough for sums over sites."""
    return x if x.dtype.itemsize >= 4 or not x.is_floating_point() else x.float()


def in_every_dtype(number: float) -> dict[torch.dtype, Tensor]:
    """A number as tensors of the CPU, which cost a quarter of what numbers do and go with every device."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {dtype: torch.tensor(number, dtype=dtype, device="cpu") for dtype in kinds}


def floating(value: Tensor, like: Iterable[Tensor]) -> Tensor:
    """The value; whole numbers in the dtype of the first floating-point tensor, since families subtract and multiply."""
    if value.is_floating_point():
        return value
    dtype = next((t.dtype for t in like if t.is_floating_point()), torch.get_default_dtype())
    return value.to(torch.promote_types(dtype, torch.float32))


def checked_value(distribution: Any, value: Any) -> Tensor:
    """The value by :func:`numbers`; a ValueError outside the support of a distribution that validates."""
    value = numbers("value", value)
    if distribution._validate_args:
        distribution._validate_sample(value)
    return value
