"""The figure of tagging.py."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

Curve = tuple[Tensor, Tensor, int]  # confidences, shares of right parts, parts a point


class Sentence(NamedTuple):
    """A sentence of N characters.

    Attributes:
        text, english: the sentence and its translation.
        tags: probabilities of the tags (12, N).
        begins: probabilities that a part begins (N,).
        parts: the true parts: the first character, the one after the last, the tag.
    """

    text: str
    english: str
    tags: Tensor
    begins: Tensor
    parts: list[tuple[int, int, int]]


def draw_sentence(axes: plt.Axes, sentence: Sentence, names: list[str]) -> AxesImage:
    """Marginals of a sentence, with frames around the true parts."""
    image = axes.imshow(sentence.tags, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    edges, alpha = torch.arange(len(sentence.text)) - 0.5, sentence.begins.clamp(0, 1)
    axes.vlines(edges, -0.5, len(names) - 0.5, color="C3", alpha=alpha)
    for a, b, k in sentence.parts:
        frame = {"fill": False, "linewidth": 1, "zorder": 3}
        axes.add_patch(Rectangle((a - 0.5, k - 0.5), b - a, 1, **frame))
    axes.set_xticks(range(len(sentence.text)), sentence.text)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.tick_params(length=0)
    axes.grid(False)
    return image


def draw_calibration(axes: plt.Axes, curves: dict[str, Curve]) -> None:
    """Calibration curves, and the band of two standard errors of an exact model."""
    for (name, (x, y, _)), colour in zip(curves.items(), ("C1", "C0"), strict=True):
        axes.plot(x, y, "o-", color=colour, label=name)
    size = min(size for _, _, size in curves.values())
    p = torch.linspace(0, 1, 101)
    error = 2 * (p * (1 - p) / size).sqrt()
    label = "calibrated (2 s.e.)"
    axes.fill_between(p, p - error, p + error, color="0.85", linewidth=0, label=label)
    axes.axline((0, 0), slope=1, color="black", linewidth=0.6)
    axes.set(xlabel="confidence of a part (probability)", xlim=(-0.03, 1.03))
    axes.set(ylabel="share of parts that are right", ylim=(-0.03, 1.03))
    axes.legend(loc="lower right")


def draw_counts(
    axes: plt.Axes, expected: Tensor, true: Tensor, names: list[str]
) -> AxesImage:
    """Expected numbers of pairs as colours, with the true ones in brackets."""
    norm = PowerNorm(0.5, 0, 250)
    image = axes.imshow(expected, cmap="Blues", norm=norm, aspect="auto")
    for i, j in ((expected >= 0.5) | (true > 0)).nonzero().tolist():
        text = f"{expected[i, j]:.0f} ({true[i, j]:.0f})"
        colour = "white" if expected[i, j] > 120 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(6), names[:6], fontsize=6.5)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set(xlabel="tag of the next part", ylabel="tag of a part")
    return image


def picture(
    sentences: list[Sentence],
    curves: dict[str, Curve],
    pairs: tuple[Tensor, Tensor],
    names: list[str],
    out: Path,
) -> None:
    """Marginals of two sentences, calibration, and expected numbers of pairs."""
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure = plt.figure(figsize=(7.0, 6.6))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.45, 1))
    grid = upper.add_gridspec(2, 2, width_ratios=(1, 0.02))
    for k, sentence in enumerate(sentences):
        axes = upper.add_subplot(grid[k, 0])
        image = draw_sentence(axes, sentence, names)
        axes.set_title(f"{'ab'[k]}  “{sentence.english}”", loc="left")
        if k == 0:
            handles = [Line2D([], [], color="C3"), Rectangle((0, 0), 1, 1, fill=False)]
            labels = ["a part begins", "true part"]
            place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 2}
            axes.legend(handles, labels, borderaxespad=0.1, fontsize=7, **place)
    bar = upper.add_subplot(grid[:, 1])
    upper.colorbar(image, cax=bar, label="marginal probability of a tag")
    left, right, bar = lower.subplots(1, 3, width_ratios=(1, 1.15, 0.05))
    draw_calibration(left, curves)
    left.set_title("c  Calibration, by tenths of the parts found", loc="left")
    image = draw_counts(right, *pairs, names)
    right.set_title("d  Adjacent parts of a word: expected (true)", loc="left")
    lower.colorbar(image, cax=bar, label="expected number (square root scale)")
    figure.savefig(out)
