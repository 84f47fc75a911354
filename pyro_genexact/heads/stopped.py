"""Stopped: a head of a value and a flag that is 1 at the last site of a sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..base import Head
from ..families.stopped import Stopped as StoppedDistribution
from ..families.stopped import StoppedConstraint
from .checks import check_distribution_head


class Stopped(Head):
    """Sites (k + 1,) of a value and a flag that is 1 at the last site of a sequence: for values of any kind, tokens or not.

    The last number of phi is the logit of the flag, the others are those of the head of the values. A model of sequences
    whose elements are anything: ``Sequence(conditioner, Stopped(head), eos=None, max_len=...)``.

    Args:
        head: of scalars (k = 1) or vectors (k,).

    Raises:
        TypeError: for what is no head of distributions.
        ValueError: for a ``PerSite``.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> head = Stopped(heads.Normal())
        >>> y = head(torch.zeros(4, 5, 3)).sample()
        >>> y.shape, head.ends(y).shape
        (torch.Size([4, 5, 2]), torch.Size([4, 5]))
    """

    has_ends = True

    def __init__(self, head: Head) -> None:
        super().__init__()
        check_distribution_head(head)
        if head.num_sites is not None:
            raise ValueError("Expected head to treat all sites alike; got a PerSite.")
        self.head, self.num_params = head, head.num_params + 1
        self.site_shape = ((head.site_shape[0] if head.site_shape else 1) + 1,)

    @property
    def support(self) -> StoppedConstraint:  # type: ignore[override]
        """Of a site: a value in the support of the wrapped head, and 0 or 1."""
        return StoppedConstraint(self.head.support)

    def forward(self, phi: Tensor, first: int = 0) -> StoppedDistribution:
        """phi (*batch, S, P) to the distribution of batch shape (*batch, S)."""
        inner: Any = self.head(phi[..., :-1], first)
        return StoppedDistribution(inner, phi[..., -1], self.head.support, validate_args=False)

    def ends(self, y: Tensor) -> Tensor:
        """Whether sites (*, k + 1) are last ones, (*)."""
        return y[..., -1] == 1
