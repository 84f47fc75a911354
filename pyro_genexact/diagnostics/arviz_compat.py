"""Calls that differ between ArviZ 0.x and 1.x. ArviZ is imported only when one of them is used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def psislw(log_ratios: Tensor) -> tuple[Tensor, float]:
    """Returns smoothed and normalised log-weights (S,), and k-hat."""
    import arviz

    ratios = log_ratios.detach().double().cpu().numpy().copy()
    if hasattr(arviz, "psislw"):
        log_weights, khat = arviz.psislw(ratios)
    else:
        from arviz_stats.base import array_stats

        # takes log-likelihoods, which are the negative log-ratios of leave-one-out
        log_weights, khat = array_stats.psislw(-ratios)
    weights = torch.as_tensor(log_weights, device=log_ratios.device)
    return weights - weights.logsumexp(0), float(khat)


def from_groups(groups: Mapping[str, Mapping[str, Any]], **options: Any) -> Any:
    """Returns an ``InferenceData`` of ArviZ 0.x or a ``DataTree`` of 1.x."""
    import arviz

    from_dict: Any = arviz.from_dict
    by_name = "posterior" in inspect.signature(from_dict).parameters
    return from_dict(**groups, **options) if by_name else from_dict(groups, **options)


def plot_uniformity(uniforms: Mapping[str, Tensor], xlabel: str, ylabel: str, **options: Any) -> Any:
    """Plots ECDFs minus the uniform cdf, with simultaneous bands in ArviZ 0.x and a test of uniformity in 1.x."""
    import arviz

    arrays = {name: u.detach().double().flatten().cpu().numpy() for name, u in uniforms.items()}
    if hasattr(arviz, "plot_ecdf_pit"):
        groups = {"prior_sbc": {name: u[None] for name, u in arrays.items()}}
        visuals = {"xlabel": {"text": xlabel}, "ylabel": {"text": ylabel}} | options.pop("visuals", {})
        return arviz.plot_ecdf_pit(from_groups(groups), var_names=list(arrays), visuals=visuals, **options)
    import matplotlib.pyplot as plt
    from arviz.rcparams import rcParams

    shown: dict[str, Any] = {
        "eval_points": np.linspace(0, 1, 101),
        "cdf": lambda x: np.clip(x, 0, 1),
        "difference": True,
        "confidence_bands": "optimized",
        "ci_prob": rcParams["stats.ci_prob"],
    } | options
    kind = "pointwise" if shown["confidence_bands"] == "pointwise" else "simultaneous"
    band = {"label": f"{100 * shown['ci_prob']:g}% {kind} band of uniform samples"}
    shown["fill_kwargs"] = band | (shown.get("fill_kwargs") or {})

    columns = len(arrays) if len(arrays) <= 3 else 2
    rows = -(-len(arrays) // columns)
    size = (min(4 * columns, 8), 2.6 * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    axes = grid.flatten()[: len(arrays)]
    for ax, (name, u) in zip(axes, arrays.items(), strict=True):
        arviz.plot_ecdf(u, ax=ax, **shown)
        ax.set_title(name)
        ax.set_xlabel(xlabel, size="small")
    for ax in grid[:, 0]:
        ax.set_ylabel(ylabel, size="small")
    for ax in grid.flatten()[len(arrays) :]:
        ax.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", fontsize="small")
    return axes
