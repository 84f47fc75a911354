"""Heads of sparse distributions, which give some values probability 0."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import constraints

from ..base import Head
from ..core.checks import check_sizes
from ..core.independent import independent
from ..families import beta_gaussian
from ..families.entmax import EntmaxCategorical as EntmaxDistribution
from ..families.entmax import checked_alpha
from .parametric import Parametric


class _Sparse(Parametric):
    """A head of real values whose own support moves with phi; the support of the head is the whole space."""

    truncates = True

    def _support(self, phi: Tensor) -> Any:
        return independent(constraints.real, len(self.site_shape))


class BetaGaussian(_Sparse):
    """Real numbers with a density on a bounded interval, whose centre and width are predicted.

    The support of the head is the real line: a value outside the interval of its site has log_prob -inf with gradient
    zero. Train it with :func:`pyro_genexact.fenchel_young_loss`, which matches the mean and the variance. phi = 0 gives
    loc 0 and scale 1. See :class:`pyro_genexact.distributions.BetaGaussian` for the density and the reference.

    Args:
        shape: the shape of a site, ``()`` or ``(k,)`` for k independent values.
        alpha: a number above 1: 2 for a parabola, 1.5 for the biweight kernel; the limit 1 is the normal distribution.

    Raises:
        ValueError: if ``shape`` contains anything but positive integers, or ``alpha`` is not above 1.

    Example:
        >>> import torch
        >>> head = BetaGaussian(alpha=1.5)
        >>> d = head(torch.zeros(4, 1, 2))
        >>> head.parameters_of, d.radius[0], d.log_prob(torch.tensor(2.0))[0]
        ({'loc': (), 'scale': ()}, tensor([1.7188]), tensor([-inf]))
    """

    def __init__(self, shape: tuple[int, ...] = (), alpha: Any = 2.0) -> None:
        super().__init__(beta_gaussian.BetaGaussian, shape, alpha=alpha)


class MultivariateBetaGaussian(_Sparse):
    """Real vectors (k,) with a density on an ellipsoid, whose centre and Cholesky factor are predicted.

    P = k + k (k + 1) / 2. See :class:`BetaGaussian` for the training, and
    :class:`pyro_genexact.distributions.MultivariateBetaGaussian` for the density.

    Args:
        size: k, the length of the vectors.
        alpha: a number above 1.

    Raises:
        ValueError: if ``size`` is not a positive integer, or ``alpha`` is not above 1.

    Example:
        >>> MultivariateBetaGaussian(3).num_params
        9
    """

    def __init__(self, size: int, alpha: Any = 2.0) -> None:
        check_sizes(1, size=size)
        super().__init__(beta_gaussian.MultivariateBetaGaussian, (size,), alpha=alpha)


class EntmaxCategorical(Head):
    """Categories 0 ... V - 1 with the entmax of predicted scores (V,) as probabilities, of which many may be exactly 0.

    Categories of probability 0 remain in the support with log_prob -inf and gradient zero. Train it with
    :func:`pyro_genexact.fenchel_young_loss`. phi = 0 gives equal probabilities. See
    :class:`pyro_genexact.distributions.EntmaxCategorical` for the probabilities and the references.

    Args:
        categories: V.
        alpha: a number above 1: 1.5, or 2 for sparsemax; the limit 1 is softmax.

    Raises:
        TypeError: if ``alpha`` is not a number.
        ValueError: if ``categories`` is not a positive integer, or ``alpha`` is not above 1.

    Example:
        >>> import torch
        >>> EntmaxCategorical(3)(torch.tensor([[2.0, 1.5, 0.0]])).probs
        tensor([[0.6740, 0.3260, 0.0000]])
    """

    truncates = True

    def __init__(self, categories: int, alpha: float = 1.5) -> None:
        super().__init__()
        check_sizes(1, categories=categories)
        self.num_params, self.alpha = categories, checked_alpha(alpha)
        self.support = constraints.integer_interval(0, categories - 1)

    def forward(self, phi: Tensor, first: int = 0) -> EntmaxDistribution:
        """Returns the distribution of batch shape (*batch, S) for phi (*batch, S, V)."""
        return EntmaxDistribution(phi, self.alpha, validate_args=False)

    def extra_repr(self) -> str:
        return f"{self.num_params}, alpha={self.alpha}"
