"""log_prob of batches in one forward, and the rows that make a step fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .batches import SHOWN, Batch

Penalty = Callable[[nn.Module], Tensor]


class LogProb(nn.Module):
    """A module whose forward returns the log_prob of a batch.

    Args:
        module: returns a distribution.
        penalty: of the module, or None.
    """

    def __init__(self, module: nn.Module, penalty: Penalty | None = None) -> None:
        super().__init__()
        self.module, self.penalty = module, penalty

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """log_prob (B,) of B rows and the penalty."""
        data, context = batch.data, batch.context
        args = [value for key, value in context.items() if key is None]
        distribution = self.module(*args, **{key: value for key, value in context.items() if key is not None})
        if not isinstance(distribution, torch.distributions.Distribution):
            raise TypeError(f"Expected module to return a distribution; got {type(distribution).__name__}.")
        log_prob = distribution.log_prob(data)
        return log_prob, None if self.penalty is None else self.penalty(self.module)


def log_prob_of(plain: LogProb, batch: Batch, where: str) -> tuple[Tensor, Tensor | None]:
    """log_prob (B,) of the rows of a batch, and the penalty; an exception says where in training it came up."""
    try:
        log_prob, penalty = plain(batch)
    except ValueError as error:  # validate_args met NaN parameters or a value outside the support
        rows = offending(plain, batch)  # none, where only their number is wrong
        raise ValueError(f"{error}\nMet at {where}{f', first in rows {rows}' if rows else ''}.") from error
    if log_prob.shape != batch.rows.shape:
        raise ValueError(
            f"Expected log_prob.shape == {tuple(batch.rows.shape)}, a value a row (do event dims lack "
            f".to_event?); got {tuple(log_prob.shape)}."
        )
    return log_prob, penalty


def offending(model: Any, batch: Batch) -> list[int]:
    """The first rows that alone raise, or make loss or gradient non-finite.

    In eval mode, for batch norm cannot train on one row.
    """
    model.eval()
    with torch.enable_grad():
        return list(islice(_bisect(model, batch), SHOWN))


def _bisect(model: Any, batch: Batch) -> Iterator[int]:
    # Halves are evaluated afresh: in a joint graph one row's infinite gradient, times zero, is NaN for all.
    if _is_finite(model, batch):
        return
    if len(batch.rows) == 1:
        yield int(batch.rows)
        return
    for half in torch.arange(len(batch.rows), device=batch.rows.device).tensor_split(2):
        yield from _bisect(model, batch.take(half))


def _is_finite(model: Any, batch: Batch) -> bool:
    try:
        loss = model(batch)[0].sum()
    except ValueError:
        return False
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return all(bool(x.isfinite().all()) for x in (loss, *grads) if x is not None)
