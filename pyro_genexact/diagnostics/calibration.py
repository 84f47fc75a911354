"""Probability integral transforms, and the plot of what should be uniform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution

from ..autoregressive.site_by_site import ChainRuleDistribution
from ..families.cdf import probability_integral
from . import arviz_compat

Y_LABEL = "ECDF difference to uniform"


def pit(d: Distribution, value: Tensor) -> Tensor:
    """Computes probability integral transforms, which are independent and uniform on [0, 1] if the values come from ``d``.

    For autoregressive models and sequences, these are the conditional cdfs u_t = F_t(y_t | y_<t) in the model's order. For
    discrete sites they are randomised: u_t = F_t(y_t - 1) + v p_t(y_t) with v uniform. For univariate or elementwise
    families, they are cdfs. For flows over vectors, they are the cdfs of the base at the inverse image of the value; element
    i then belongs to *coordinate i of the base*, not to a variable of the data, so a deviation shows that the flow is wrong
    but not where. Padding is NaN.

    Use held-out rows, since rows that the model was fitted to appear better calibrated than new ones.

    Args:
        d: the distribution.
        value: (*sample, *batch, *event).

    Returns:
        A tensor with the shape of ``value``.

    Raises:
        NotImplementedError: if ``d`` has a family without a cdf, or is of another kind over vectors.

    Cost: that of ``log_prob``.

    Reference: Rosenblatt, "Remarks on a multivariate transformation", 1952; Smith, "Diagnostic checks of non-standard time
    series models", 1985.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> pit(dist.LogNormal(torch.zeros(2), 1.0).to_event(1), torch.tensor([1.0, 2.0]))
        tensor([0.5000, 0.7559])
    """
    while isinstance(d, Independent):
        d = d.base_dist
    if isinstance(d, MaskedDistribution):
        u = pit(d.base_dist, value)
        mask = torch.as_tensor(d._mask, device=u.device)
        return torch.where(mask.reshape(*mask.shape, *[1] * d.base_dist.event_dim), u, torch.nan)
    if isinstance(d, ChainRuleDistribution):
        return d.to_uniform(value)
    if isinstance(d, TransformedDistribution) and d.event_shape:
        for transform in reversed(d.transforms):
            value = transform.inv(value)
        return pit(d.base_dist, value)
    return probability_integral(d, value)


def plot_uniformity(uniforms: Mapping[str, Tensor] | Tensor, num_samples: int | None = None, **options: Any) -> Any:
    """Plots the difference between the empirical cdf (ECDF) of numbers and the cdf of the uniform distribution.

    ArviZ draws the plot. With 0.x it has a simultaneous band, which the curve of uniform numbers leaves with a probability of
    6% (``ci_prob=0.94``). ArviZ 1.x shows the p-value of a test of uniformity instead.

    Args:
        uniforms: results of :func:`pit` or :func:`sbc_ranks`, or a dict of such tensors by name, with one panel per name.
            NaN is ignored.
        num_samples: for ranks, the argument of :func:`sbc_ranks`; each rank is replaced by a random number in its interval.
        options: options of ``arviz.plot_ecdf`` (0.x) or ``arviz.plot_ecdf_pit`` (1.x).

    Returns:
        An array of axes with ArviZ 0.x, a ``PlotCollection`` with 1.x.

    Raises:
        ValueError: if there are no numbers, or numbers outside of [0, 1].

    Example:
        >>> import torch
        >>> axes = plot_uniformity({"uniform": torch.rand(100), "not": torch.rand(100) ** 2})
        >>> [ax.get_title() for ax in axes]
        ['uniform', 'not']
    """
    named = {"u": uniforms} if isinstance(uniforms, Tensor) else dict(uniforms)
    xlabel = "probability integral transform" if num_samples is None else "normalised rank"
    return arviz_compat.plot_uniformity(_uniforms(named, num_samples), xlabel, Y_LABEL, **options)


def plot_coverage(ranks: Mapping[str, Tensor] | Tensor, num_samples: int, **options: Any) -> Any:
    """Plots the expected coverage of the credible regions of :func:`tarp` minus their level.

    Regions of level a contain the true latents in a fraction a of simulations if the posterior is exact; the curve then
    seldom leaves the band of :func:`plot_uniformity`. A curve that is first above and then below the band shows a posterior
    that is too narrow, the mirror image one that is too wide, and a curve on one side a biased one.

    Args:
        ranks: results of :func:`tarp`, or a dict of them, with one panel per name.
        num_samples: the argument of :func:`tarp`.
        options: as in :func:`plot_uniformity`.

    Returns:
        As :func:`plot_uniformity`.

    Raises:
        ValueError: as :func:`plot_uniformity`.

    Example:
        >>> import torch
        >>> axes = plot_coverage(torch.randint(100, (200,)), num_samples=99)
        >>> axes[0].get_xlabel()
        'credibility level'
    """
    named = {"TARP": ranks} if isinstance(ranks, Tensor) else ranks
    labels = "credibility level", "expected coverage minus level"
    return arviz_compat.plot_uniformity(_uniforms(named, num_samples), *labels, **options)


def _uniforms(named: Mapping[str, Tensor], num_samples: int | None) -> dict[str, Tensor]:
    """Returns numbers in [0, 1] without NaN; ranks are replaced by random numbers in their intervals."""
    if num_samples is not None:
        named = {name: (r + torch.rand(r.shape, device=r.device)) / (num_samples + 1) for name, r in named.items()}
    found = {name: u[~u.isnan()] for name, u in named.items()}
    for name, u in found.items():
        if not u.numel() or not ((u >= 0) & (u <= 1)).all():
            got = f"{u.min().item()} to {u.max().item()}" if u.numel() else "none"
            raise ValueError(f"Expected numbers in [0, 1] for {name!r} (or ranks and num_samples); got {got}.")
    return found
