"""GuidedConditioner: extrapolates parameters from those without the context."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import Conditioner
from .checks import check_chunk


class GuidedState(NamedTuple):
    """State of a :class:`GuidedConditioner`.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        inner: the state of the conditioner with 2 B rows, first those with their context.
        rows: B.
    """

    position: int
    version: list[int]
    inner: Any
    rows: int


class GuidedConditioner(Conditioner):
    """Predicts phi = phi(x) + w (phi(x) - phi(0)), from the conditioner with its context x and with zeros.

    Cost: the conditioner evaluates twice the rows.

    Args:
        conditioner: a conditioner with a context vector.
        weight: w.

    Example:
        >>> import torch
        >>> from pyro_genexact.conditioners import MADE
        >>> net, y, x = MADE(3, 2, context=4), torch.zeros(5, 3), torch.randn(5, 4)
        >>> torch.allclose(GuidedConditioner(net, -1.0)(y, x), net(y, torch.zeros(5, 4)), atol=1e-6)
        True
    """

    def __init__(self, conditioner: Conditioner, weight: float) -> None:
        super().__init__()
        self.conditioner, self.weight = conditioner, weight
        self.num_params, self.site, self.context = conditioner.num_params, conditioner.site, conditioner.context
        self.num_sites, self.max_len = conditioner.num_sites, conditioner.max_len

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps y (B, T, *site_shape) and the context (B, C) to phi (B, T, P)."""
        return self._combined(self.conditioner(torch.cat([y, y]), _with_none(context)))

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, GuidedState]:
        """Returns the parameters (B, P) of the first site, and the state."""
        phi, inner = self.conditioner.start(_with_none(context), 2 * batch_size)
        return self._combined(phi), GuidedState(inner.position, inner.version, inner, batch_size)

    def extend(self, y: Tensor, state: GuidedState) -> tuple[Tensor, GuidedState]:
        """Reads y (B, S, *site_shape); returns the parameters (B, S, P) of the sites that follow."""
        check_chunk(self, y, state.position, state.rows)
        phi, inner = self.conditioner.extend(torch.cat([y, y]), state.inner)
        return self._combined(phi), GuidedState(inner.position, inner.version, inner, state.rows)

    def reorder(self, state: GuidedState, index: Tensor) -> GuidedState:
        """Returns a copy of the batch rows ``index`` (B',) of a state."""
        inner = self.conditioner.reorder(state.inner, torch.cat([index, index + state.rows]))
        return GuidedState(inner.position, inner.version, inner, len(index))

    def permuted(self, order: Tensor) -> GuidedConditioner:
        """Returns the same wrapper of the permuted conditioner."""
        return GuidedConditioner(self.conditioner.permuted(order), self.weight)

    def _combined(self, both: Tensor) -> Tensor:
        phi, without = both.chunk(2)
        return torch.lerp(without, phi, 1 + self.weight)


def _with_none(context: Any) -> Tensor:
    return torch.cat([context, torch.zeros_like(context)])
