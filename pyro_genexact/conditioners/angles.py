"""Angles: wraps a conditioner so that it reads each angle as its cosine and sine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import Conditioner


class Angles(Conditioner):
    """Reads each site, an angle, as its cosine and sine: parameters are continuous where an angle crosses its seam.

    Args:
        conditioner: any whose sites are vectors of two numbers, ``site=(2,)``. Its parameters become this one's.

    Raises:
        TypeError: for what is no conditioner.
        ValueError: for a conditioner of other sites.

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
        """(B, T) angles, and the context, to (B, T, P)."""
        return self.conditioner(_on_circle(y), context)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, Any]:
        """That of the conditioner."""
        return self.conditioner.start(context, batch_size)

    def extend(self, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads S more angles (B, S)."""
        return self.conditioner.extend(_on_circle(y), state)

    def reorder(self, state: Any, index: Tensor) -> Any:
        """That of the conditioner."""
        return self.conditioner.reorder(state, index)

    def permuted(self, order: Tensor) -> Angles:
        """The same around the permuted conditioner."""
        return Angles(self.conditioner.permuted(order))


def _on_circle(y: Tensor) -> Tensor:
    return torch.stack([y.cos(), y.sin()], -1)
