"""``expand`` of distributions whose rows are computed once, whatever batch shape they are expanded to."""

from __future__ import annotations

from typing import Any, Self

from pyro.distributions import TorchDistribution
from torch import Size


class ShallowExpand(TorchDistribution):
    """A distribution that takes its batch shape from nothing but its own attribute."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same with another batch shape, without copies; rows are drawn independently, everything else is computed once."""
        old, new = self.batch_shape, Size(batch_shape)
        padded = (1,) * (len(new) - len(old)) + old
        if len(padded) > len(new) or any(m < 0 or n not in (1, m) for n, m in zip(padded, new, strict=False)):
            raise ValueError(f"Expected batch_shape that {tuple(old)} broadcasts to; got {tuple(new)}.")
        expanded = self.__new__(type(self)) if _instance is None else _instance
        expanded.__dict__.update(self.__dict__, _batch_shape=new)
        return expanded
