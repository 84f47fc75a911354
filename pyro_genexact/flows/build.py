"""Shared code of the recipes: autoregressive and coupling flows with any bijection head, and their assembly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from ..base import Conditioner, Head
from ..conditioners.encoding import new_conditioner
from ..conditioners.made import MADE
from ..core.checks import check_sizes
from ..transforms.autoregressive import AutoregressiveTransform
from ..transforms.coupling import Coupling, check_bijection
from ..transforms.linear import Reverse, Standardize
from ..transforms.modules import Inverse
from ..transforms.support import ToSupport
from .base import Flow, over_reals, standard_normal

Support = constraints.Constraint | Sequence[constraints.Constraint]
MakeHead = Callable[[], Head]
MakeConditioner = Callable[[int, int], Conditioner]


class Options(NamedTuple):
    """The options that all recipes with a network share; :func:`maf` documents them."""

    transforms: int
    hidden: Sequence[int]
    activation: Callable[[Tensor], Tensor]
    conditioner: MakeConditioner | None
    base: Distribution | nn.Module | None
    support: Support | None
    standardize: Tensor | None
    inverse: bool


def autoregressive(
    head: MakeHead,
    features: int,
    context: int = 0,
    *,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Autoregressive flow with any bijection head; the order of the features is reversed between transforms.

    Cost: ``log_prob`` takes one parallel network pass per transform. ``sample`` evaluates the networks feature by
    feature and inverts the head at each feature, which costs a small multiple of one pass. ``inverse=True`` swaps the
    two costs.

    Args:
        head: callable that returns a new bijection head, called once per transform: a class such as ``heads.Affine``,
            or a function.
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        transforms: the number of transforms.
        hidden: widths of the hidden layers of each MADE.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the network to use in place of MADE, see :func:`maf`.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.
        inverse: if True, ``sample`` is the parallel direction, see :func:`iaf`.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: if ``head`` does not return a bijection head, or ``conditioner`` does not return a conditioner.
        ValueError: as :func:`maf`.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> flow = autoregressive(lambda: heads.Affine(bound=2.0), 3, context=2)
        >>> flow(torch.zeros(5, 2)).rsample().shape
        torch.Size([5, 3])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return autoregressive_flow(head, features, context, options)


def autoregressive_flow(head: MakeHead, features: int, context: int, options: Options) -> Flow:
    """:func:`autoregressive` with its options in one tuple."""

    def step(size: int) -> list[Transform | nn.Module]:
        it = new_head(head)
        check_bijection(it)
        if options.conditioner is None:
            net: Conditioner = MADE(
                size,
                it.num_params,
                context=context,
                hidden=options.hidden,
                activation=options.activation,
                direct=False,
            )
        else:
            net = new_conditioner(options.conditioner, it.num_params, context)
        module = AutoregressiveTransform(net, it)
        return [module if options.inverse else module.inv]

    return assemble(step, features, options.transforms, options.base, options.support, options.standardize)


def coupling(
    head: MakeHead,
    features: int,
    context: int = 0,
    *,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Flow of coupling layers with any bijection head; the layers transform the two halves of the features in turn.

    Cost: one call of each network for ``log_prob`` and for ``sample``. ``sample`` also inverts the heads; with
    ``inverse=True``, ``log_prob`` does.

    Use at least two transforms: a single one leaves one half of the features as the base samples them. If D is 1, the
    context determines the transform, or free parameters do if there is no context.

    Args:
        head: callable that returns a new bijection head, called once per transform: a class such as ``heads.Affine``,
            or a function.
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        transforms: the number of coupling layers.
        hidden: widths of the hidden layers of each network.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the network of a layer, see
            :class:`~pyro_genexact.transforms.Coupling`.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.
        inverse: if True, ``sample`` evaluates the heads and ``log_prob`` inverts them.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Example:
        >>> from pyro_genexact import heads
        >>> coupling(lambda: heads.Affine(bound=2.0), 5)().sample((2,)).shape
        torch.Size([2, 5])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return coupling_flow(head, features, context, options)


def coupling_flow(head: MakeHead, features: int, context: int, options: Options) -> Flow:
    """:func:`coupling` with its options in one tuple."""

    def step(size: int) -> list[Transform | nn.Module]:
        module = Coupling(
            size,
            new_head(head),
            context=context,
            hidden=options.hidden,
            activation=options.activation,
            conditioner=options.conditioner,
        )
        return [module if options.inverse else module.inv]

    return assemble(step, features, options.transforms, options.base, options.support, options.standardize)


def assemble(
    step: Callable[[int], Sequence[Transform | nn.Module]],
    features: int,
    transforms: int,
    base: Distribution | nn.Module | None,
    support: Support | None,
    standardize: Tensor | None,
) -> Flow:
    """Returns the flow of the base, the steps, the scale of the data and the map onto the support.

    Args:
        step: callable that returns the transforms of one step, ordered from base to data, given the number of real
            features. :class:`~pyro_genexact.transforms.Reverse` separates the steps.
        features: D, the size of the vectors.
        transforms: the number of steps.
        base: as in :func:`maf`.
        support: as in :func:`maf`.
        standardize: as in :func:`maf`.
    """
    check_sizes(1, features=features, transforms=transforms)

    def chain(shape: torch.Size) -> list[Transform | nn.Module]:
        parts = [*step(shape[0])]
        for _ in range(transforms - 1):
            parts += [Reverse(), *step(shape[0])]
        return parts

    return completed(chain, features, base, support, standardize)


def completed(
    make: Callable[[torch.Size], list[Transform | nn.Module]],
    features: int | tuple[int, ...],
    base: Distribution | nn.Module | None,
    support: Support | None,
    standardize: Tensor | None,
) -> Flow:
    """Returns the flow of the base, a chain, the scale of the data and the map onto the support.

    Args:
        make: callable that returns the transforms, ordered from base to data, given the shape of the real events.
        features: the size of the vectors, or the shape of images.
        base: as in :func:`maf`.
        support: as in :func:`maf`.
        standardize: as in :func:`maf`.
    """
    onto = ToSupport(constraints.real if support is None else support, features)
    shape = onto.inverse_shape(torch.Size(onto.shape))
    chain = make(shape)
    if standardize is not None:
        chain.append(Inverse(Standardize.from_data(_unconstrained(standardize, onto))))
    if isinstance(base, Distribution) and (base.batch_shape + base.event_shape)[-len(shape) :] != shape:
        raise ValueError(
            f"Expected base.event_shape == {tuple(shape)} (the flow's real events); got {tuple(base.event_shape)}."
        )
    if isinstance(base, Distribution) and not over_reals(base):
        raise ValueError(f"Expected base.support to be all real vectors; got {base.support} of {type(base).__name__}.")
    return Flow([*chain, onto], standard_normal(*shape) if base is None else base)


def new_head(make: Callable[..., Head], *arguments: Any) -> Head:
    """Returns the head that the callable makes of the arguments.

    Raises:
        TypeError: if it makes something else, or is itself a head.
    """
    it = make if isinstance(make, Head) else make(*arguments)  # heads are callable, too
    if isinstance(make, Head) or not isinstance(it, Head):
        raise TypeError(f"Expected head to be a callable that makes a head; got {type(it).__name__}.")
    return it


def _unconstrained(rows: Tensor, onto: ToSupport) -> Tensor:
    """Maps data (N, *event) to unconstrained space.

    Raises:
        TypeError: if ``rows`` is not a tensor.
        ValueError: if ``rows`` has another shape, or rows outside the support.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"Expected standardize to be a tensor; got {type(rows).__name__}.")
    if not rows.dim() or tuple(rows.shape[1:]) != onto.shape:
        raise ValueError(f"Expected standardize.shape[1:] == {onto.shape} (features); got {tuple(rows.shape)}.")
    outside = ~onto.contains(rows)
    if outside.any():
        rows_outside = outside.nonzero()[:5, 0].tolist()
        raise ValueError(
            f"Expected standardize to hold finite rows inside the support; got values outside it at rows {rows_outside}."
        )
    return onto.bijection.inv(rows)
