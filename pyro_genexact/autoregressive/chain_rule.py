"""ChainRule: a conditioner and a head bound to a context; it samples the sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base import Conditioner, Head
from ..conditioners.site_loop import SiteLoop
from ..contexts import PaddedSequence, checked_source, kind_of
from ..core.binding import Held, held_tensors
from ..core.checks import check_like
from ..core.compiling import Lazy
from ..core.lengths import expand_mask
from ..core.rows import flat_rows
from ..core.values import numbers
from .checks import steps_in_order


@dataclass(frozen=True, eq=False, kw_only=True)
class ChainRule:
    """The conditional distributions p(y_t | x, y_{<t}) of the sites of rows, in visiting order.

    Attributes:
        conditioner: the conditioner, with its weights at construction.
        head: the head, with its weights at construction.
        context: (*batch, C), or with more dims (:class:`Covariates`, :class:`Source`), or None.
        source_lengths: (*batch), the lengths of sources, or None.
        sites: the number of sites of a row, including those of a prefix.
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
        """Binds the modules with their present weights.

        Covariates follow the order of the event, after those of the ``given`` sites of a prefix; ``order`` is the
        visiting order.
        """
        context, source_lengths = checked_source(conditioner, context, source_lengths)
        if context is not None and kind_of(conditioner.context).by_site:
            context = steps_in_order(context, order, given, sites)
        return cls(conditioner=conditioner, head=head, context=context, source_lengths=source_lengths, sites=sites)

    @Lazy
    def tensors(self) -> list[Tensor]:
        """The tensors that the modules use, without duplicates."""
        return held_tensors(self)

    @Lazy
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the computation."""
        floating = (t for t in (*self.tensors, self.context) if t is not None and t.is_floating_point())
        return next(floating, torch.empty(0, device="cpu"))

    @Lazy
    def reads_numbers(self) -> bool:
        """Whether the conditioner reads sites as numbers rather than categories."""
        return isinstance(self.conditioner.site, tuple)

    @property
    def context_dims(self) -> int:
        """The number of dims of the context that belong to one row."""
        return kind_of(self.conditioner.context).dims

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the context."""
        return torch.Size() if self.context is None else self.context.shape[: -self.context_dims]

    @Lazy
    def probe(self) -> Any:
        """The distribution of all sites at phi = 0; its family does not depend on phi."""
        with torch.no_grad():  # tensors with a graph cannot be copied
            return self.site(self.like.new_zeros(1, self.sites, self.head.num_params))

    @property
    def family(self) -> str:
        """The class name of the distribution of a site."""
        return type(getattr(self.probe, "base_dist", self.probe)).__name__

    @Lazy
    def _half_head(self) -> bool:
        """Whether the head's weights are in half precision, which requires parameters in half precision."""
        return any(p.dtype.itemsize < 4 for p in self.head.parameters())

    def site(self, phi: Tensor, first: int = 0) -> Any:
        """Returns the distributions of S sites from ``first`` on, with parameters in single precision at least."""
        # head.forward instead of head(...) saves the time of about one operation
        return self.head.forward(phi if phi.dtype.itemsize >= 4 or self._half_head else phi.float(), first)

    def site_at_zero(self, t: int) -> Any:
        """Returns the distribution (1, 1) of site t at phi = 0, which has the same support at all phi."""
        return self.site(self.like.new_zeros(1, 1, self.head.num_params), t)

    def read(self, y: Tensor) -> Tensor:
        """Converts sites to the conditioner's input: numbers to its dtype; categories are unchanged."""
        return y.to(self.like.dtype) if self.reads_numbers else y

    def typed(self, name: str, value: Tensor) -> Tensor:
        """Converts values to the dtype of the conditioner (float32 for half precision), or to integers for categories."""
        value = numbers(name, value)
        if value.is_floating_point():
            if self.reads_numbers:
                single = value.dtype == torch.float32 and self.like.dtype.itemsize < 4
                check_like(name, value, self.like.float() if single else self.like)
            return value
        return value.long() if isinstance(self.conditioner.site, int) else value.to(self.like.dtype)

    def contexts(self, shape: torch.Size, present: Tensor | None = None) -> Any:
        """Returns the context of each row of a batch, with zeros for the covariates of sites (B, T) that are absent."""
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
        """Returns the sites (B, 1, *site_shape) that a loop visits, each drawn by ``draw(phi, t)``.

        Padding is drawn at phi = 0 and set to 0 before the network reads it. Drawn from the network's parameters it
        could overflow, with a gradient of NaN.
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
        """Returns the loop over the sites of a batch, from the end of the prefixes (B, k, *site_shape) to ``stop``."""
        prefix = None if prefix is None else self.read(prefix)
        return SiteLoop(self.conditioner, self.contexts(shape, present), prod(shape), stop, prefix)
