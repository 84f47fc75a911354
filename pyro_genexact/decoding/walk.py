"""What every search does: it extends prefixes of a distribution's values site by site."""

from __future__ import annotations

from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..autoregressive.distribution import AutoregressiveDistribution
from ..autoregressive.sequence import SequenceDistribution
from ..core.checks import check_kind


class Walk:
    """The rows of a distribution's batch, and the steps from their first site to their last.

    Args:
        d: over values whose sites are numbers of a finite support.

    Raises:
        TypeError: for another distribution, or another head.

    Attributes:
        d: the distribution.
        rows: B.
        first, stop: the first site that is visited, and the end of the last row.
        dtype: of values, one for all sites.
    """

    def __init__(self, d: Any) -> None:
        check_kind("d", d, AutoregressiveDistribution)
        if tuple(d.head.site_shape) != () or not d._probe.has_enumerate_support:
            raise TypeError(
                f"Expected a head of numbers of a finite support; got {type(d.head).__name__} ({d._family})."
            )
        self.d, self.rows, self.sites = d, prod(d.batch_shape), prod(d._sites)
        self.context, self.lengths, self.prefix = d._batch(d.batch_shape)
        self.starts: Tensor | None = d._starts(d.batch_shape) if isinstance(d, SequenceDistribution) else None
        self.first = self.stop = d._given
        if self.starts is not None:
            bounds = self.starts if self.rows else self.starts.new_zeros(1)
            self.first, self.stop = (int(bound) for bound in bounds.aminmax())
        self.stop += self.sites
        zero = d._like.new_zeros(1, 1, d.head.num_params)
        kinds = range(self.first, self.stop) if hasattr(d.head, "num_sites") else [self.first]
        self.dtype = reduce(torch.promote_types, (_values(d._site(zero, t)).dtype for t in kinds))

    def start(self) -> tuple[Tensor, Any]:
        """The first site's parameters (B, 1, P), and the state before it."""
        phi, state = self.d.conditioner.start(self.context, self.rows)
        if not self.first:
            return phi.unsqueeze(1), state
        phi, state = self.d.conditioner.extend(self.d._read(self.prefix[:, : self.first]), state)
        return phi[:, -1:], state

    def extend(self, values: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads one more site, values (n)."""
        return self.d.conditioner.extend(self.d._read(values.unsqueeze(1)), state)

    def open(self) -> Tensor:
        """Which rows (B) go on: those whose prefix has not ended."""
        if self.prefix is None or not isinstance(self.d, SequenceDistribution):
            return torch.ones(self.rows, dtype=torch.bool, device=self.d._like.device)
        return ~self.d._ended(self.prefix, self.starts)

    def factors(self, phi: Tensor, t: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The values (K) of site t, and their log-probabilities (n, K) given histories of these rows (n)."""
        site = self.d._site(phi, t)
        values = _values(site)
        log_p = (
            site.logits.squeeze(1)
            if isinstance(site, Categorical)
            else site.log_prob(values.reshape(-1, 1, 1)).squeeze(-1).T
        )
        values = values.to(self.dtype)
        if self.starts is not None and t < self.d._given:  # a longer prefix tells the value
            log_p = _known(log_p, values, t < self.starts[rows], self.prefix[rows, t])
        if self.lengths is not None:
            log_p = _known(log_p, values, t >= self.lengths[rows], torch.zeros_like(values[:1]).expand(len(rows)))
        return values, log_p

    def ends(self, values: Tensor, t: int, rows: Tensor) -> Tensor:
        """Whether values (n, ...) of site t end their rows (n)."""
        if not isinstance(self.d, SequenceDistribution):
            return torch.zeros_like(values, dtype=torch.bool)
        ends = self.d._ends(values)
        return ends if self.starts is None else ends & (t >= self.starts[rows]).reshape(-1, *[1] * (ends.dim() - 1))

    def last(self, t: int, rows: Tensor) -> Tensor:
        """Whether site t is the last of these rows (n)."""
        if self.starts is None:
            return torch.full_like(rows, t == self.stop - 1, dtype=torch.bool)
        return t == self.starts[rows] + self.sites - 1

    def sizes(self, t: int, rows: Tensor) -> Tensor:
        """How many sites of the event have been visited after site t, (n)."""
        return torch.full_like(rows, t - self.first + 1) if self.starts is None else t - self.starts[rows] + 1

    def event(self, values: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Values (*shape, B, sites from the first one on) as events (*shape, *batch, *event)."""
        if self.starts is not None:
            index = (self.starts - self.first).unsqueeze(-1) + torch.arange(self.sites, device=values.device)
            values = values.take_along_dim(index.expand(*values.shape[:-1], -1), -1)
        batch = torch.Size(shape) + self.d.batch_shape
        return self.d._event(values.reshape(prod(batch), self.sites), batch)

    def filler(self, *shape: int) -> Tensor:
        return self.d._like.new_full(shape, getattr(self.d, "eos", None) or 0, dtype=self.dtype)


def _values(site: Any) -> Tensor:
    """Those (K) of a site's support."""
    if isinstance(site, Categorical):
        return torch.arange(site.logits.shape[-1], device=site.logits.device)
    return site.enumerate_support(expand=False).flatten()  # type: ignore[no-any-return]


def _known(log_p: Tensor, values: Tensor, known: Tensor, value: Tensor) -> Tensor:
    """log_p (n, K) where not known (n), else 0 for the value (n) and -inf for the others."""
    index = (values == value.unsqueeze(-1)).long().argmax(-1, keepdim=True)
    one = torch.full_like(log_p, -torch.inf).scatter(-1, index, 0.0)
    return torch.where(known.unsqueeze(-1), one, log_p)
