"""The classifier two-sample test (C2ST)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.checks import check_sizes
from ..core.random import checked_seed
from ..core.values import numbers

WIDTH = 10  # units of each hidden layer per element


def c2st(x: Tensor | Mapping[str, Tensor], y: Tensor | Mapping[str, Tensor], *, folds: int = 5, seed: int = 1) -> float:
    """Measures how well a classifier separates two samples, such as draws of a guide and of a reference posterior.

    The result is the accuracy on held-out draws, in cross-validation, of a network with two hidden layers of 10 D rectified
    linear units that is trained by Adam until its loss no longer decreases. The best accuracy of any classifier is
    (1 + TV) / 2, where TV is the total variation distance of the two distributions: 0.5 if they are equal, and 1 if they do not
    overlap. The network's accuracy is at most this, up to sampling error. Both samples are shifted and scaled by the mean and
    standard deviation of ``x``, the reference; elements that are constant in ``x`` are shifted only.

    Args:
        x: draws (N, ...) of real numbers, or a dict of such tensors by latent.
        y: as many draws of the other distribution, with the same shapes.
        folds: the number of parts of the data, each of which is held out once.
        seed: the seed of the folds and the networks.

    Returns:
        The mean accuracy over the folds.

    Raises:
        ImportError: if scikit-learn is not installed.
        TypeError: if a sample is neither a tensor nor a dict of tensors of real numbers.
        ValueError: if the samples differ in names, shapes or size, have fewer draws than folds, or have NaN or infinity.

    Cost: ``folds`` fits of the network, from seconds for 1000 draws to minutes for 10,000.

    Reference: Lopez-Paz, Oquab, "Revisiting classifier two-sample tests", ICLR 2017. The settings are those of Lueckmann et
    al., "Benchmarking simulation-based inference", AISTATS 2021.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 100)
        >>> c2st({"p": x}, {"p": x + 2})
        1.0
    """
    check_sizes(2, folds=folds)
    seed = checked_seed(seed) % 2**32
    try:
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise ImportError(
            "c2st needs scikit-learn; install it with pip install 'pyro-genexact[scikit-learn]'."
        ) from error
    one, other = _by_name("x", x), _by_name("y", y)
    if (shapes := {n: v.shape for n, v in one.items()}) != (got := {n: v.shape for n, v in other.items()}):
        raise ValueError(f"Expected x and y of the same names and shapes; got {_text(shapes)} and {_text(got)}.")
    first, second = (torch.cat([v[n].reshape(len(v[n]), -1) for n in one], 1).numpy() for v in (one, other))
    if len(first) < folds:
        raise ValueError(f"Expected at least {folds} draws, one per fold; got {len(first)}.")
    scale = first.std(0)
    rows = (np.concatenate([first, second]) - first.mean(0)) / np.where(scale > 0, scale, 1.0)
    labels = np.repeat([0, 1], len(first))
    hidden = WIDTH * rows.shape[1]
    net = MLPClassifier((hidden, hidden), activation="relu", solver="adam", max_iter=10_000, random_state=seed)
    found: Any = cross_val_score(net, rows, labels, cv=KFold(folds, shuffle=True, random_state=seed))
    return float(found.mean())


def _by_name(name: str, sample: Any) -> dict[str, Tensor]:
    """Returns a sample as float64 tensors (N, ...) on the CPU by name."""
    named = sample if isinstance(sample, Mapping) else {"": sample}
    if not named:
        raise ValueError(f"Expected {name} to have at least one tensor; got an empty dict.")
    found = {}
    for key, value in named.items():
        label = f"{name}[{key!r}]" if key else name
        found[key] = numbers(label, value).detach().double().cpu()
        if not value.dim() or not value.numel():
            raise ValueError(f"Expected {label} of shape (N, ...), N >= 1; got {tuple(value.shape)}.")
        if not found[key].isfinite().all():
            raise ValueError(f"Expected {label} to be finite; got NaN or infinity.")
    if len(sizes := {len(v) for v in found.values()}) > 1:
        raise ValueError(f"Expected {name} to have the same number of draws of each name; got {sorted(sizes)}.")
    return found


def _text(shapes: Mapping[str, Any]) -> Any:
    return {name: tuple(shape) for name, shape in shapes.items()} if "" not in shapes else tuple(shapes[""])
