"""Flow: a module whose call returns a base distribution pushed through transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform, constraints

from ..base import Constant, DistributionModule
from ..contexts import PaddedSequence, checked_source
from ..core.independent import to_event
from ..core.lengths import checked_lengths, site_mask
from ..transforms.base import Chain
from ..transforms.modules import result_of, transform_of
from ..transforms.prefixes import Prefixes
from .transformed import TransformedDistribution


class Flow(DistributionModule):
    """A base distribution pushed through transforms: log p(y) = log p_base(x) - log|dy/dx|, y the image of x.

    Its call returns a :class:`~pyro_genexact.distributions.TransformedDistribution` (Pyro's) over vectors, whose single transform is the
    :class:`~pyro_genexact.transforms.Chain` of them all: sampling and scoring the sample runs each network once.
    End with :class:`~pyro_genexact.transforms.ToSupport`, as the recipes do, for a support that refuses infinite values.
    Batch shape: the base's, broadcast with the context's and the lengths'; each of their rows gets noise of its own. With
    ``source_lengths`` in the call a row's ``Source`` has as many steps; a ``PaddedSequence`` of both as context is the same.

    With ``lengths`` in the call a row of length n has the density of its first n sites, that of a flow of n features with the
    same weights. The sites after them are padding: no value there matters, none gets a gradient, and samples hold zeros. All
    transforms must leave the first sites to themselves, see :class:`~pyro_genexact.transforms.Prefixes`.

    Args:
        transforms: from the base to the data: transforms, modules that are, or modules whose call returns one.
        base: a distribution over vectors, or a module whose call returns one. A distribution's tensors follow the module's
            device and dtype and are saved with it; learned parameters belong in a :class:`DistributionModule`.

    Raises:
        ValueError: if there is no transform, or parts expect contexts of different widths; in calls for lengths outside of
            0 ... T, with transforms that mix all sites, or with a base that is not elementwise over the reals, and for
            source_lengths outside of 0 ... S, or without a source.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_genexact.transforms import Reverse
        >>> flow = Flow([Reverse()], dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> flow().sample((2,)).shape
        torch.Size([2, 3])
        >>> flow(lengths=torch.tensor([3, 1])).log_prob(torch.tensor([0.0, 0.0, 9.0]))
        tensor([-43.2568,  -0.9189])
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
            raise ValueError(f"Expected transforms and base with contexts of one width; got {sorted(widths, key=str)}.")
        self.context = max(widths, default=0)

    def forward(
        self,
        context: Tensor | PaddedSequence | None = None,
        lengths: Tensor | None = None,
        source_lengths: Tensor | None = None,
    ) -> TransformedDistribution:
        """The distribution given the context (*batch, C), the lengths (*batch) of its rows and those of their sources."""
        base, parts = self.parts(context, source_lengths)
        if lengths is None:
            return TransformedDistribution(to_event(base), [Chain(parts)])
        elements = _elements(base)
        lengths = checked_lengths(lengths, elements.batch_shape[-1]).clone()  # as they are now, for base and transforms
        masked = dist.MaskedDistribution(elements, site_mask(lengths, elements.batch_shape[-1])).to_event(1)
        return TransformedDistribution(to_event(masked), [Prefixes(parts, lengths)])

    def parts(self, context: Any, source_lengths: Tensor | None) -> tuple[Any, list[Transform]]:
        """The base and the transforms given the context; a ValueError unless the flow was built for it."""
        context, lengths = checked_source(self, context, source_lengths)
        given = context if lengths is None else PaddedSequence(context, lengths)
        return result_of(self.base, given), [transform_of(t, given) for t in self.transforms]


def standard_normal(*shape: int) -> Constant:
    """The base that recipes have by default, of events of this shape; it follows from sizes, so it is not saved."""
    zeros = torch.zeros(shape, device="cpu")
    return Constant(to_event(dist.Normal(zeros, zeros + 1), len(shape)), persistent=False)


def support_of_numbers(d: Distribution) -> Any:
    """The support of a distribution, or of the elements if it is one of vectors by elements."""
    support: Any = d.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def over_reals(d: Distribution) -> bool:
    """Whether the support of a distribution is all real numbers, or vectors of such."""
    return isinstance(support_of_numbers(d), type(constraints.real))


def _elements(base: Distribution) -> Distribution:
    """The distribution (*batch, T) of the numbers of a vector; a ValueError unless they are independent and over the reals."""
    elements: Any = base
    while isinstance(elements, Independent):
        elements = elements.base_dist
    if elements.event_shape or not elements.batch_shape or len(base.event_shape) > 1 or not over_reals(base):
        name = type(elements).__name__
        raise ValueError(
            f"Expected a base of independent real numbers, with lengths; got {name} of event_shape {tuple(base.event_shape)} "
            f"over {base.support}."
        )
    return elements  # type: ignore[no-any-return]


def _module(name: str, part: Any, kind: Any, kinds: str) -> nn.Module:
    if not isinstance(part, (nn.Module, kind)):
        raise TypeError(f"Expected {name} to be {kinds}; got {type(part).__name__}.")
    return part if isinstance(part, nn.Module) else Constant(part)
