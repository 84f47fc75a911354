"""The elementwise affine bijection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import _sum_rightmost

from .base import RememberingTransform


class Affine(RememberingTransform):
    """y = x exp(log_scale) + shift, elementwise; log|dy/dx| is log_scale summed over the event.

    Args:
        shift, log_scale: real, of one shape (*batch, *event); both directions broadcast.
        event_dim: how many rightmost dims are one event.

    Example:
        >>> t = Affine(torch.tensor(1.0), torch.tensor(0.0))
        >>> t(torch.tensor(2.0)), t.inv(torch.tensor(3.0))
        (tensor(3.), tensor(2.))
    """

    sign = 1

    def __init__(self, shift: Tensor, log_scale: Tensor, event_dim: int = 0, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.shift, self.log_scale, self._event_dim = shift, log_scale, event_dim

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.real, self._event_dim) if self._event_dim else constraints.real

    codomain = domain  # type: ignore[assignment]

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcmul(self.shift, x, self.log_scale.exp()), self._ladj(x)

    def solve(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.shift) * (-self.log_scale).exp(), self._ladj(y)

    def watched(self) -> tuple[Tensor, Tensor]:
        return self.shift, self.log_scale

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.broadcast_shapes(shape, self.shift.shape, self.log_scale.shape)

    inverse_shape = forward_shape

    def _ladj(self, x: Tensor) -> Tensor:
        return _sum_rightmost(self.log_scale.expand(self.forward_shape(x.shape)), self._event_dim)
