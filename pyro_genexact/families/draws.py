"""Samples as quantiles of uniform numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..core.independent import innermost
from ..core.values import in_every_dtype
from .cdf import quantile, univariate

_ONE = in_every_dtype(1.0)


def unchecked_icdf(d: Distribution, u: Tensor) -> Tensor:
    """Computes ``icdf`` without a check of u, and so without a wait for the device if there is a closed form."""
    return quantile(univariate(d), u)


def draws_by_quantile(d: Distribution) -> bool:
    """Whether samples of a discrete family are the quantiles of uniform numbers, since these are as fast as ``sample``."""
    return isinstance(innermost(d), (torch.distributions.Bernoulli, torch.distributions.Categorical))


def one_probability(d: Distribution) -> Tensor:
    """Returns the probability of one value, for families that :func:`draws_by_quantile`; it is NaN if a parameter is."""
    inner: Any = innermost(d)
    return inner.probs[..., 0].clone() if isinstance(inner, torch.distributions.Categorical) else inner.probs  # type: ignore[no-any-return]


@quantile.register(torch.distributions.Bernoulli)
def _(d: Any, u: Tensor) -> Tensor:
    return (_ONE[u.dtype] - u < d.probs).to(d.probs.dtype)  # accurate for small probabilities, unlike u > 1 - p


@quantile.register(torch.distributions.Categorical)
def _(d: Any, u: Tensor) -> Tensor:
    below = d.probs.to(u.dtype).cumsum(-1)
    # the sum may round to less than u; the first of the largest sums belongs to the last possible category
    return (below < torch.minimum(u.unsqueeze(-1), below[..., -1:])).sum(-1)
