"""Layout of events as rows of sites: visiting order, prefix, padding, and the end of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..base import Head
from ..core.functional import visible
from ..core.lengths import expand_mask, site_mask
from ..core.rows import flat_rows
from ..families.in_support import contains, feasible_point


@dataclass(frozen=True, eq=False)
class Layout:
    """Layout of events as rows (B, k + T, *site_shape) in visiting order: k sites of a prefix, then T of the event.

    Attributes:
        head: the head of the sites.
        dims: the dims of the event that are sites.
        prefix: (*batch, k, *site_shape), or None.
        order: (T,), the index of the i-th site to visit, or None for raster order.
        lengths: (*batch), the number of sites of each row including those of the prefix, or None for all.
    """

    head: Head
    dims: torch.Size
    prefix: Tensor | None = None
    order: Tensor | None = None
    lengths: Tensor | None = None

    has_ends = False  # whether sites can end a row
    fill = 0  # value of padding
    enumerable = "no lengths"  # condition for enumeration, for error messages

    @property
    def count(self) -> int:
        """T, the number of sites of the event."""
        return prod(self.dims)

    @property
    def given(self) -> int:
        """k, the number of sites of the prefix."""
        return 0 if self.prefix is None else self.prefix.shape[-1 - len(self.head.site_shape)]

    @property
    def prefix_batch(self) -> torch.Size:
        """The batch shape of the prefix, () without prefix."""
        return torch.Size() if self.prefix is None else self.prefix.shape[: -1 - len(self.head.site_shape)]

    def prefix_rows(self, shape: torch.Size) -> Tensor | None:
        """Returns the prefix as rows (B, k, *site_shape), or None."""
        return None if self.prefix is None else flat_rows(self.prefix, shape, 1 + len(self.head.site_shape))

    def length_rows(self, shape: torch.Size) -> Tensor | None:
        """Returns the lengths as rows (B,), or None."""
        return None if self.lengths is None else flat_rows(self.lengths, shape, 0)

    def starts(self, shape: torch.Size) -> Tensor | None:
        """Returns the number of prefix sites of each row (B,), or None if it is the same in all rows."""
        return None

    def span(self, shape: torch.Size) -> tuple[int, int]:
        """Returns the first site that any row of a batch draws, and the end of the last row."""
        return self.given, self.given + self.count

    def over(self, shape: torch.Size) -> Tensor | None:
        """Returns which rows (B,) have a prefix that has ended, or None if no prefix can end."""
        return None

    def obstacle(self, shape: torch.Size) -> str | None:
        """Returns the reason why events of a batch cannot be enumerated even if sites can, or None."""
        return None if self.lengths is None else "lengths"

    def after_prefix(self, sites: Tensor, batch_shape: torch.Size) -> Tensor:
        """Returns the prefix extended by sites (*batch, S, *site_shape), of this batch shape."""
        if self.prefix is None:
            return sites
        event = -1 - len(self.head.site_shape)
        parts = [part.expand(*batch_shape, *part.shape[event:]) for part in (self.prefix, sites)]
        return torch.cat(parts, len(batch_shape))

    def filler(self, like: Tensor, rows: int = 1, sites: int = 1) -> Tensor:
        """Returns padding (rows, sites, *site_shape) with the dtype and device of ``like``."""
        return like.new_full((rows, sites, *self.head.site_shape), self.fill)

    def ends(self, y: Tensor) -> Tensor:
        """Returns which sites (*, T, *site_shape) end their row, as (*, T)."""
        return torch.zeros(y.shape[: y.dim() - len(self.head.site_shape)], dtype=torch.bool, device=y.device)

    def flat(self, value: Tensor, shape: torch.Size) -> Tensor:
        """Reshapes the events of a batch to rows (B, T, *site_shape) in visiting order."""
        rows = flat_rows(value, shape, len(self.dims) + len(self.head.site_shape)).flatten(1, len(self.dims))
        return rows if self.order is None else rows.index_select(1, self.order)

    def arrange(self, sites: Tensor, shape: torch.Size) -> Tensor:
        """Reshapes values (B, T, ...) of the event's sites in visiting order to (*shape, *dims, ...)."""
        sites = sites if self.order is None else sites.index_select(1, self.order.argsort())
        return sites.reshape(shape + self.dims + sites.shape[2:])

    def events(self, y: Tensor, shape: torch.Size) -> Tensor:
        """Reshapes rows (B, T, *site_shape) in visiting order to events, with zeros for padding."""
        present = self.present(shape)
        if present is not None:
            y = torch.where(expand_mask(present[:, self.given :], y), y, y.new_zeros(()))
        return self.arrange(y, shape)

    def present(self, shape: torch.Size) -> Tensor | None:
        """Returns the mask (B, k + T) of present sites; None if all are, or if it depends on the values."""
        lengths = self.length_rows(shape)
        return None if lengths is None else site_mask(lengths, self.given + self.count)

    def rows(self, value: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """Returns prefix and events as rows, and the mask (B, k + T) of present sites; None if all are present."""
        y, prefix = self.flat(value, shape), self.prefix_rows(shape)
        return y if prefix is None else torch.cat([prefix, y], 1), self.present(shape)

    def of_event(self, sites: Tensor, shape: torch.Size) -> Tensor:
        """Selects the values (B, T, ...) of the event's sites from those of all sites (B, k + T, ...)."""
        return sites[:, self.given :] if self.prefix is not None else sites

    def placed(self, sites: Tensor, fill: float, shape: torch.Size) -> Tensor:
        """Returns values (B, T, ...) of the event's sites as those of all sites (B, k + T, ...), with ``fill`` elsewhere."""
        if self.prefix is None:
            return sites
        return torch.cat([sites.new_full((len(sites), self.given, *sites.shape[2:]), fill), sites], 1)

    def completed(self, y: Tensor, before: Tensor | None, shape: torch.Size) -> Tensor:
        """Returns sites y (B, S, *site_shape) that follow those ``before`` (B, t, *site_shape), with padding filled."""
        present, first = self.present(shape), 0 if before is None else before.shape[1]
        if present is None:
            return y
        return torch.where(expand_mask(present[:, first : first + y.shape[1]], y), y, y.new_zeros(()))

    def inside(self, y: Tensor, present: Tensor | None) -> Tensor:
        """Returns which sites (B, k + T) of rows are valid: in the head's support, or padding."""
        inside = contains(self.head.support, y)
        return inside if present is None else inside | ~present

    def check(self, y: Tensor, inside: Tensor, name: str = "value") -> None:
        """Raises a ValueError unless all sites of rows are valid."""
        if not torch._is_all_true(inside):  # unlike all(), it works under vmap
            row, site = (~inside).nonzero()[0].tolist()
            raise ValueError(f"Expected {name} {self.expected(y, row, site)}")

    def expected(self, y: Tensor, row: int, site: int) -> str:
        """Returns the message for an invalid site: expectation and value."""
        got = y[row, site].tolist()
        return f"within the support of the head, {self.head.support}; got {got} at site {site} (in visiting order)."

    def check_prefix(self, shape: torch.Size) -> None:
        """Raises a ValueError if the prefix is outside the support."""
        prefix = self.prefix_rows(shape)
        if prefix is not None:
            y = prefix.new_zeros(prefix.shape[0], self.given + self.count, *self.head.site_shape)
            y = feasible_point(self.head.support, y).expand(y.shape).to(prefix.dtype)
            y = torch.cat([prefix, y[:, self.given :]], 1)
            self.check(y, self.inside(y, self.present(shape)), "prefix")


@dataclass(frozen=True, eq=False)
class SequenceLayout(Layout):
    """Layout of rows in which only padding follows the first end, after prefixes of possibly different lengths.

    Attributes:
        eos: the category that ends a row; None if the head models the end.
        prefix_lengths: (*batch), or None if all prefixes have k sites.
    """

    eos: int | None = None
    prefix_lengths: Tensor | None = None

    has_ends = True
    enumerable = "prefixes that have not ended"

    @property
    def fill(self) -> int:  # type: ignore[override]
        return self.eos or 0

    def starts(self, shape: torch.Size) -> Tensor | None:
        return None if self.prefix_lengths is None else flat_rows(self.prefix_lengths, shape, 0)

    def span(self, shape: torch.Size) -> tuple[int, int]:
        starts = self.starts(shape)
        if starts is None:
            return super().span(shape)
        if not starts.numel() or not visible(starts):
            return 0, self.given + self.count
        first, last = torch.stack(starts.aminmax()).tolist()  # one wait for a device
        return first, last + self.count

    def over(self, shape: torch.Size) -> Tensor | None:
        prefix, starts = self.prefix_rows(shape), self.starts(shape)
        if prefix is None:
            return None
        ends = self.ends(prefix)
        return (ends if starts is None else ends & site_mask(starts, self.given)).any(1)

    def obstacle(self, shape: torch.Size) -> str | None:
        over = self.over(shape)
        return "a prefix that has ended" if over is not None and visible(over) and over.any() else None

    def after_prefix(self, sites: Tensor, batch_shape: torch.Size) -> Tensor:
        both, starts = super().after_prefix(sites, batch_shape), self.prefix_lengths
        return both if starts is None else close_gaps(both, starts.expand(batch_shape), self.given)

    def ends(self, y: Tensor) -> Tensor:
        return self.head.ends(y) if self.eos is None else y == self.eos

    def gone(self, y: Tensor) -> Tensor:
        """Returns which sites (B, T) of rows are after the first end."""
        ends = self.ends(y)
        return ends.cumsum(1) > ends

    def rows(self, value: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        y, _ = super().rows(value, shape)
        if (starts := self.starts(shape)) is None:
            return y, ~self.gone(y)
        inside = site_mask(starts + self.count, y.shape[1])
        y = close_gaps(y, starts, self.given)
        y = torch.where(expand_mask(inside, y), y, self.filler(y))
        return y, inside & ~self.gone(y)

    def of_event(self, sites: Tensor, shape: torch.Size) -> Tensor:
        if (starts := self.starts(shape)) is None:
            return super().of_event(sites, shape)
        index = starts.unsqueeze(1) + torch.arange(self.count, device=starts.device)
        return sites.take_along_dim(expand_mask(index, sites), 1)

    def placed(self, sites: Tensor, fill: float, shape: torch.Size) -> Tensor:
        both, starts = super().placed(sites, fill, shape), self.starts(shape)
        return both if starts is None else close_gaps(both, starts, self.given)

    def completed(self, y: Tensor, before: Tensor | None, shape: torch.Size) -> Tensor:
        first, starts = 0 if before is None else before.shape[1], self.starts(shape)
        if starts is not None and first < self.given:
            own = self.prefix_rows(shape)[:, first : first + y.shape[1]].to(y)  # type: ignore[index]
            kept = site_mask(starts - first, own.shape[1])
            y = torch.cat([torch.where(expand_mask(kept, own), own, y[:, : own.shape[1]]), y[:, own.shape[1] :]], 1)
        gone = self.gone(y if before is None else torch.cat([before, y], 1))[:, first:]
        return torch.where(expand_mask(gone, y), self.filler(y), y)

    def site_of(self, t: int, starts: Tensor) -> Tensor:
        """Returns the index in the event (B,) of site t for rows with these starts; T if it is not in the event."""
        return torch.where((t >= starts) & (t < starts + self.count), t - starts, self.count)

    def inside(self, y: Tensor, present: Tensor | None) -> Tensor:
        """Returns which present sites are in the head's support, and which absent sites hold the padding value."""
        assert present is not None
        filled = y == self.filler(y)
        filled = filled if filled.dim() == 2 else filled.flatten(2).all(2)
        return torch.where(present, contains(self.head.support, y), filled)

    def expected(self, y: Tensor, row: int, site: int) -> str:
        if not self.gone(y)[row, site]:
            return super().expected(y, row, site)
        filler, end = self.filler(y)[0, 0].tolist(), "end" if self.eos is None else f"eos ({self.eos})"
        return f"to be {filler} after the first {end}; got {y[row, site].tolist()} at site {site}."

    def check_prefix(self, shape: torch.Size) -> None:
        prefix, starts = self.prefix_rows(shape), self.starts(shape)
        if prefix is not None:
            inside = self.inside(prefix, ~self.gone(prefix))
            self.check(prefix, inside if starts is None else inside | ~site_mask(starts, self.given), "prefix")


def close_gaps(sites: Tensor, starts: Tensor, given: int) -> Tensor:
    """Removes the padding of prefixes: rows (*batch, k + T, *site_shape) keep the first ``starts`` of their k sites."""
    place = torch.arange(sites.shape[starts.dim()], device=sites.device)
    index = torch.where(place < starts.unsqueeze(-1), place, given + place - starts.unsqueeze(-1))
    return sites.take_along_dim(expand_mask(index.clamp(max=len(place) - 1), sites), starts.dim())
