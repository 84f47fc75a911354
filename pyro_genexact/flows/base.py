"""A base distribution pushed through transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from ..base import Constant, DistributionModule, check_context
from ..transforms import Chain
from ..transforms.base import transform_of


class Flow(DistributionModule):
    """A base distribution pushed through transforms: log p(y) = log p_base(x) - log|dy/dx|, y the image of x.

    Its call returns a stock ``pyro.distributions.TransformedDistribution`` over vectors, whose single transform is the
    :class:`~pyro_genexact.transforms.Chain` of them all: sampling and scoring the sample runs each network once.
    End with :class:`~pyro_genexact.transforms.ToSupport`, as the recipes do, for a support that refuses infinite values.
    Batch shape: the base's, broadcast with the context's; each context row gets noise of its own.

    Args:
        transforms: from the base to the data: transforms, modules that are, or modules whose call returns one.
        base: a distribution over vectors, or a module whose call returns one. A distribution's tensors follow the module's
            device and dtype; what shall be learned or saved belongs in a :class:`DistributionModule`.

    Raises:
        ValueError: if there is no transform, or parts expect contexts of different widths.

    Example:
        >>> import torch
        >>> from pyro_genexact.transforms import Reverse
        >>> flow = Flow([Reverse()], dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> flow().sample((2,)).shape
        torch.Size([2, 3])
    """

    def __init__(self, transforms: Sequence[Transform | nn.Module], base: Distribution | nn.Module) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("Expected transforms to hold at least one; got none.")
        self.transforms = nn.ModuleList(
            _module("transforms", t, Transform, "transforms or modules") for t in transforms
        )
        self.base = _module("base", base, Distribution, "a distribution or a module")
        widths = {width for part in (*self.transforms, self.base) if (width := getattr(part, "context", 0))}
        if len(widths) > 1:
            raise ValueError(f"Expected transforms and base with contexts of one width; got {sorted(widths)}.")
        self.context = max(widths, default=0)

    def forward(self, context: Tensor | None = None) -> dist.TransformedDistribution:
        """The distribution given the context (*batch, C)."""
        check_context(self, context)
        base = self.base(context) if getattr(self.base, "context", 0) else self.base()
        return dist.TransformedDistribution(base, [Chain([transform_of(t, context) for t in self.transforms])])


def support_of_numbers(d: Distribution) -> Any:
    """The support of a distribution, or of the elements if it is one of vectors by elements."""
    support: Any = d.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def over_reals(d: Distribution) -> bool:
    """Whether the support of a distribution is all real numbers, or vectors of such."""
    return isinstance(support_of_numbers(d), type(constraints.real))


def _module(name: str, part: Any, kind: Any, kinds: str) -> nn.Module:
    if not isinstance(part, (nn.Module, kind)):
        raise TypeError(f"Expected {name} to be {kinds}; got {type(part).__name__}.")
    return part if isinstance(part, nn.Module) else Constant(part)
