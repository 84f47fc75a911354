"""ChainRule: a conditioner and a head as they are at one call, with context; draws the sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base import Conditioner, Head
from ..conditioners.site_loop import SiteLoop
from ..contexts import PaddedSequence, checked_source, kind_of
from ..core.binding import Held, held_tensors
from ..core.checks import check_like
from ..core.lengths import expand_mask
from ..core.rows import flat_rows
from ..core.values import numbers
from .checks import steps_in_order


@dataclass(frozen=True, eq=False, kw_only=True)
class ChainRule:
    """p(y_t | x, y_{<t}) of the sites of rows, in visiting order.

    Attributes:
        conditioner, head: as they were.
        context: (*batch, C), or of more dims (:class:`Covariates`, :class:`Source`), or None.
        source_lengths: (*batch), of sources.
        sites: how many a row has, those of a prefix included.
    """

    conditioner: Any = Held()  # noqa: RUF009  (a descriptor, and no default)
    head: Any = Held()  # noqa: RUF009
    context: Tensor | None
    source_lengths: Tensor | None
    sites: int

    @classmethod
    def of(
        cls,
        conditioner: Conditioner,
        head: Head,
        context: Any,
        source_lengths: Tensor | None,
        sites: int,
        order: Tensor | None = None,
        given: int = 0,
    ) -> ChainRule:
        """Binds the modules as they are now.

        Covariates are given in the order of the event, after those of the ``given`` sites of a prefix; ``order`` is that of visits.
        """
        context, source_lengths = checked_source(conditioner, context, source_lengths)
        if context is not None and kind_of(conditioner.context).by_site:
            context = steps_in_order(context, order, given, sites)
        return cls(conditioner=conditioner, head=head, context=context, source_lengths=source_lengths, sites=sites)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """What the modules compute with, each once."""
        return held_tensors(self)

    @cached_property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the numbers."""
        floating = (t for t in (*self.tensors, self.context) if t is not None and t.is_floating_point())
        return next(floating, torch.empty(0, device="cpu"))

    @cached_property
    def reads_numbers(self) -> bool:
        """Whether sites are numbers to the conditioner, or categories."""
        return isinstance(self.conditioner.site, tuple)

    @property
    def context_dims(self) -> int:
        """How many dims of the context belong to one row."""
        return kind_of(self.conditioner.context).dims

    @property
    def batch_shape(self) -> torch.Size:
        """That of the context."""
        return torch.Size() if self.context is None else self.context.shape[: -self.context_dims]

    @cached_property
    def probe(self) -> Any:
        """The distribution of all sites at phi = 0: what family it is does not depend on phi."""
        with torch.no_grad():  # tensors on a graph could not be copied
            return self.site(self.like.new_zeros(1, self.sites, self.head.num_params))

    @property
    def family(self) -> str:
        return type(getattr(self.probe, "base_dist", self.probe)).__name__

    @cached_property
    def _half_head(self) -> bool:
        """Whether the head's own weights are in half precision, so that its parameters must be."""
        return any(p.dtype.itemsize < 4 for p in self.head.parameters())

    def site(self, phi: Tensor, first: int = 0) -> Any:
        """The distributions of S sites from ``first`` on, of parameters in single precision at least."""
        # a call of the head as a module would cost as much as an operation
        return self.head.forward(phi if phi.dtype.itemsize >= 4 or self._half_head else phi.float(), first)

    def site_at_zero(self, t: int) -> Any:
        """The distribution (1, 1) of site t at phi = 0, whose support is that at any phi."""
        return self.site(self.like.new_zeros(1, 1, self.head.num_params), t)

    def read(self, y: Tensor) -> Tensor:
        """Sites as the conditioner reads them: numbers in its dtype, categories as they are."""
        return y.to(self.like.dtype) if self.reads_numbers else y

    def typed(self, name: str, value: Tensor) -> Tensor:
        """Values in the dtype of the conditioner, or single for half precision; integers and Booleans for numbers of the same value."""
        value = numbers(name, value)
        if value.is_floating_point():
            if self.reads_numbers:
                single = value.dtype == torch.float32 and self.like.dtype.itemsize < 4
                check_like(name, value, self.like.float() if single else self.like)
            return value
        return value.long() if isinstance(self.conditioner.site, int) else value.to(self.like.dtype)

    def contexts(self, shape: torch.Size, present: Tensor | None = None) -> Any:
        """The context of each row of a batch, with zeros for the covariates of sites (B, T) that are not present."""
        if self.context is None:
            return None
        context = flat_rows(self.context, shape, self.context_dims)
        if self.source_lengths is not None:
            return PaddedSequence(context, flat_rows(self.source_lengths, shape, 0))
        if present is None or not kind_of(self.conditioner.context).by_site:
            return context
        return torch.where(present.unsqueeze(2), context, 0.0)

    def draw(
        self, loop: SiteLoop, draw: Callable[[Tensor, int], Tensor], lengths: Tensor | None = None
    ) -> list[Tensor]:
        """The sites (B, 1, *site_shape) that a loop visits, drawn one by one from their parameters and place.

        Padding is drawn at phi = 0 and set to 0 before the network reads it. Drawn like other sites it could overflow, and
        its gradient would be NaN.
        """
        ys: list[Tensor] = []
        for t, phi in loop:
            if lengths is None:
                y = draw(phi, t)
            else:
                present = (t < lengths).unsqueeze(1)
                y = draw(torch.where(present.unsqueeze(2), phi, phi.new_zeros(())), t)
                y = torch.where(expand_mask(present, y), y, y.new_zeros(()))
            ys.append(y)
            loop.read(self.read(y))
        return ys

    def loop(self, shape: torch.Size, stop: int, prefix: Tensor | None, present: Tensor | None = None) -> SiteLoop:
        """The loop over the sites of a batch's rows, from the end of their prefixes (B, k, *site_shape) to ``stop``."""
        prefix = None if prefix is None else self.read(prefix)
        return SiteLoop(self.conditioner, self.contexts(shape, present), prod(shape), stop, prefix)
