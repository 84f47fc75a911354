"""Central intervals of draws, and the fan chart that shows them along one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.quantiles import quantiles
from ..core.values import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@torch.no_grad()
def central_intervals(draws: Tensor, probs: Sequence[float] = (0.5, 0.9)) -> Tensor:
    """Computes central (equal-tailed) intervals over the first dimension of draws.

    The interval of probability p goes from the quantile of (1 - p) / 2 to that of (1 + p) / 2.

    Args:
        draws: (S, *event), S at least 1, of real numbers. An element with a NaN in any draw has NaN bounds.
        probs: probabilities of the intervals, each in (0, 1].

    Returns:
        Bounds (len(probs), 2, *event), lower ones first, with the dtype of ``draws`` (float64 for integers).

    Raises:
        TypeError: if ``draws`` is not a tensor of real numbers, or ``probs`` is not a sequence.
        ValueError: if there are no draws, or if ``probs`` is empty or not in (0, 1].

    Cost: one sort of the draws.

    Example:
        >>> import torch
        >>> central_intervals(torch.arange(101.0), probs=(0.25, 0.5))
        tensor([[37.5000, 62.5000],
                [25.0000, 75.0000]])
    """
    draws = numbers("draws", draws)
    if not draws.dim() or not len(draws):
        raise ValueError(f"Expected draws of shape (S, *event), S >= 1; got {tuple(draws.shape)}.")
    draws = draws if draws.is_floating_point() else draws.double()
    single = torch.promote_types(draws.dtype, torch.float32)  # half precision has too few digits for ranks
    p = torch.tensor(_levels(probs), dtype=single, device=draws.device)
    q = torch.stack([(1 - p) / 2, (1 + p) / 2], 1)
    bounds = quantiles(draws, q.flatten()).reshape(*q.shape, *draws.shape[1:])
    return torch.where(draws.isnan().any(0), torch.nan, bounds)


def plot_fan(
    draws: Any,
    x: Any = None,
    *,
    probs: Sequence[float] = (0.5, 0.9),
    ax: Axes | None = None,
    color: str = "C0",
    label: str | None = None,
) -> Axes:
    """Plots the median and central intervals of draws along one dimension, as of a forecast or a regression curve.

    ArviZ 0.x draws one interval per call of ``plot_hdi``, and 1.x has no such function, so matplotlib draws this chart
    with either version.

    Args:
        draws: a tensor (S, T), or a DataArray of :func:`inference_data` with dims chain, draw and one more, such as
            ``data["posterior_predictive"]["y"]``.
        x: (T,), positions on the x-axis: numbers, dates or strings. Numbers and dates are sorted. By default 0 ... T - 1,
            or the coordinate of the DataArray.
        probs: probabilities of the intervals, each in (0, 1].
        ax: the axes to draw on; new ones by default. Axis labels that it has are kept.
        color: colour of the median and the intervals.
        label: name of the chart, which precedes the entries of the legend.

    Returns:
        The axes.

    Raises:
        TypeError: if ``draws`` is not a tensor of real numbers or a DataArray.
        ValueError: if ``draws`` or ``x`` have another shape, and as :func:`central_intervals`.

    Example:
        >>> import torch
        >>> ax = plot_fan(torch.randn(500, 12).cumsum(1), range(2000, 2012))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['median', 'central 50%', 'central 90%']
    """
    import matplotlib.pyplot as plt

    xlabel, ylabel = "index" if x is None else "x", "value"
    if hasattr(draws, "dims"):
        draws, at, xlabel, ylabel = _series(draws)
        x = at if x is None else x
    draws = numbers("draws", draws).detach().cpu()
    if draws.dim() != 2:
        raise ValueError(f"Expected draws of shape (S, T); got {tuple(draws.shape)}.")
    at = np.arange(draws.shape[1]) if x is None else np.asarray(x)
    if at.shape != (draws.shape[1],):
        raise ValueError(f"Expected x of shape ({draws.shape[1]},), one position for each column; got {at.shape}.")
    order = np.argsort(at, kind="stable") if at.dtype.kind in "biufM" else np.arange(len(at))
    at, draws = at[order], draws[:, torch.as_tensor(order)]
    probs = sorted(_levels(probs))
    bounds = central_intervals(draws, probs).double().numpy()
    median = np.median(draws.double().numpy(), axis=0)

    ax = plt.subplots()[1] if ax is None else ax
    before = "" if label is None else f"{label}, "
    ax.plot(at, median, color=color, label=f"{before}median")
    shades = np.linspace(0.45, 0.2, len(probs)) if len(probs) > 1 else [0.3]
    for p, (low, high), alpha in zip(probs, bounds, shades, strict=True):
        ax.fill_between(at, low, high, color=color, alpha=alpha, linewidth=0, label=f"{before}central {100 * p:g}%")
    ax.set(xlabel=ax.get_xlabel() or xlabel, ylabel=ax.get_ylabel() or ylabel)
    ax.legend()
    return ax


def _levels(probs: Any) -> list[float]:
    try:
        levels = [float(p) for p in probs]
    except (TypeError, ValueError):
        raise TypeError(f"Expected probs to be a sequence of numbers; got {probs!r}.") from None
    if not levels or not all(0 < p <= 1 for p in levels):
        raise ValueError(f"Expected probs to be one or more numbers in (0, 1]; got {probs!r}.")
    return levels


def _series(array: Any) -> tuple[Tensor, Any, str, str]:
    """Draws (S, T) of a DataArray, its coordinate (T,), and the names of its last dim and of itself."""
    rest = [dim for dim in array.dims if dim not in ("chain", "draw")]
    if len(rest) != 1 or len(array.dims) != 3:
        raise ValueError(f"Expected draws with dims chain, draw and one more; got {tuple(array.dims)}.")
    values = array.transpose("chain", "draw", *rest).values
    return torch.as_tensor(values.reshape(-1, values.shape[-1])), array[rest[0]].values, rest[0], array.name or "value"
