"""The common base of linear-chain CRFs and hidden Markov models: lengths and enumeration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from ..core.expand import ShallowExpand
from .semirings import padding_mask


class ChainDistribution(ShallowExpand):
    """Sequences of N sites, of which the first ``lengths`` of a row count.

    A subclass sets ``lengths`` before it calls the constructor, and defines :meth:`site_values` where these are finitely many.

    Attributes:
        lengths: (*batch) integers 0 ... N, or None where all sites count.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    lengths: Tensor | None
    events = "sequences"  # what an error calls them

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether rows have one length."""
        return self.lengths is None or self.lengths.is_meta or len(self.lengths.unique()) < 2

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All K^N sequences of the K values of a site, (K^N, *batch, *event), the last site fastest; padding is 0.

        Batch dims are 1 without ``expand``.

        Raises:
            NotImplementedError: where a site has no finite support, and for rows of several lengths.
            ValueError: for more than 2^20 sequences.
        """
        values = self.site_values()
        sites, *event = self.event_shape
        used = sites
        if self.lengths is not None and self.lengths.numel():
            used = int(self.lengths.max())
            if bool((self.lengths != used).any()):
                got = self.lengths.unique().tolist()
                raise NotImplementedError(f"Expected rows of one length to be enumerated; got lengths {got}.")
        count = len(values) ** used
        if count > 2**20:
            raise ValueError(f"Expected at most {2**20} {self.events} to be enumerated; got {len(values)}^{used}.")
        place = len(values) ** torch.arange(used - 1, -1, -1, device=values.device)
        sequences = values[torch.arange(count, device=values.device).unsqueeze(-1) // place % len(values)]
        sequences = torch.cat([sequences, values.new_zeros(count, sites - used, *event)], 1)
        sequences = sequences.reshape(count, *[1] * len(self.batch_shape), *self.event_shape)
        return sequences.expand(count, *self.batch_shape, *self.event_shape) if expand else sequences

    def site_values(self) -> Tensor:
        """The K values (K, *obs) that a site may have."""
        raise NotImplementedError(f"Expected sites of finitely many values; got those of {type(self).__name__}.")

    def padding(self, more: int = 0) -> Tensor | None:
        """(*, N, 1 ...), which sites are padding, with so many more dims of 1; None without lengths."""
        mask = padding_mask(self.lengths, self.event_shape[0])
        return None if mask is None else mask.reshape(*mask.shape, *[1] * more)
