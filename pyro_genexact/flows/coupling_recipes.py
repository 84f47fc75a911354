"""Recipes of coupling flows, each a few lines of :func:`coupling` or :func:`assemble`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from ..heads.bijections import Affine, Shift
from ..heads.spline import RationalQuadraticSpline
from ..transforms.coupling import Coupling
from ..transforms.matrices import LULinear
from ..transforms.modules import Inverse
from .base import Flow
from .build import (
    MakeConditioner,
    NetworkOptions,
    RecipeOptions,
    assemble,
    check_options,
    coupling,
)


def realnvp(features: int, context: int = 0, **options: Unpack[NetworkOptions]) -> Flow:
    """RealNVP: affine maps of half of the features given the other half, in turn.

    Cost: one call of each network for ``log_prob`` and for ``sample``.

    Args:
        features, context, options: those of :func:`maf`; ``conditioner`` as :func:`coupling` takes it.

    Reference: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017.

    Example:
        >>> import torch
        >>> realnvp(5, context=2)(torch.zeros(3, 2)).rsample().shape
        torch.Size([3, 5])
    """
    return coupling(Affine, features, context, **options)


def coupling_nsf(
    features: int, context: int = 0, *, bins: int = 8, bound: float = 5.0, **options: Unpack[NetworkOptions]
) -> Flow:
    """Neural spline flow of coupling layers: splines of half of the features given the other half, in turn.

    Cost: one call of each network for ``log_prob`` and for ``sample``.

    Args:
        features, context, options: those of :func:`maf`; ``conditioner`` as :func:`coupling` takes it.
        bins, bound: as in :func:`nsf`.

    Reference: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", NeurIPS 2019.

    Example:
        >>> coupling_nsf(5, bins=4)().sample((3,)).shape
        torch.Size([3, 5])
    """
    return coupling(partial(RationalQuadraticSpline, bins, bound), features, context, **options)


def nice(features: int, context: int = 0, **options: Unpack[NetworkOptions]) -> Flow:
    """NICE: shifts of half of the features given the other half, in turn, and one learned scale a feature.

    Cost: one call of each network for ``log_prob`` and for ``sample``; no transform but the scale changes volumes.

    Args:
        features, context, options: those of :func:`maf`; ``conditioner`` as :func:`coupling` takes it.

    Reference: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", ICLR workshop 2015.

    Example:
        >>> nice(5)().sample((3,)).shape
        torch.Size([3, 5])
    """
    flow = coupling(Shift, features, context, **options)
    scale = Diagonal(flow.transforms[-1].value.inverse_shape(torch.Size([features]))[0])  # type: ignore[union-attr, operator]
    return Flow([scale, *flow.transforms], flow.base)


def glow_vector(
    features: int,
    context: int = 0,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    inverse: bool = False,
    **ends: Unpack[RecipeOptions],
) -> Flow:
    """Glow for vectors: each step is a learned scale and shift a feature, an LU linear map and an affine coupling.

    Scales start at 1, linear maps at the identity: give ``standardize``, whose rows set the scales of the data. Cost: one
    call of each network for ``log_prob`` and for ``sample``, of which one solves two triangular systems of size D as well.

    Args:
        features, context, hidden, activation, inverse: as in :func:`maf`.
        conditioner: as :func:`coupling` takes it.
        ends: ``transforms``, ``base``, ``support`` and ``standardize`` of :func:`maf`.

    Reference: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018.

    Example:
        >>> glow_vector(5)().sample((3,)).shape
        torch.Size([3, 5])
    """
    check_options("glow_vector", ends)

    def step(size: int) -> list[Transform | nn.Module]:
        couple = Coupling(
            size, Affine(), context=context, hidden=hidden, activation=activation, conditioner=conditioner
        )
        parts: list[Any] = [Diagonal(size), LULinear(size), couple]
        return parts if inverse else [Inverse(part) for part in reversed(parts)]

    return assemble(step, features, **ends)


class Diagonal(nn.Module):
    """A learned shift and scale of each feature, as a module: its call returns the affine transform x -> y.

    Args:
        features: D.

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
