"""Normalising flows: a base pushed through transforms, and the recipes that build them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from . import heads
from .base import Constant, DistributionModule, check_context, check_sizes
from .conditioners import MADE
from .transforms import AutoregressiveTransform, Chain, Inverse, Reverse, Standardize, ToSupport
from .transforms.base import transform_of

Support = constraints.Constraint | Sequence[constraints.Constraint]


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


def maf(
    features: int,
    context: int = 0,
    *,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Masked autoregressive flow: affine transforms of each feature given the earlier ones, in alternating orders.

    ``log_prob`` is one parallel pass a transform; ``sample`` goes feature by feature, incrementally (a small multiple).

    Args:
        features: D, the size of the vectors.
        context: C, features of the context; 0 for none.
        transforms: how many.
        hidden: widths of the hidden layers of each MADE.
        activation: of the hidden layers, elementwise.
        base: a distribution or module over the flow's real vectors; by default standard normal.
        support: a constraint (positive, an interval, simplex), or a list of one a feature; by default the reals.
        standardize: rows (N, D) of data from which shift and scale a feature are taken, in unconstrained space.
        inverse: the other direction, see :func:`iaf`.

    Raises:
        ValueError: for sizes that are no positive integers, a discrete support, standardize rows of another width, on
            the support's boundary or constant in a feature.

    Reference: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation", NeurIPS 2017.

    Example:
        >>> flow = maf(3, context=2, transforms=2, hidden=(16,))
        >>> flow(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    check_sizes(1, features=features, transforms=transforms)
    onto = ToSupport(constraints.real if support is None else support, features)
    size = onto.inverse_shape(torch.Size([features]))[0]
    head = heads.Affine()
    chain: list[Transform | nn.Module] = []
    for index in range(transforms):
        net = MADE(size, head.num_params, context=context, hidden=hidden, activation=activation)
        step = AutoregressiveTransform(net, head)
        chain += [*([Reverse()] if index else []), step if inverse else step.inv]
    if standardize is not None:
        rows = _unconstrained(standardize, onto)
        chain.append(Inverse(Standardize.from_data(rows)))
    if isinstance(base, Distribution) and (base.batch_shape + base.event_shape)[-1:] != (size,):
        raise ValueError(
            f"Expected base.event_shape == ({size},) (the flow's real vectors); got {tuple(base.event_shape)}."
        )
    normal = dist.Normal(torch.zeros(size), torch.ones(size)).to_event(1)
    return Flow([*chain, onto], normal if base is None else base)


def iaf(features: int, context: int = 0, **options: object) -> Flow:
    """Inverse autoregressive flow: :func:`maf` with ``inverse=True``.

    ``sample``, and the score of a sample, is one parallel pass a transform; ``log_prob`` of other values goes feature by
    feature. The choice for guides.

    Args:
        features, context, options: those of :func:`maf`.

    Reference: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016.

    Example:
        >>> q = iaf(8, context=32)(torch.zeros(5, 32))
        >>> q.rsample().shape
        torch.Size([5, 8])
    """
    return maf(features, context, inverse=True, **options)  # type: ignore[arg-type]


def _module(name: str, part: Any, kind: Any, kinds: str) -> nn.Module:
    if not isinstance(part, (nn.Module, kind)):
        raise TypeError(f"Expected {name} to be {kinds}; got {type(part).__name__}.")
    return part if isinstance(part, nn.Module) else Constant(part)


def _unconstrained(rows: Tensor, onto: ToSupport) -> Tensor:
    """The rows in unconstrained space; ValueError for rows outside the support."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"Expected standardize to be a tensor; got {type(rows).__name__}.")
    if rows.dim() != 2 or rows.shape[1] != onto.features:
        raise ValueError(f"Expected standardize.shape[1:] == ({onto.features},) (features); got {tuple(rows.shape)}.")
    outside = ~onto.contains(rows)
    if outside.any():
        raise ValueError(
            f"Expected standardize to hold finite rows inside the support; got others at rows {outside.nonzero()[:5, 0].tolist()}."
        )
    return onto.bijection.inv(rows)
