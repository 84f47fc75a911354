"""Recipes of autoregressive flows with monotone networks and polynomials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..heads.networks import IntegratedPositive
from ..heads.polynomial import Bernstein, SumOfSquares
from ..heads.sigmoidal import DeepSigmoid
from .base import Flow
from .build import MakeConditioner, Options, Support, autoregressive_flow


def naf(
    features: int,
    context: int = 0,
    *,
    units: int = 8,
    layers: int = 1,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Neural autoregressive flow: a monotone network of sigmoids transforms each feature.

    A MADE predicts the weights of the monotone network from the earlier features and the context.

    Cost: ``log_prob`` takes one parallel pass per transform. ``sample`` also solves a one-dimensional equation
    numerically at each feature, with about 6 evaluations of the monotone network near the identity and about 20 where
    its sigmoids are steep. ``inverse=True`` swaps the two costs.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        units: units of each layer of the monotone network.
        layers: layers of the monotone network: 1 for the deep sigmoidal flow, more for the deep dense sigmoidal flow.
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
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Huang, Krueger, Lacoste, Courville, "Neural Autoregressive Flows", ICML 2018.

    Example:
        >>> naf(3, units=4, hidden=(16,))().sample((5,)).shape
        torch.Size([5, 3])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return autoregressive_flow(partial(DeepSigmoid, units, layers), features, context, options)


def umnn(
    features: int,
    context: int = 0,
    *,
    signal: int = 16,
    network: Sequence[int] = (64, 64),
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Unconstrained monotonic neural network: the integral of a positive network transforms each feature.

    Cost: ``log_prob`` computes one integral per feature, evaluating the positive network at a few dozen nodes in
    parallel. ``sample`` also solves a one-dimensional equation numerically at each feature, with about 6 integrals.
    ``inverse=True`` swaps the two costs.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        signal: how many inputs of the positive network MADE predicts for each feature, in addition to an offset.
        network: widths of the hidden layers of the positive network; all features of a transform share its weights.
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
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Wehenkel, Louppe, "Unconstrained Monotonic Neural Networks", NeurIPS 2019.

    Example:
        >>> import torch
        >>> flow = umnn(2, signal=4, network=(16,), hidden=(16,))
        >>> flow().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return autoregressive_flow(partial(IntegratedPositive, signal, network), features, context, options)


def sospf(
    features: int,
    context: int = 0,
    *,
    polynomials: int = 3,
    degree: int = 4,
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
    """Sum-of-squares polynomial flow: the integral of a sum of squared polynomials transforms each feature.

    Outside ±bound the maps are linear.

    Cost: as :func:`naf`, but each solution takes fewer and cheaper evaluations.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        polynomials: how many polynomials are squared and summed.
        degree: degree of each polynomial.
        bound: the maps are non-linear within ±bound; standardise the data so that most of them lie there.
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
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Jaini, Selby, Yu, "Sum-of-Squares Polynomial Flow", ICML 2019.

    Example:
        >>> sospf(3, degree=2, hidden=(16,))().sample((5,)).shape
        torch.Size([5, 3])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return autoregressive_flow(partial(SumOfSquares, polynomials, degree, bound), features, context, options)


def bpf(
    features: int,
    context: int = 0,
    *,
    degree: int = 16,
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
    """Bernstein polynomial flow: an increasing Bernstein polynomial transforms each feature.

    Outside ±bound the maps are linear.

    Cost: as :func:`naf`, but each solution takes fewer and cheaper evaluations.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        degree: degree of the polynomials.
        bound: the maps are non-linear within ±bound; standardise the data so that most of them lie there.
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
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    References: Sick, Hothorn, Dürr, "Deep transformation models", ICPR 2020; Arpogaus et al., "Short-Term Density
    Forecasting of Low-Voltage Load using Bernstein-Polynomial Normalizing Flows", IEEE Transactions on Smart Grid 2023.

    Example:
        >>> bpf(3, degree=8, hidden=(16,))().sample((5,)).shape
        torch.Size([5, 3])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return autoregressive_flow(partial(Bernstein, degree, bound), features, context, options)
