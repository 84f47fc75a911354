"""Held-out log-probabilities, by which models of the same data are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..core.checks import check_kind, check_positive, check_sizes
from ..core.devices import device_of
from ..core.shapes import shape_of
from ..inference.batches import Context
from ..inference.fitting import modes_kept
from ..inference.log_prob import LogProb, log_prob_of
from ..inference.sources import rows_of


@dataclass(frozen=True)
class HeldOut:
    """Log-probabilities (nats) of N independent rows that the model was not fitted to.

    The difference of two instances for the same rows is an instance too; see the example.

    Args:
        log_prob: (N,), N at least 2.

    Raises:
        ValueError: if ``log_prob`` has another shape or contains NaN.

    Example:
        >>> import torch
        >>> a = HeldOut(torch.tensor([-1.0, -3.0, -5.0]))
        >>> a, a - HeldOut(torch.tensor([-2.0, -4.0, -6.0]))
        (HeldOut(-3.0000 ± 1.1547 nats, 3 rows), HeldOut(1.0000 ± 0.0000 nats, 3 rows))
    """

    log_prob: Tensor

    def __post_init__(self) -> None:
        if self.log_prob.dim() != 1 or len(self.log_prob) < 2:
            raise ValueError(f"Expected log_prob of shape (N,), N >= 2; got {tuple(self.log_prob.shape)}.")
        if bad := self.log_prob.isnan().nonzero().flatten().tolist():
            raise ValueError(f"Expected log_prob without NaN; got NaN, first in rows {bad[:10]}.")

    def __repr__(self) -> str:
        return f"HeldOut({self.mean:.4f} ± {self.standard_error:.4f} nats, {len(self.log_prob)} rows)"

    def __sub__(self, other: HeldOut) -> HeldOut:
        """Returns the differences row by row. Their standard error is usually far smaller than those of the two scores.

        Raises:
            ValueError: if the numbers of rows differ.
        """
        if self.log_prob.shape != other.log_prob.shape:
            raise ValueError(f"Expected scores of the same {len(self.log_prob)} rows; got {len(other.log_prob)} rows.")
        return HeldOut(self.log_prob.double() - other.log_prob.to(self.log_prob.device).double())

    @property
    def mean(self) -> float:
        """The mean over rows (nats), an estimate of the expected log-probability of a new row."""
        return self.log_prob.double().mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of the mean over rows (nats). It does not include the variation between fits."""
        return self.log_prob.double().std().item() / math.sqrt(len(self.log_prob))


@torch.no_grad()
def held_out(
    module: nn.Module, data: Tensor | Dataset[Any], context: Context = None, *, batch_size: int = 1024
) -> HeldOut:
    """Computes the log-probabilities of held-out rows under a fitted module, in eval mode.

    Use this function to evaluate a maximum-likelihood fit. Leave-one-out by importance sampling is not possible in this
    case, since there are no posterior draws of the parameters.

    Args:
        module: a module that is called as ``module()``, ``module(context)`` or, if the context is a dict,
            ``module(**context)``, as in :func:`~pyro_genexact.fit`.
        data: (N, *event_shape), or a map-style Dataset of rows or (row, context) pairs.
        context: (N, ...) or a dict of such tensors.
        batch_size: the number of rows to evaluate at once.

    Returns:
        The log-probabilities with their mean and standard error (nats).

    Raises:
        TypeError: as :func:`~pyro_genexact.fit`.
        ValueError: as :func:`~pyro_genexact.fit`, and if there are fewer than two rows.

    Cost: one ``log_prob`` per row, without gradients.

    Example:
        >>> import torch
        >>> import pyro_genexact as gx
        >>> from pyro.distributions import Normal
        >>> held_out(gx.Constant(Normal(0.0, 1.0)), torch.tensor([-1.0, 0.0, 1.0]))
        HeldOut(-1.2523 ± 0.1667 nats, 3 rows)
    """
    check_sizes(1, batch_size=batch_size)
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected module to be a torch.nn.Module; got {type(module).__name__}.")
    device = device_of([*module.parameters(), *module.buffers(), *([data] if isinstance(data, Tensor) else [])])
    with modes_kept(module):
        module.eval()
        plain, batches = LogProb(module), rows_of(data, context, "data").batches(batch_size, device)
        return HeldOut(torch.cat([log_prob_of(plain, batch, "held-out rows")[0] for batch in batches]))


@dataclass(frozen=True)
class Comparison:
    """The score of one of several models that are compared on the same rows.

    Attributes:
        name: the name of the model.
        score: its held-out scores (nats).
        difference: its scores minus those of the best model, row by row (nats); zeros for the best model.
    """

    name: str
    score: HeldOut
    difference: HeldOut

    def __str__(self) -> str:
        mean, error = self.difference.mean, self.difference.standard_error
        return f"{self.name}: {self.score.mean:.4f} ± {self.score.standard_error:.4f}, difference to the best {mean:.4f} ± {error:.4f}"


def compare(scores: Mapping[str, HeldOut | Tensor]) -> list[Comparison]:
    """Ranks models by mean held-out log-probability, the best first, with paired differences to the best model.

    Args:
        scores: held-out scores or log-probabilities (N,) in nats by name of the model, for the same rows in the same order.

    Returns:
        One comparison per model.

    Raises:
        ValueError: if there are no scores, or if the numbers of rows differ.

    Example:
        >>> import torch
        >>> scores = {"a": torch.tensor([-2.0, -4.0]), "b": torch.tensor([-1.0, -3.5])}
        >>> for row in compare(scores):
        ...     print(row)
        b: -2.2500 ± 1.2500, difference to the best 0.0000 ± 0.0000
        a: -3.0000 ± 1.0000, difference to the best -0.7500 ± 0.2500
    """
    if not scores:
        raise ValueError("Expected scores of at least one model; got none.")
    known = {name: s if isinstance(s, HeldOut) else HeldOut(s) for name, s in scores.items()}
    names = sorted(known, key=lambda name: -known[name].mean)
    return [Comparison(name, known[name], known[name] - known[names[0]]) for name in names]


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int], *, width: float = 1.0) -> Tensor:
    """Converts log-probabilities to bits per dimension, the unit in which models of images are compared.

        bits = -(log p / D + log width) / log 2

    This is the number of bits per element that an ideal lossless code of the levels needs; smaller is better. A model of
    the levels themselves, such as one with the head :class:`~pyro_genexact.heads.DiscretizedLogistic`, has exact bits
    with ``width=1``.

    A density needs a correction for the width of a level. For *uniform dequantisation*, y = width (x + u) with u uniform
    on (0, 1)^D. The probability of the levels x is the integral of the density p over their cell. By Jensen's inequality

        -log P(x) <= -E_u log p(width (x + u)) - D log width,

    so the bits of dequantised rows are, on average, an upper bound of the bits of the levels.

    Args:
        log_prob: log-probabilities or log-densities in nats, of any shape.
        event_shape: the shape of an event, with D elements.
        width: the distance between two adjacent levels on the scale of the density: 1 / 256 for 256 levels that are
            mapped to (0, 1), and 1 for a probability mass function or a density of x + u.

    Returns:
        The bits per dimension, of the shape and dtype of ``log_prob``.

    Raises:
        TypeError: if ``log_prob`` is not a tensor, ``event_shape`` not a sequence, or ``width`` not a number.
        ValueError: if the sizes of the event are not positive, or ``width`` is not positive and finite.

    Cost: elementwise.

    References: Uria, Murray, Larochelle, "RNADE: the real-valued neural autoregressive density-estimator", NeurIPS 2013
    (dequantisation); Theis, van den Oord, Bethge, "A note on the evaluation of generative models", ICLR 2016 (the bound).

    Example:
        >>> import torch
        >>> from pyro.distributions import Categorical, Uniform
        >>> x = torch.randint(256, (5, 8, 8))
        >>> bits_per_dim(Categorical(torch.ones(256)).expand([8, 8]).to_event(2).log_prob(x), (8, 8))
        tensor([8., 8., 8., 8., 8.])
        >>> y = (x + torch.rand(x.shape)) / 256
        >>> bits_per_dim(Uniform(0.0, 1.0).expand([8, 8]).to_event(2).log_prob(y), (8, 8), width=1 / 256)
        tensor([8., 8., 8., 8., 8.])
    """
    check_kind("log_prob", log_prob, Tensor)
    check_positive(width=width)
    return -(log_prob / math.prod(shape_of(event_shape)) + math.log(width)) / math.log(2)
