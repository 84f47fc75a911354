"""Heads of common families under short names, such as Normal, Categorical and Gamma."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor

from ..core.checks import check_sizes
from ..families import continuous_categorical
from .parametric import Parametric


class _OfScalars(Parametric):
    """A head of a family of scalars, independent within a site."""

    of: Any

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(self.of, shape)


class _OfVectors(Parametric):
    """A head of a family of vectors."""

    of: Any

    def __init__(self, size: int) -> None:
        check_sizes(1, size=size)
        super().__init__(self.of, (size,))


class Bernoulli(_OfScalars):
    """Values 0 and 1, with P(1) = sigmoid(l) and a predicted logit l.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> Bernoulli((88,)).num_params
        88
    """

    of = dist.Bernoulli


class Beta(_OfScalars):
    """Numbers in (0, 1) with density y^(a-1) (1 - y)^(b-1) / B(a, b) and predicted a and b.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> Beta().parameters_of
        {'concentration1': (), 'concentration0': ()}
    """

    of = dist.Beta


class Binomial(Parametric):
    """Counts 0 ... n with P(y) = C(n, y) p^y (1 - p)^(n-y) and a predicted logit of p.

    Args:
        total_count: n, a number or a tensor that broadcasts with ``shape``.
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``total_count`` or ``shape`` contains numbers that are not allowed.

    Example:
        >>> Binomial(total_count=7).parameters_of
        {'logits': ()}
    """

    def __init__(self, total_count: int | Tensor, shape: tuple[int, ...] = ()) -> None:
        super().__init__(dist.Binomial, shape, total_count=total_count)


class Categorical(Parametric):
    """Categories 0 ... V - 1 with P(y) = softmax(l)_y and predicted logits l (V,).

    Args:
        categories: V.

    Raises:
        ValueError: if ``categories`` is not a positive integer.

    Example:
        >>> Categorical(5).num_params, Categorical(5).site_shape
        (5, ())
    """

    def __init__(self, categories: int) -> None:
        check_sizes(1, categories=categories)
        super().__init__(dist.Categorical, (categories,))


class ContinuousCategorical(Parametric):
    """Points (k,) of the simplex with log density l . y - log Z and predicted logits l (k,).

    phi = 0 gives the uniform distribution. See :class:`pyro_genexact.distributions.ContinuousCategorical` for the
    normaliser Z and the reference.

    Args:
        k: the number of shares of a site, at least 2.

    Raises:
        ValueError: if ``k`` is not an integer of at least 2.

    Example:
        >>> import torch
        >>> ContinuousCategorical(3)(torch.zeros(5, 2, 3)).mean[0, 0]
        tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(self, k: int) -> None:
        check_sizes(2, k=k)
        super().__init__(continuous_categorical.ContinuousCategorical, (k,))


class Dirichlet(_OfVectors):
    """Points (k,) of the simplex with density proportional to prod_i y_i^(a_i - 1) and predicted a (k,).

    Args:
        size: k, the length of the vectors.

    Raises:
        ValueError: if ``size`` is not a positive integer.

    Example:
        >>> Dirichlet(3).parameters_of
        {'concentration': (3,)}
    """

    of = dist.Dirichlet


class Exponential(_OfScalars):
    """Positive numbers with density r exp(-r y) and a predicted rate r.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> Exponential().parameters_of
        {'rate': ()}
    """

    of = dist.Exponential


class Gamma(_OfScalars):
    """Positive numbers with density proportional to y^(a-1) exp(-r y) and predicted a and r.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> Gamma().parameters_of
        {'concentration': (), 'rate': ()}
    """

    of = dist.Gamma


class Geometric(_OfScalars):
    """Numbers of failures before the first success: P(y) = p (1 - p)^y with a predicted logit of p.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> Geometric().parameters_of
        {'logits': ()}
    """

    of = dist.Geometric


class Laplace(_OfScalars):
    """Real numbers with density exp(-|y - m| / s) / (2 s) and predicted m and s.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> Laplace().parameters_of
        {'loc': (), 'scale': ()}
    """

    of = dist.Laplace


class LogNormal(_OfScalars):
    """Positive numbers whose logarithms are normal with predicted mean and standard deviation.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> LogNormal().parameters_of
        {'loc': (), 'scale': ()}
    """

    of = dist.LogNormal


class MultivariateNormal(_OfVectors):
    """Real vectors (k,) with predicted mean and Cholesky factor of the covariance: P = k + k (k + 1) / 2.

    Args:
        size: k, the length of the vectors.

    Raises:
        ValueError: if ``size`` is not a positive integer.

    Example:
        >>> MultivariateNormal(3).num_params
        9
    """

    of = dist.MultivariateNormal


class NegativeBinomial(_OfScalars):
    """Overdispersed counts with P(y) = C(y + r - 1, y) (1 - p)^r p^y and predicted r and logit of p.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> NegativeBinomial().parameters_of
        {'total_count': (), 'logits': ()}
    """

    of = dist.NegativeBinomial


class Normal(_OfScalars):
    """Real numbers with predicted mean and standard deviation.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> import torch
        >>> Normal()(torch.zeros(4, 2)).scale
        tensor([1., 1., 1., 1.])
    """

    of = dist.Normal


class OneHotCategorical(_OfVectors):
    """One-hot vectors (k,) with predicted logits (k,).

    Args:
        size: k, the length of the vectors.

    Raises:
        ValueError: if ``size`` is not a positive integer.

    Example:
        >>> OneHotCategorical(3).parameters_of
        {'logits': (3,)}
    """

    of = dist.OneHotCategorical


class Poisson(_OfScalars):
    """Counts with P(y) = r^y exp(-r) / y! and a predicted rate r.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> Poisson().parameters_of
        {'rate': ()}
    """

    of = dist.Poisson


class StudentT(Parametric):
    """Heavy-tailed real numbers with predicted degrees of freedom, location and scale.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.
        **fixed: parameters that are not predicted, such as ``df=3.0``; see :class:`Parametric`.

    Raises:
        ValueError: if ``shape`` or a fixed parameter is not allowed.

    Example:
        >>> StudentT().parameters_of, StudentT(df=3.0).num_params
        ({'df': (), 'loc': (), 'scale': ()}, 2)
    """

    def __init__(self, shape: tuple[int, ...] = (), **fixed: Any) -> None:
        super().__init__(dist.StudentT, shape, **fixed)


class VonMises(_OfScalars):
    """Angles in [-pi, pi] with density proportional to exp(c cos(y - m)) and predicted m and c.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> VonMises().parameters_of
        {'loc': (), 'concentration': ()}
    """

    of = dist.VonMises


class ZeroInflatedPoisson(_OfScalars):
    """Counts that are 0 with probability g and else Poisson, with predicted rate and logit of g.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers.

    Example:
        >>> ZeroInflatedPoisson().parameters_of
        {'rate': (), 'gate_logits': ()}
    """

    of = dist.ZeroInflatedPoisson
