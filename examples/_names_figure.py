"""The figure of names.py."""

from __future__ import annotations

import math
from pathlib import Path
from string import ascii_uppercase

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor

SYMBOLS = ["end", *ascii_uppercase]
ABOVE = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5}


def draw_name(axes: plt.Axes, name: str, probs: Tensor) -> AxesImage:
    """Probabilities of the next symbol along a name, with its own symbols in frames."""
    y = [SYMBOLS.index(symbol) for symbol in [*name, "end"]]
    own = probs[range(len(y)), y]
    norm = PowerNorm(0.5, 0, 1)
    image = axes.imshow(probs.T, cmap="Blues", norm=norm, aspect="auto")
    frame = {"fill": False, "edgecolor": "C3", "linewidth": 1}
    for t, k in enumerate(y):
        axes.add_patch(Rectangle((t - 0.5, k - 0.5), 1, 1, **frame))
    letters = zip([*name, "end"], own.tolist(), strict=True)
    labels = [f"{letter}\n{100 * p:.{int(p < 0.1)}f}" for letter, p in letters]
    axes.set_xticks(range(len(y)), labels, fontsize=6)
    axes.set_yticks(range(len(SYMBOLS)), SYMBOLS, fontsize=5.5)
    axes.set(xlabel="symbols of the name, and their probabilities (%)")
    axes.tick_params(length=0)
    axes.grid(False)
    return image


def draw_nats(axes: plt.Axes, results: dict[str, Tensor]) -> None:
    """Nats per symbol of each model, with two standard errors."""
    names = list(results)
    x = torch.stack([x.mean() for x in results.values()])
    error = torch.stack([2 * x.std() / math.sqrt(len(x)) for x in results.values()])
    colours = ["0.6"] * (len(names) - 1) + ["C0"]
    axes.errorbar(x, range(len(names)), xerr=error, fmt="none", ecolor="black")
    axes.scatter(x, range(len(names)), c=colours, s=18, zorder=3)
    for k, value in enumerate(x.tolist()):
        axes.annotate(f"{value:.3f}", (value, k), (0, 4), **ABOVE)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.6, -0.8)
    axes.set(xlabel="nats per symbol, test names", xlim=(1.9, 3.1))


def draw_log_probs(
    axes: plt.Axes, samples: Tensor, test: Tensor, marks: dict[str, float]
) -> None:
    """Log-probabilities (N) of samples and test names, and those of decisions."""
    edges = torch.arange(-50.0, -4.0).numpy()
    axes.hist(samples, edges, density=True, color="C0", alpha=0.4, label="samples")
    line = {"histtype": "step", "color": "black", "label": "test names"}
    axes.hist(test, edges, density=True, **line)
    for k, (rule, value) in enumerate(marks.items()):
        style = ("-", "--", ":", "-.")[k]
        axes.axvline(value, color=f"C{k + 1}", label=rule, linestyle=style)
    axes.set(xlabel="log-probability of a name (nats)", xlim=(-50, -5))
    axes.set(ylabel="share of names per nat")
    axes.legend(loc="upper left", fontsize=6.5)


def draw_lengths(axes: plt.Axes, model: Tensor, share: Tensor, error: Tensor) -> None:
    """Lengths of test names with two standard errors, and of the model."""
    t, line = range(len(model)), {"elinewidth": 0.7}
    axes.bar(t, share, yerr=error, color="0.8", error_kw=line, label="test names")
    axes.plot(t, model, "oC0", label="model")
    axes.set(xlabel="letters of a name", ylabel="probability", xlim=(-0.7, 15.7))
    axes.set(ylim=(0, 0.3))
    axes.legend(loc="upper right")


def picture(
    paths: dict[str, Tensor],
    results: dict[str, Tensor],
    scores: tuple[Tensor, Tensor],
    marks: dict[str, float],
    lengths: tuple[Tensor, Tensor, Tensor],
    out: Path,
) -> None:
    """Two names, nats per symbol, log-probabilities of names, and lengths."""
    plt.style.use(Path(__file__).with_name("genexact.mplstyle"))
    figure = plt.figure(figsize=(7.0, 5.8))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    *panels, bar = upper.subplots(1, 3, width_ratios=(1, 1, 0.03))
    for letter, axes, (name, probs) in zip("ab", panels, paths.items(), strict=True):
        image = draw_name(axes, name, probs)
        axes.set_title(f"{letter}  Next symbol in {name}", loc="left")
    upper.colorbar(image, cax=bar, label="probability (square root scale)")
    left, middle, right = lower.subplots(1, 3, width_ratios=(0.9, 1.3, 1))
    draw_nats(left, results)
    left.set_title("c  Models", loc="left")
    draw_log_probs(middle, *scores, marks)
    middle.set_title("d  Samples, names and decisions", loc="left")
    draw_lengths(right, *lengths)
    right.set_title("e  Lengths", loc="left")
    figure.savefig(out)
