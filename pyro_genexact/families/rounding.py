"""Moves samples back inside an open support where rounding put them on its end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution


def rounded(value: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Positive numbers by default, the nearest inside: none is 0 or infinite, or outside of other bounds."""
    info = torch.finfo(value.dtype)
    return value.clamp(info.tiny if low is None else low, info.max if high is None else high)


def rounded_in_unit(value: Tensor) -> Tensor:
    """Numbers of (0, 1), the nearest inside."""
    return rounded(value, high=1 - torch.finfo(value.dtype).eps / 2)


class Rounded:
    """With samples rounded to the nearest number inside the support."""

    sample = Distribution.sample  # by rsample

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return rounded(super().rsample(Size(sample_shape)))  # type: ignore[misc]
