"""Recipes of coupling flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from ..heads.bijections import Affine, Shift
from ..heads.spline import RationalQuadraticSpline
from ..transforms.coupling import Coupling
from ..transforms.matrices import LULinear
from ..transforms.modules import Inverse
from .base import Flow
from .build import MakeConditioner, Options, Support, assemble, coupling_flow


def realnvp(
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
    """RealNVP: affine maps of one half of the features given the other half, in turn.

    Cost: one call of each network for ``log_prob`` and for ``sample``.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        transforms: the number of coupling layers.
        hidden: widths of the hidden layers of each network.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the network of a layer, see :func:`coupling`.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.
        inverse: if True, swaps the directions of the transforms.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017.

    Example:
        >>> import torch
        >>> realnvp(5, context=2)(torch.zeros(3, 2)).rsample().shape
        torch.Size([3, 5])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return coupling_flow(Affine, features, context, options)


def coupling_nsf(
    features: int,
    context: int = 0,
    *,
    bins: int = 8,
    bound: float = 5.0,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Neural spline flow of coupling layers: monotone splines of one half of the features given the other half, in turn.

    Cost: one call of each network for ``log_prob`` and for ``sample``.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        bins: the number of bins of each spline.
        bound: the splines are non-linear within ±bound; standardise the data so that most of them lie there.
        transforms: the number of coupling layers.
        hidden: widths of the hidden layers of each network.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the network of a layer, see :func:`coupling`.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.
        inverse: if True, swaps the directions of the transforms.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", NeurIPS 2019.

    Example:
        >>> coupling_nsf(5, bins=4)().sample((3,)).shape
        torch.Size([3, 5])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return coupling_flow(partial(RationalQuadraticSpline, bins, bound), features, context, options)


def nice(
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
    """NICE: shifts of one half of the features given the other half, in turn, and a learned scale of each feature.

    Only the scale changes volumes: the shifts have log-determinant 0.

    Cost: one call of each network for ``log_prob`` and for ``sample``.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        transforms: the number of coupling layers.
        hidden: widths of the hidden layers of each network.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the network of a layer, see :func:`coupling`.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.
        inverse: if True, swaps the directions of the transforms.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", ICLR workshop 2015.

    Example:
        >>> nice(5)().sample((3,)).shape
        torch.Size([3, 5])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    flow = coupling_flow(Shift, features, context, options)
    scale = Diagonal(flow.transforms[-1].value.inverse_shape(torch.Size([features]))[0])  # type: ignore[union-attr, operator]
    return Flow([scale, *flow.transforms], flow.base)


def glow_vector(
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
    """Glow for vectors: each step applies a learned scale and shift, an LU linear map and an affine coupling.

    The scales start at 1 and the linear maps at the identity. Pass ``standardize`` so that the flow starts at the scale
    of the data.

    Cost: one call of each network for ``log_prob`` and for ``sample``. One of the two directions also solves two
    triangular systems of size D per step.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        transforms: the number of steps.
        hidden: widths of the hidden layers of each network.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the network of a layer, see :func:`coupling`.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.
        inverse: if True, swaps the directions of the transforms.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018.

    Example:
        >>> glow_vector(5)().sample((3,)).shape
        torch.Size([3, 5])
    """

    def step(size: int) -> list[Transform | nn.Module]:
        couple = Coupling(
            size, Affine(), context=context, hidden=hidden, activation=activation, conditioner=conditioner
        )
        parts: list[Any] = [Diagonal(size), LULinear(size), couple]
        return parts if inverse else [Inverse(part) for part in reversed(parts)]

    return assemble(step, features, transforms, base, support, standardize)


class Diagonal(nn.Module):
    """Learned shift and scale of each feature: its call returns an affine transform.

    Args:
        features: D, the size of the vectors.

    Example:
        >>> import torch
        >>> Diagonal(3)()(torch.ones(3))
        tensor([1., 1., 1.], grad_fn=<AddcmulBackward0>)
    """

    context = 0

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(features)) for _ in range(2))
        self.head = Affine()

    def forward(self) -> Transform:
        return self.head(torch.stack([self.shift, self.log_scale], -1))
