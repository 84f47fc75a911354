"""The figure of vae.py: digits, latents and posteriors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from _plots import mosaic
from matplotlib.figure import SubFigure
from torch import Tensor

SIDE, LEVELS = 8, 17
MASSES = (0.99, 0.9, 0.5)  # of the contours


class Posterior(NamedTuple):
    """Log densities on a grid of two latents, not normalised where exact."""

    at: Tensor  # (2, S) coordinates
    exact: Tensor  # (S, S)
    guides: dict[str, Tensor]


def grid(low: Tensor, high: Tensor, size: int) -> Tensor:
    """Midpoints (2, size) of the cells of a rectangle."""
    steps = (torch.arange(size) + 0.5) / size
    return low.unsqueeze(1) + (high - low).unsqueeze(1) * steps


def contours(axes: plt.Axes, at: Tensor, log_p: Tensor, color: str) -> None:
    """Draws the highest density regions of 50, 90 and 99%."""
    p = log_p.flatten().softmax(0).view(log_p.shape)
    ranked = p.flatten().sort(descending=True).values
    mass = ranked.cumsum(0)
    levels = ranked[[int((mass < share).sum()) for share in MASSES]].unique()
    axes.contour(*at, p.T, levels=levels, colors=color, linewidths=0.9)


def planes(
    axes: plt.Axes, z: Tensor, label: Tensor, prior: dist.TorchDistribution
) -> None:
    """Draws latents (N, 2) as the digits of their images, and the prior's contours."""
    colors = matplotlib.colormaps["tab10"]
    for digit in range(10):
        style = {"s": 16, "linewidths": 0, "color": colors(digit)}
        axes.scatter(*z[label == digit].T, marker=f"${digit}$", **style)
    at = grid(z.min(0).values - 2, z.max(0).values + 2, 150)
    log_p = prior.log_prob(torch.cartesian_prod(*at))
    contours(axes, at, log_p.view(150, 150), "black")
    axes.set(xlabel="latent 1", ylabel="latent 2")


def posteriors(
    figure: SubFigure, panels: list[tuple[str, Posterior, dict[str, float]]]
) -> None:
    """Draws an image per row and a guide per column."""
    (_, first, _), *_ = panels
    grid = figure.subplots(2, len(first.guides), sharex="row", sharey="row")
    for line, (title, found, kl) in zip(grid, panels, strict=True):
        for axes, (name, log_q) in zip(line, found.guides.items(), strict=True):
            density = (found.exact - found.exact.max()).exp().T
            style = {"cmap": "Greys", "rasterized": True}
            mesh = axes.pcolormesh(*found.at, density, **style)
            contours(axes, found.at, log_q, "C3")
            style = {"transform": axes.transAxes, "fontsize": 7}
            axes.text(0.04, 0.93, f"KL {kl[name]:.2f} nats", **style)
        line[0].set_ylabel(f"{title}\nlatent 2")
    for axes, name in zip(grid[0], first.guides, strict=True):
        axes.set_title(name.replace(" ", "\n", 1))
    for axes in grid[-1]:
        axes.set_xlabel("latent 1")
    bar = figure.colorbar(mesh, ax=grid, aspect=40, ticks=[0, 0.5, 1])
    bar.set_label("exact density / its maximum")


def draw(
    samples: dict[str, Tensor],
    latents: tuple[Tensor, Tensor, dist.TorchDistribution],
    panels: list[tuple[str, Posterior, dict[str, float]]],
    out: Path,
) -> None:
    """Draws the figure.

    Args:
        samples: a title and 40 images (40, 64) for each of four panels.
        latents: two latents of each test image, its digit, and the prior.
        panels: for two images, a title, the posterior and each guide's KL in nats.
        out: the file.
    """
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    plt.rcParams["axes.grid"] = False
    figure = plt.figure(figsize=(7, 5))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 2.75))
    tops = upper.subplots(1, 4)
    for axes, letter, (title, rows) in zip(tops, "abcd", samples.items(), strict=True):
        images = rows.view(40, SIDE, SIDE)
        mosaic(axes, images, 8, LEVELS - 1, f"({letter}) {title}")
    left, right = lower.subfigures(1, 2, width_ratios=(1, 1.5))
    axes = left.subplots()
    planes(axes, *latents)
    axes.set_title("(e) two latents, MAF prior", loc="left")
    right.suptitle("(f) exact posteriors (grey) and three guides", fontsize=8.5)
    posteriors(right, panels)
    figure.savefig(out)
