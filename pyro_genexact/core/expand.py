"""An ``expand`` without copies, for distributions that compute each row only once."""

from __future__ import annotations

from typing import Any, Self

from pyro.distributions import TorchDistribution
from torch import Size


class ShallowExpand(TorchDistribution):
    """A distribution whose batch shape can be changed by its attribute ``_batch_shape`` alone."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """Returns the distribution with another batch shape, without copying tensors.

        Samples of the expanded rows are independent; all other quantities are computed once and broadcast.

        Raises:
            ValueError: if the batch shape does not broadcast to the new one.
        """
        old, new = self.batch_shape, Size(batch_shape)
        padded = (1,) * (len(new) - len(old)) + old
        if len(padded) > len(new) or any(m < 0 or n not in (1, m) for n, m in zip(padded, new, strict=False)):
            raise ValueError(f"Expected batch_shape that {tuple(old)} broadcasts to; got {tuple(new)}.")
        expanded = self.__new__(type(self)) if _instance is None else _instance
        expanded.__dict__.update(self.__dict__, _batch_shape=new)
        return expanded
