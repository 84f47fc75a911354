"""SiteLoop, the loop of all site-by-site evaluation; rows may be dropped, copied or reordered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..base import Conditioner

COMPACT_BELOW = 0.8
"""Rows that are done leave the work once no more than this share of the rows goes on: to copy the others costs a step or two."""


class SiteLoop:
    """Visits the sites of B rows one by one: iterating gives t and the parameters phi (B, 1, P) of site t.

    The body hands the values of the site to :meth:`read`. They are read only if another site follows, and no site is read
    twice.

    Args:
        conditioner: whose ``start`` and ``extend`` are called.
        context: as ``start`` takes it, of B rows.
        rows: B.
        stop: the number of sites, those of the prefix included.
        prefix: (B, k, *site_shape), read before the first visit, to site k.

    Attributes:
        first: k.
        phi: the parameters (B, 1, P) of the site.
        state: of the conditioner, before the site.

    Example:
        >>> import torch
        >>> from pyro_genexact.conditioners import Markov
        >>> for t, phi in (loop := SiteLoop(Markov((), 1, order=1), None, 5, stop=3)):
        ...     loop.read(phi.squeeze(2))
        >>> t, loop.state.position
        (2, 2)
    """

    def __init__(
        self, conditioner: Conditioner, context: Any, rows: int, stop: int, prefix: Tensor | None = None
    ) -> None:
        self.conditioner, self.stop = conditioner, stop
        self.first = 0 if prefix is None else prefix.shape[1]
        phi, self.state = conditioner.start(context, rows)
        self.phi = phi.unsqueeze(1)
        if prefix is not None and self.first:
            phi, self.state = conditioner.extend(prefix, self.state)
            self.phi = phi[:, -1:]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for t in range(self.first, self.stop):
            if t > self.first:
                self.phi, self.state = advance(self.conditioner, self._y, self.state, self._rows)
            yield t, self.phi

    def read(self, y: Tensor, rows: Tensor | None = None) -> None:
        """The values (B', 1, *site_shape) of the site, of these rows (B') of the state; by default of all."""
        self._y, self._rows = y, rows

    def take(self, rows: Tensor) -> None:
        """Before the first visit: goes on with copies of these rows (B')."""
        self.phi, self.state = self.phi.index_select(0, rows), self.conditioner.reorder(self.state, rows)


def advance(conditioner: Conditioner, y: Tensor, state: Any, rows: Tensor | None = None) -> tuple[Tensor, Any]:
    """The parameters (B, S, P) after S more sites y (B, S, *site_shape), and the new state.

    With ``rows`` (B) it extends a copy of these rows of the state, which stays usable.
    """
    return conditioner.extend(y, state if rows is None else conditioner.reorder(state, rows))
