"""SiteLoop: evaluates a conditioner site by site; rows may be dropped, copied or reordered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..base import Conditioner

COMPACT_BELOW = 0.8
"""Finished rows are dropped when at most this fraction of rows remains; copying the others costs one or two steps."""


class SiteLoop:
    """Visits the sites of B rows one by one: iteration yields t and the parameters phi (B, 1, P) of site t.

    The body of the loop passes the values of the site to :meth:`read`. The conditioner reads them only if another site
    follows, and reads no site twice.

    Args:
        conditioner: provides ``start`` and ``extend``.
        context: the context of B rows, as ``start`` accepts it.
        rows: B, the number of rows.
        stop: the number of sites, including those of the prefix.
        prefix: (B, k, *site_shape), read before the first visit, to site k.

    Attributes:
        context: the context of the rows at construction.
        prefix: the prefix, or None if it has no sites.
        first: k.
        phi: the parameters (B, 1, P) of the current site.
        state: the conditioner's state before the current site.

    Example:
        >>> import torch
        >>> from pyro_genexact.conditioners import Markov
        >>> loop = SiteLoop(Markov((), 1, order=1), None, 5, stop=3)
        >>> for t, phi in loop:
        ...     loop.read(phi.squeeze(2))
        >>> t, loop.state.position
        (2, 2)
    """

    def __init__(
        self, conditioner: Conditioner, context: Any, rows: int, stop: int, prefix: Tensor | None = None
    ) -> None:
        self.conditioner, self.context, self.stop = conditioner, context, stop
        self.prefix = prefix if prefix is not None and prefix.shape[1] else None
        self.first = 0 if self.prefix is None else self.prefix.shape[1]
        phi, self.state = conditioner.start(context, rows)
        self.phi = phi.unsqueeze(1)
        if self.prefix is not None:
            phi, self.state = conditioner.extend(self.prefix, self.state)
            self.phi = phi[:, -1:]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for t in range(self.first, self.stop):
            if t > self.first:
                self.phi, self.state = advance(self.conditioner, self._y, self.state, self._rows)
            yield t, self.phi

    def read(self, y: Tensor, rows: Tensor | None = None) -> None:
        """Sets the values (B', 1, *site_shape) of the site for the rows (B',) that continue; by default all rows."""
        self._y, self._rows = y, rows

    def take(self, rows: Tensor) -> None:
        """Continues with copies of these rows (B',); call it before the first visit."""
        self.phi, self.state = self.phi.index_select(0, rows), self.conditioner.reorder(self.state, rows)


def advance(conditioner: Conditioner, y: Tensor, state: Any, rows: Tensor | None = None) -> tuple[Tensor, Any]:
    """Reads S sites y (B, S, *site_shape); returns the parameters (B, S, P) of the sites that follow, and the new state.

    With ``rows`` (B,) it extends a copy of these rows of the state, so that the state remains usable.
    """
    return conditioner.extend(y, state if rows is None else conditioner.reorder(state, rows))
