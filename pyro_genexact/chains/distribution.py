"""The base class of linear-chain CRFs and hidden Markov models: lengths and enumeration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from ..core.expand import ShallowExpand
from .padding import padding_mask


class ChainDistribution(ShallowExpand):
    """Base class of distributions over sequences of N sites, of which each row uses the first ``lengths``.

    A subclass sets ``lengths`` before it calls the constructor, and defines :meth:`site_values` if sites have a finite
    support.

    Attributes:
        lengths: integers (*batch) in 0 ... N, or None if all rows have N sites.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    lengths: Tensor | None
    events = "sequences"  # the name of events in messages

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether all rows have the same length."""
        return self.lengths is None or self.lengths.is_meta or len(self.lengths.unique()) < 2

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns all K^N sequences of the K values of a site, (K^N, *batch, *event); the last site varies fastest.

        Padding is 0. Without ``expand`` the batch dims have size 1.

        Raises:
            NotImplementedError: if sites have no finite support, or rows have different lengths.
            ValueError: if there are more than 2^20 sequences.
        """
        values = self.site_values()
        sites, *event = self.event_shape
        used = sites
        if self.lengths is not None and self.lengths.numel():
            used = int(self.lengths.max())
            if bool((self.lengths != used).any()):
                got = self.lengths.unique().tolist()
                raise NotImplementedError(f"Expected rows of equal lengths for enumeration; got lengths {got}.")
        count = len(values) ** used
        if count > 2**20:
            raise ValueError(f"Expected at most {2**20} {self.events} for enumeration; got {len(values)}^{used}.")
        place = len(values) ** torch.arange(used - 1, -1, -1, device=values.device)
        sequences = values[torch.arange(count, device=values.device).unsqueeze(-1) // place % len(values)]
        sequences = torch.cat([sequences, values.new_zeros(count, sites - used, *event)], 1)
        sequences = sequences.reshape(count, *[1] * len(self.batch_shape), *self.event_shape)
        return sequences.expand(count, *self.batch_shape, *self.event_shape) if expand else sequences

    def site_values(self) -> Tensor:
        """Returns the K values (K, *obs) of a site."""
        raise NotImplementedError(f"Expected sites with finitely many values; got {type(self).__name__}.")

    def padding(self, more: int = 0) -> Tensor | None:
        """Returns the mask (*, N, 1 ...) of padding with ``more`` trailing dims of size 1; None without lengths."""
        mask = padding_mask(self.lengths, self.event_shape[0])
        return None if mask is None else mask.reshape(*mask.shape, *[1] * more)
