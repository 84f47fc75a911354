"""The head of a value and a flag that marks the last site of a sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..base import Head
from ..families.stopped import Stopped as StoppedDistribution
from ..families.stopped import StoppedConstraint
from .checks import check_distribution_head


class Stopped(Head):
    """Sites (k + 1,) of a value and an independent flag that is 1 at the last site of a sequence.

    It serves models of sequences of values without an end-of-sequence token:
    ``Sequence(conditioner, Stopped(head), eos=None, max_len=...)``. The last entry of phi is the logit of the flag; the
    others are the parameters of ``head``. P = ``head.num_params`` + 1.

    Args:
        head: a head of scalars (k = 1) or vectors (k,).

    Raises:
        TypeError: if ``head`` is not a head of distributions.
        ValueError: if ``head`` is a ``PerSite``.

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
        """The constraint of a site: a value in the support of the wrapped head, and a flag 0 or 1."""
        return StoppedConstraint(self.head.support)

    def forward(self, phi: Tensor, first: int = 0) -> StoppedDistribution:
        """Returns the distribution of batch shape (*batch, S) for phi (*batch, S, P)."""
        inner: Any = self.head(phi[..., :-1], first)
        return StoppedDistribution(inner, phi[..., -1], self.head.support, validate_args=False)

    def ends(self, y: Tensor) -> Tensor:
        """Whether each of the sites (*batch, k + 1) is the last of its sequence, of shape (*batch)."""
        return y[..., -1] == 1
