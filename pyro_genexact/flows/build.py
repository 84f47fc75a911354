"""Building blocks of the recipes: autoregressive, coupling, assemble, and the types of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

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


class RecipeOptions(TypedDict, total=False):
    """Options of every recipe: see :func:`maf`."""

    transforms: int
    base: Distribution | nn.Module | None
    support: Support | None
    standardize: Tensor | None


class NetworkOptions(RecipeOptions, total=False):
    """Options of the recipes with a network: see :func:`maf`."""

    hidden: Sequence[int]
    activation: Callable[[Tensor], Tensor]
    conditioner: MakeConditioner | None
    inverse: bool


def autoregressive(
    head: MakeHead,
    features: int,
    context: int = 0,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    inverse: bool = False,
    **ends: Unpack[RecipeOptions],
) -> Flow:
    """A flow of autoregressive transforms with any bijection head, in alternating orders.

    ``log_prob`` is one parallel pass a transform; ``sample`` goes feature by feature, incrementally (a small multiple),
    and inverts the head at each. With ``inverse=True`` it is the other way round.

    Args:
        head: makes a bijection head, called once a transform: a class such as ``heads.Affine``, or a function.
        features, context, hidden, activation, conditioner, inverse, ends: as in :func:`maf`.

    Raises:
        TypeError: if ``head`` or ``conditioner`` makes something else, a head of distributions too.
        ValueError: as :func:`maf`.

    Example:
        >>> import torch
        >>> from pyro_genexact import heads
        >>> flow = autoregressive(lambda: heads.Affine(bound=2.0), 3, context=2, hidden=(16,))
        >>> flow(torch.zeros(5, 2)).rsample().shape
        torch.Size([5, 3])
    """

    check_options("autoregressive", ends)

    def step(size: int) -> list[Transform | nn.Module]:
        it = new_head(head)
        check_bijection(it)
        if conditioner is None:
            net: Conditioner = MADE(
                size, it.num_params, context=context, hidden=hidden, activation=activation, direct=False
            )
        else:
            net = new_conditioner(conditioner, it.num_params, context)
        module = AutoregressiveTransform(net, it)
        return [module if inverse else module.inv]

    return assemble(step, features, **ends)


def coupling(
    head: MakeHead,
    features: int,
    context: int = 0,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    inverse: bool = False,
    **ends: Unpack[RecipeOptions],
) -> Flow:
    """A flow of coupling layers with any bijection head, which transform each half of the features in turn.

    ``log_prob`` and ``sample`` are one call of each network either way; ``sample`` inverts the heads, or with
    ``inverse=True`` it is ``log_prob`` that does. Fewer than two transforms leave features as the base made them. One
    feature alone is transformed by the context, or, without one, by free parameters.

    Args:
        head, features, context, hidden, activation, inverse, ends: as in :func:`autoregressive`.
        conditioner: in place of the network, as :class:`~pyro_genexact.transforms.Coupling` takes it.

    Raises:
        TypeError, ValueError: as :func:`autoregressive`.

    Example:
        >>> from pyro_genexact import heads
        >>> coupling(lambda: heads.Affine(bound=2.0), 5)().sample((2,)).shape
        torch.Size([2, 5])
    """
    check_options("coupling", ends)

    def step(size: int) -> list[Transform | nn.Module]:
        module = Coupling(
            size, new_head(head), context=context, hidden=hidden, activation=activation, conditioner=conditioner
        )
        return [module if inverse else module.inv]

    return assemble(step, features, **ends)


def assemble(
    step: Callable[[int], Sequence[Transform | nn.Module]],
    features: int,
    *,
    transforms: int = 3,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
) -> Flow:
    """The flow of the base, the steps, shift and scale of ``standardize``, and the way onto the support.

    Args:
        step: makes the transforms of a step, base to data, from the number of real features. Each but the first follows a
            :class:`~pyro_genexact.transforms.Reverse`.
        features, transforms, base, support, standardize: as in :func:`maf`.
    """
    check_sizes(1, features=features, transforms=transforms)
    onto = ToSupport(constraints.real if support is None else support, features)
    size = onto.inverse_shape(torch.Size([features]))[0]
    chain = [*step(size)]
    for _ in range(transforms - 1):
        chain += [Reverse(), *step(size)]
    if standardize is not None:
        chain.append(Inverse(Standardize.from_data(_unconstrained(standardize, onto))))
    if isinstance(base, Distribution) and (base.batch_shape + base.event_shape)[-1:] != (size,):
        raise ValueError(
            f"Expected base.event_shape == ({size},) (the flow's real vectors); got {tuple(base.event_shape)}."
        )
    if isinstance(base, Distribution) and not over_reals(base):
        raise ValueError(f"Expected base.support to be all real vectors; got {base.support} of {type(base).__name__}.")
    return Flow([*chain, onto], standard_normal(size) if base is None else base)


def new_head(make: MakeHead) -> Head:
    """What the callable makes; a TypeError unless it is a head."""
    it = make if isinstance(make, Head) else make()  # a head itself would be called
    if isinstance(make, Head) or not isinstance(it, Head):
        raise TypeError(f"Expected head to be a callable that makes a head; got {type(it).__name__}.")
    return it


def check_options(recipe: str, ends: RecipeOptions) -> None:
    """Raises a TypeError for options that :func:`assemble` does not have, in the name of the recipe."""
    for name in ends:
        if name not in RecipeOptions.__annotations__:
            raise TypeError(f"{recipe}() got an unexpected keyword argument {name!r}")


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
