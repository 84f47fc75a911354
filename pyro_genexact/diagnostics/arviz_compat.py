"""Calls that differ between ArviZ 0.x and 1.x; it is imported here only, when first needed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def psislw(log_ratios: Tensor) -> tuple[Tensor, float]:
    """Smoothed log-weights (S,) with a sum of 1, and k-hat."""
    import arviz

    ratios = log_ratios.detach().double().cpu().numpy().copy()
    if hasattr(arviz, "psislw"):
        log_weights, khat = arviz.psislw(ratios)
    else:
        from arviz_stats.base import array_stats

        log_weights, khat = array_stats.psislw(-ratios)  # which takes log-likelihoods, whose ratios are their inverses
    weights = torch.as_tensor(log_weights, device=log_ratios.device)
    return weights - weights.logsumexp(0), float(khat)


def from_groups(groups: Mapping[str, Mapping[str, Any]], **options: Any) -> Any:
    """An ``InferenceData`` of ArviZ 0.x, a ``DataTree`` of 1.x."""
    import arviz

    from_dict: Any = arviz.from_dict
    by_name = "posterior" in inspect.signature(from_dict).parameters
    return from_dict(**groups, **options) if by_name else from_dict(groups, **options)


def plot_uniformity(uniforms: Mapping[str, Tensor], **options: Any) -> Any:
    """The empirical distribution functions less that of the uniform, with simultaneous bands."""
    import arviz

    arrays = {name: u.detach().double().flatten().cpu().numpy() for name, u in uniforms.items()}
    if hasattr(arviz, "plot_ecdf_pit"):
        groups = {"prior_sbc": {name: u[None] for name, u in arrays.items()}}
        return arviz.plot_ecdf_pit(from_groups(groups), var_names=list(arrays), **options)
    import matplotlib.pyplot as plt

    shown: dict[str, Any] = {
        "eval_points": np.linspace(0, 1, 101),
        "cdf": lambda x: np.clip(x, 0, 1),
        "difference": True,
        "confidence_bands": "optimized",
    }

    size = (min(2.6 * len(arrays) + 1.4, 8.0), 2.8)
    axes = plt.subplots(1, len(arrays), figsize=size, sharey=True, squeeze=False, layout="constrained")[1][0]
    for ax, (name, u) in zip(axes, arrays.items(), strict=True):
        arviz.plot_ecdf(u, ax=ax, **shown | options)
        ax.set(title=name, xlabel="value in [0, 1]")
    axes[0].set_ylabel("ECDF - uniform cdf")
    return axes
