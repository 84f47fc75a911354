"""``PrefixSearch``, which extends prefixes and scores the values of the next site in all searches."""

from __future__ import annotations

from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import pad

from ..autoregressive.distribution import AutoregressiveDistribution
from ..autoregressive.sequence import SequenceDistribution
from ..conditioners.site_loop import SiteLoop, advance
from ..core.checks import check_kind
from ..core.lengths import expand_mask
from ..families.categorical import log_probs


class PrefixSearch:
    """The rows of a distribution's batch, and the steps of a search from their first site to their last.

    Args:
        d: a distribution whose sites have a finite support.

    Raises:
        TypeError: if ``d`` is another distribution or has another head.

    Attributes:
        d: the distribution.
        rows: the number of rows B.
        first: the first site of the search.
        stop: the end of the longest row.
        dtype: the dtype of values at all sites.
    """

    def __init__(self, d: Any) -> None:
        if not isinstance(d, SequenceDistribution):
            check_kind("d", d, AutoregressiveDistribution)
        if tuple(d.head.site_shape) != () or not d.chain.probe.has_enumerate_support:
            raise TypeError(
                f"Expected a head of scalars with finite support; got {type(d.head).__name__} ({d.chain.family})."
            )
        self.d, self.chain, self.layout, self.rows = d, d.chain, d.layout, prod(d.batch_shape)
        self.sites, shape = d.layout.count, d.batch_shape
        self.lengths, self.prefix = self.layout.length_rows(shape), self.layout.prefix_rows(shape)
        self.first, self.stop = self.layout.span(shape)
        starts = self.layout.starts(shape)
        given = torch.full((self.rows,), self.layout.given, device=self.chain.like.device)
        self.starts = given if starts is None else starts
        kinds = range(self.first, self.stop) if d.head.num_sites else [self.first]
        self.dtype = reduce(torch.promote_types, (values_of(self.chain.site_at_zero(t)).dtype for t in kinds))

    def loop(self) -> SiteLoop:
        """Returns the loop over the sites of all rows, from the first site at which a row has a choice."""
        prefix, shape = self.prefix, self.d.batch_shape
        prefix = None if prefix is None else prefix[:, : self.first]
        return self.chain.loop(shape, self.stop, prefix, self.layout.present(shape))

    def read(self, loop: SiteLoop, values: Tensor, rows: Tensor) -> None:
        """Passes values (n) of the current site to the loop, each of which extends the history of a row (n)."""
        loop.read(self.chain.read(values.unsqueeze(1)), rows)

    def extend(self, values: Tensor, state: Any, rows: Tensor) -> tuple[Tensor, Any]:
        """Extends the rows (n) of a state by values (n); returns the parameters of the next site and the new state."""
        return advance(self.chain.conditioner, self.chain.read(values.unsqueeze(1)), state, rows)

    def open(self) -> Tensor:
        """Returns a mask (B,) of the rows whose given prefix has not ended."""
        over = self.layout.over(self.d.batch_shape)
        return torch.ones(self.rows, dtype=torch.bool, device=self.chain.like.device) if over is None else ~over

    def factors(self, phi: Tensor, t: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the values (K) of site t and their log-probabilities (n, K), for histories of the rows (n)."""
        site = self.chain.site(phi, t)
        values, log_p = values_of(site).to(self.dtype), log_probs(site).squeeze(1)
        if self.prefix is not None and t < self.layout.given:  # in rows with a longer prefix, the value is given
            log_p = _known(log_p, values, t < self.starts[rows], self.prefix[rows, t])
        if self.lengths is not None:
            log_p = _known(log_p, values, t >= self.lengths[rows], torch.zeros_like(values[:1]).expand(len(rows)))
        return values, log_p

    def ends(self, values: Tensor, t: int, rows: Tensor) -> Tensor:
        """Returns whether values (n, ...) of site t end their rows (n)."""
        ends = self.layout.ends(values)
        return ends if t >= self.layout.given else ends & expand_mask(t >= self.starts[rows], ends)

    def sizes(self, t: int, rows: Tensor) -> Tensor:
        """Returns the number of sites of the event up to and including site t, for each of the rows (n)."""
        return t - self.starts[rows] + 1

    def event(self, values: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Converts values (*shape, B, sites from the first one on) to events (*shape, *batch, *event)."""
        index = (self.starts - self.first).unsqueeze(-1) + torch.arange(self.sites, device=values.device)
        values = values.take_along_dim(index.expand(*values.shape[:-1], -1), -1)
        batch = torch.Size(shape) + self.d.batch_shape
        return self.layout.events(values.reshape(prod(batch), self.sites), batch)

    def filled(self, strings: Tensor) -> Tensor:
        """Pads strings (*, L) with fillers up to the end of the longest row."""
        return pad(strings, (0, self.stop - self.first - strings.shape[-1]), value=self.layout.fill)

    def filler(self, *shape: int) -> Tensor:
        """Returns a tensor of fillers."""
        return self.chain.like.new_full(shape, self.layout.fill, dtype=self.dtype)

    def log_probs(self, *shape: int, fill: float = 0.0) -> Tensor:
        """Returns a tensor filled with a number, of the distribution's dtype but at least float32."""
        like = self.chain.like
        return like.new_full(shape, fill, dtype=torch.promote_types(like.dtype, torch.float32))


def values_of(site: Any) -> Tensor:
    """Returns the K values of a site's support."""
    if isinstance(site, Categorical):
        return torch.arange(site.logits.shape[-1], device=site.logits.device)
    return site.enumerate_support(expand=False).flatten()  # type: ignore[no-any-return]


def _known(log_p: Tensor, values: Tensor, known: Tensor, value: Tensor) -> Tensor:
    """Replaces log_p (n, K) where the value (n) is known by 0 for this value and -inf for the others."""
    index = (values == value.unsqueeze(-1)).long().argmax(-1, keepdim=True)
    one = torch.full_like(log_p, -torch.inf).scatter(-1, index, 0.0)
    return torch.where(known.unsqueeze(-1), one, log_p)
