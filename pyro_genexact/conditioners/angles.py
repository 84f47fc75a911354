"""Angles: a conditioner that reads each angle as its cosine and sine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import Conditioner


class Angles(Conditioner):
    """Reads each site as an angle, by its cosine and sine.

    The parameters are then continuous functions of the angles, with period 2 pi.

    Args:
        conditioner: a conditioner whose sites are vectors of two numbers, ``site=(2,)``.

    Raises:
        TypeError: if ``conditioner`` is not a conditioner.
        ValueError: if its sites are of another kind.

    Example:
        >>> import torch
        >>> from pyro_genexact.conditioners import MADE
        >>> net = Angles(MADE(3, 4, site=(2,), hidden=(8,)))
        >>> y = torch.randn(5, 3)
        >>> torch.allclose(net(y), net(y + 2 * torch.pi), atol=1e-5)
        True
    """

    def __init__(self, conditioner: Conditioner) -> None:
        super().__init__()
        if not isinstance(conditioner, Conditioner):
            raise TypeError(f"Expected conditioner to be a Conditioner; got {type(conditioner).__name__}.")
        if conditioner.site != (2,):
            raise ValueError(f"Expected conditioner.site == (2,) (cosine and sine); got {conditioner.site}.")
        self.conditioner, self.num_params = conditioner, conditioner.num_params
        self.context, self.num_sites = conditioner.context, conditioner.num_sites

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps angles y (B, T) and the context to phi (B, T, P)."""
        return self.conditioner(_on_circle(y), context)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, Any]:
        """Returns the parameters (B, P) of the first site, and the state of the conditioner."""
        return self.conditioner.start(context, batch_size)

    def extend(self, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads angles y (B, S); returns the parameters (B, S, P) of the sites that follow."""
        return self.conditioner.extend(_on_circle(y), state)

    def reorder(self, state: Any, index: Tensor) -> Any:
        """Returns a copy of the batch rows ``index`` (B',) of a state."""
        return self.conditioner.reorder(state, index)

    def permuted(self, order: Tensor) -> Angles:
        """Returns the same wrapper of the permuted conditioner."""
        return Angles(self.conditioner.permuted(order))


def _on_circle(y: Tensor) -> Tensor:
    return torch.stack([y.cos(), y.sin()], -1)
