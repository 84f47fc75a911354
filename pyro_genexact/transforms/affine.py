"""The elementwise affine bijection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from ..core.independent import independent
from ..core.shapes import sum_rightmost
from .base import PlainTransform


class Affine(PlainTransform):
    """Elementwise affine bijection y = x exp(log_scale) + shift; log|dy/dx| is log_scale, summed over the event.

    Args:
        shift: real, of shape (*batch, *event); values broadcast with it.
        log_scale: real, of the shape of ``shift``.
        event_dim: number of rightmost dims that form an event.

    Example:
        >>> import torch
        >>> t = Affine(torch.tensor(1.0), torch.tensor(0.0))
        >>> t(torch.tensor(2.0)), t.inv(torch.tensor(3.0))
        (tensor(3.), tensor(2.))
    """

    sign = 1

    def __init__(self, shift: Tensor, log_scale: Tensor, event_dim: int = 0) -> None:
        super().__init__()
        self.shift, self.log_scale, self._event_dim = shift, log_scale, event_dim

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return independent(constraints.real, self._event_dim)

    codomain = domain  # type: ignore[assignment]

    def _call(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.log_scale.exp())

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) / self.log_scale.exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log_scale, broadcast to y and summed over the event."""
        return sum_rightmost(self.log_scale.expand_as(y), self._event_dim)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.broadcast_shapes(shape, self.shift.shape)
