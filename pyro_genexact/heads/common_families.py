"""Short names of Parametric heads: Normal, Categorical, Gamma, ... as classes."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor

from ..core.checks import check_sizes
from ..families import continuous_categorical
from .parametric import Parametric


class _OfScalars(Parametric):
    """Of a family of scalars: independent ones at each site."""

    of: Any

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(self.of, shape)


class _OfVectors(Parametric):
    """Of a family of vectors."""

    of: Any

    def __init__(self, size: int) -> None:
        check_sizes(1, size=size)
        super().__init__(self.of, (size,))


class Bernoulli(_OfScalars):
    """0 or 1, by logits.

    Example:
        >>> Bernoulli((88,)).num_params
        88
    """

    of = dist.Bernoulli


class Beta(_OfScalars):
    """Numbers in [0, 1], by two concentrations."""

    of = dist.Beta


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


class ContinuousCategorical(Parametric):
    """Sites (k,) on the simplex with a log-linear density: phi (*batch, S, k) are the logits, and phi = 0 is uniform.

    See :class:`pyro_genexact.distributions.ContinuousCategorical` for the density and its reference.

    Args:
        k: the number of shares of a site, at least 2.

    Raises:
        ValueError: for fewer than two.

    Example:
        >>> import torch
        >>> ContinuousCategorical(3)(torch.zeros(5, 2, 3)).mean[0, 0]
        tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(self, k: int) -> None:
        check_sizes(2, k=k)
        super().__init__(continuous_categorical.ContinuousCategorical, (k,))


class Dirichlet(_OfVectors):
    """Points (k,) of the simplex, by concentrations."""

    of = dist.Dirichlet


class Exponential(_OfScalars):
    """Positive numbers, by their rate."""

    of = dist.Exponential


class Gamma(_OfScalars):
    """Positive numbers, by concentration and rate."""

    of = dist.Gamma


class Geometric(_OfScalars):
    """Counts of failures before the first success, by logits."""

    of = dist.Geometric


class Laplace(_OfScalars):
    """Real numbers, by location and scale."""

    of = dist.Laplace


class LogNormal(_OfScalars):
    """Positive numbers, by location and scale of their logarithm."""

    of = dist.LogNormal


class MultivariateNormal(_OfVectors):
    """Real vectors (k,), by mean and Cholesky factor: k + k(k+1)/2 numbers.

    Example:
        >>> MultivariateNormal(3).num_params
        9
    """

    of = dist.MultivariateNormal


class NegativeBinomial(_OfScalars):
    """Overdispersed counts, by total count and logits."""

    of = dist.NegativeBinomial


class Normal(_OfScalars):
    """Real numbers, by mean and standard deviation.

    Example:
        >>> import torch
        >>> Normal()(torch.zeros(4, 2)).scale
        tensor([1., 1., 1., 1.])
    """

    of = dist.Normal


class OneHotCategorical(_OfVectors):
    """One-hot vectors (k,), by logits."""

    of = dist.OneHotCategorical


class Poisson(_OfScalars):
    """Counts, by their rate."""

    of = dist.Poisson


class StudentT(Parametric):
    """Heavy-tailed real numbers, by degrees of freedom (unless ``df=`` is fixed), location and scale."""

    def __init__(self, shape: tuple[int, ...] = (), **fixed: Any) -> None:
        super().__init__(dist.StudentT, shape, **fixed)


class VonMises(_OfScalars):
    """Angles in [-pi, pi], by location and concentration."""

    of = dist.VonMises


class ZeroInflatedPoisson(_OfScalars):
    """Counts with more zeros, by rate and logit of the extra zeros."""

    of = dist.ZeroInflatedPoisson
