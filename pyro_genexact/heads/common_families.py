"""Short names of Parametric heads: Normal, Categorical, Gamma, ... as classes."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor

from ..core.checks import check_sizes
from .parametric import Parametric


class Bernoulli(Parametric):
    """0 or 1, by logits.

    Example:
        >>> Bernoulli((88,)).num_params
        88
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Bernoulli, shape)


class Beta(Parametric):
    """Numbers in [0, 1], by two concentrations."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Beta, shape)


class Binomial(Parametric):
    """Counts of 0 to ``total_count``, by logits."""

    def __init__(self, total_count: int | Tensor, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Binomial, shape, total_count=total_count)


class Categorical(Parametric):
    """One of V categories, by logits.

    Example:
        >>> Categorical(5).num_params, Categorical(5).site_shape
        (5, ())
    """

    def __init__(self, categories: int) -> None:
        check_sizes(1, categories=categories)
        super().__init__(dist.Categorical, (categories,))


class Dirichlet(Parametric):
    """Points (k,) of the simplex, by concentrations."""

    def __init__(self, size: int) -> None:
        check_sizes(1, size=size)
        super().__init__(dist.Dirichlet, (size,))


class Exponential(Parametric):
    """Positive numbers, by their rate."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Exponential, shape)


class Gamma(Parametric):
    """Positive numbers, by concentration and rate."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Gamma, shape)


class Geometric(Parametric):
    """Counts of failures before the first success, by logits."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Geometric, shape)


class Laplace(Parametric):
    """Real numbers, by location and scale."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Laplace, shape)


class LogNormal(Parametric):
    """Positive numbers, by location and scale of their logarithm."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.LogNormal, shape)


class MultivariateNormal(Parametric):
    """Real vectors (k,), by mean and Cholesky factor: k + k(k+1)/2 numbers.

    Example:
        >>> MultivariateNormal(3).num_params
        9
    """

    def __init__(self, size: int) -> None:
        check_sizes(1, size=size)
        super().__init__(dist.MultivariateNormal, (size,))


class NegativeBinomial(Parametric):
    """Overdispersed counts, by total count and logits."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.NegativeBinomial, shape)


class Normal(Parametric):
    """Real numbers, by mean and standard deviation.

    Example:
        >>> import torch
        >>> Normal()(torch.zeros(4, 2)).scale
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Normal, shape)


class OneHotCategorical(Parametric):
    """One-hot vectors (k,), by logits."""

    def __init__(self, size: int) -> None:
        check_sizes(1, size=size)
        super().__init__(dist.OneHotCategorical, (size,))


class Poisson(Parametric):
    """Counts, by their rate."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Poisson, shape)


class StudentT(Parametric):
    """Heavy-tailed real numbers, by degrees of freedom (unless ``df=`` is fixed), location and scale."""

    def __init__(self, shape: tuple[int, ...] = (), **fixed: Any) -> None:
        super().__init__(dist.StudentT, shape, **fixed)


class VonMises(Parametric):
    """Angles in [-pi, pi], by location and concentration."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.VonMises, shape)


class ZeroInflatedPoisson(Parametric):
    """Counts with more zeros, by rate and logit of the extra zeros."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.ZeroInflatedPoisson, shape)
