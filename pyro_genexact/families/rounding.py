"""Moves samples that rounding put on the boundary of an open support back inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution


def rounded(value: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Clamps values to the given bounds, by default to the positive finite numbers."""
    info = torch.finfo(value.dtype)
    return value.clamp(info.tiny if low is None else low, info.max if high is None else high)


def rounded_in_unit(value: Tensor) -> Tensor:
    """Clamps values to the numbers of the open interval (0, 1)."""
    return rounded(value, high=1 - torch.finfo(value.dtype).eps / 2)


class Rounded:
    """Rounds samples to the nearest positive finite number."""

    sample = Distribution.sample  # uses rsample

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return rounded(super().rsample(Size(sample_shape)))  # type: ignore[misc]
