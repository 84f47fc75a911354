"""Parts of figures that several examples share."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from matplotlib import colormaps
from matplotlib.image import AxesImage
from torch import Tensor
from torch.nn.functional import pad


def mosaic(
    axes: plt.Axes, images: Tensor, columns: int, top: float, title: str = ""
) -> AxesImage:
    """Draws images side by side, row by row, with gaps.

    Args:
        axes: where to draw.
        images: (N, H, W), from 0 (white) to ``top`` (black), N a multiple of columns.
        columns: the number of images per row.
        top: the largest value.
        title: the title, on the left.
    """
    tiles = pad(images.cpu().unflatten(0, (-1, columns)), (0, 1, 0, 1), value=math.nan)
    picture = tiles.transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]
    cmap = colormaps["gray_r"].with_extremes(bad="lightsteelblue")
    axes.set_title(title, loc="left")
    axes.set_axis_off()
    return axes.imshow(picture, cmap=cmap, vmin=0, vmax=top)


def calibration(axes: plt.Axes, uniforms: dict[str, Tensor], independent: int) -> None:
    """Draws the empirical cdf of probability integral transforms, minus the diagonal.

    The curve of a calibrated model stays inside the grey band of Kolmogorov and
    Smirnov with a probability of 90%.

    Args:
        axes: where to draw.
        uniforms: a name for each curve, and its values F(x) in (0, 1).
        independent: the number of independent values, which sets the band's width.
    """
    band = 1.224 / math.sqrt(independent)
    axes.axhspan(-band, band, color="0.88", linewidth=0, label="90% band of chance")
    axes.axhline(0.0, color="0.5", linewidth=0.6)
    reach = band
    for name, u in uniforms.items():
        ordered = u.sort().values
        excess = (torch.arange(len(u)) + 0.5) / len(u) - ordered
        axes.plot(ordered, excess, label=name)
        reach = max(reach, excess.abs().max().item())
    axes.set(xlim=(0, 1), ylim=(-1.2 * reach, 2.0 * reach))  # space for a legend
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set(xlabel="u = F(observation)", ylabel="empirical cdf minus u")
