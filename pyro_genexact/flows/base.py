"""Flow: a module whose call returns a transformed base distribution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform, constraints

from ..base import Constant, DistributionModule
from ..contexts import PaddedSequence, checked_source
from ..core.independent import to_event
from ..core.lengths import checked_lengths, site_mask
from ..numerics.fixed_point import FixedPoint, Solver
from ..transforms.base import Chain
from ..transforms.modules import result_of, takes_solver, transform_of
from ..transforms.prefixes import Prefixes
from .transformed import TransformedDistribution


class Flow(DistributionModule):
    """Normalising flow: a base distribution under transforms, log p(y) = log p_base(x) - log|det dy/dx|.

    Its call returns a :class:`~pyro_genexact.distributions.TransformedDistribution` over vectors (D,), a subclass of
    Pyro's. The batch shape is that of the base, broadcast with those of the context and the lengths; each row gets
    independent noise. The distribution has a single transform, the :class:`~pyro_genexact.transforms.Chain` of all
    transforms, which caches its last value: scoring a sample that was just drawn does not run the networks again.

    The last transform should be :class:`~pyro_genexact.transforms.ToSupport`, as in the recipes; then the support
    excludes infinite values.

    With ``lengths`` in the call, a row of length n has the density of its first n sites, as a flow of n features with
    the same weights. Later sites are padding: ``log_prob`` ignores their values, their gradients are zero, and samples
    are 0 there. This requires transforms whose first n outputs depend only on the first n inputs, see
    :class:`~pyro_genexact.transforms.Prefixes`.

    Args:
        transforms: transforms, modules that are transforms, or modules whose call returns a transform, ordered from the
            base to the data.
        base: a distribution over vectors, or a module whose call returns one. The tensors of a distribution follow the
            module's device and dtype and are saved with it. Put learned parameters in a :class:`DistributionModule`.

    Raises:
        TypeError: if a part is neither a transform (distribution) nor a module.
        ValueError: if there is no transform, or parts expect contexts of different widths. In calls with lengths: if
            they are outside 0 ... T, the transforms mix all sites, or the base is not elementwise over the reals. In
            calls with source_lengths: if they are outside 0 ... S, or there is no source.

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
            raise ValueError("Expected transforms to hold at least one transform; got an empty sequence.")
        self.transforms = nn.ModuleList(
            _module("transforms", t, Transform, "transforms or modules") for t in transforms
        )
        self.base = _module("base", base, Distribution, "a distribution or a module")
        widths = {width for part in (*self.transforms, self.base) if (width := getattr(part, "context", 0))}
        if len(widths) > 1:
            raise ValueError(f"Expected transforms and base with the same context; got {sorted(widths, key=str)}.")
        self.context = max(widths, default=0)

    def forward(
        self,
        context: Tensor | PaddedSequence | None = None,
        lengths: Tensor | None = None,
        source_lengths: Tensor | None = None,
        solver: Solver = None,
    ) -> TransformedDistribution:
        """Returns the distribution.

        Args:
            context: the context (*batch, C), covariates (*batch, T, C) or a source (*batch, S, C); also a
                ``PaddedSequence``, which holds a source and its lengths.
            lengths: integers (*batch), the number of sites of each row; by default D.
            source_lengths: integers (*batch), the number of steps of each row's source; by default S.
            solver: how the autoregressive transforms compute their sequential direction: None or "sequential" for a
                loop over the sites, "fixed_point" or a :class:`~pyro_genexact.numerics.FixedPoint` for passes over all
                sites. ``passes`` of the distribution is then the number of passes of each.

        Raises:
            ValueError: for another ``solver``, or one for a flow without an
                :class:`~pyro_genexact.transforms.AutoregressiveTransform`.
        """
        base, parts = self.parts(context, source_lengths, solver)
        if lengths is None:
            return TransformedDistribution(to_event(base), [Chain(parts)])
        elements = _elements(base)
        # the clone protects the distribution from later changes of the caller's tensor
        lengths = checked_lengths(lengths, elements.batch_shape[-1]).clone()
        masked = dist.MaskedDistribution(elements, site_mask(lengths, elements.batch_shape[-1])).to_event(1)
        return TransformedDistribution(to_event(masked), [Prefixes(parts, lengths)])

    def parts(self, context: Any, source_lengths: Tensor | None, solver: Solver = None) -> tuple[Any, list[Transform]]:
        """Returns the base and the transforms given the context.

        Raises:
            ValueError: if the flow was built for another kind or width of context, or if no transform takes the solver.
        """
        takers = [solver is not None and takes_solver(t) for t in self.transforms]
        if FixedPoint.of(solver) is not None and not any(takers):
            names = [type(t).__name__ for t in self.transforms]
            raise ValueError(f"Expected transforms with an AutoregressiveTransform (solver={solver!r}); got {names}.")
        context, lengths = checked_source(self, context, source_lengths)
        given = context if lengths is None else PaddedSequence(context, lengths)
        solvers = (solver if takes else None for takes in takers)
        return result_of(self.base, given), list(map(transform_of, self.transforms, repeat(given), solvers))


def standard_normal(*shape: int) -> Constant:
    """Returns the default base of the recipes, with this event shape. Its buffers are not saved."""
    zeros = torch.zeros(shape, device="cpu")
    return Constant(to_event(dist.Normal(zeros, zeros + 1), len(shape)), persistent=False)


def support_of_numbers(d: Distribution) -> Any:
    """Returns the support of a distribution, without ``Independent`` constraints around it."""
    support: Any = d.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def over_reals(d: Distribution) -> bool:
    """Returns whether the support of a distribution is all real numbers or all real vectors."""
    return isinstance(support_of_numbers(d), type(constraints.real))


def _elements(base: Distribution) -> Distribution:
    """Returns the distribution of batch shape (*batch, T) of the elements of a base over vectors.

    Raises:
        ValueError: if the elements are not independent or not over the reals.
    """
    elements: Any = base
    while isinstance(elements, Independent):
        elements = elements.base_dist
    if elements.event_shape or not elements.batch_shape or len(base.event_shape) > 1 or not over_reals(base):
        name = type(elements).__name__
        raise ValueError(
            f"Expected base to have independent real elements (lengths require it); got {name} of event_shape "
            f"{tuple(base.event_shape)} over {base.support}."
        )
    return elements  # type: ignore[no-any-return]


def _module(name: str, part: Any, kind: Any, kinds: str) -> nn.Module:
    if not isinstance(part, (nn.Module, kind)):
        raise TypeError(f"Expected {name} to be {kinds}; got {type(part).__name__}.")
    return part if isinstance(part, nn.Module) else Constant(part)
