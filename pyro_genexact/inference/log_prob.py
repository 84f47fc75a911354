"""The log_prob of batches in one forward pass, and the search for the rows that make a step fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .batches import SHOWN, Batch
from .compiled import Compiled

Penalty = Callable[[nn.Module], Tensor]
RowLoss = Callable[[Any, Tensor], Tensor]


class LogProb(nn.Module):
    """A module whose forward returns the log_prob of a batch.

    Args:
        module: a module that returns a distribution.
        penalty: a function of the module, or None.
        loss: a function of a distribution and rows, whose negative replaces their log_prob, or None.
        compile: whether to compile the log_prob for training mode. The first batch is evaluated without compilation, and
            all checks of values run. Later batches are evaluated without validation by the compiled function; until
            ``seen`` is set to True, their rows are checked against the support of the distribution.
    """

    def __init__(
        self,
        module: nn.Module,
        penalty: Penalty | None = None,
        loss: RowLoss | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.module, self.penalty, self.loss, self.seen = module, penalty, loss, False
        self.compiled = Compiled(self._log_prob) if compile else None

    @property
    def name(self) -> str:
        """What the rows' values are called in error messages."""
        return "log_prob" if self.loss is None else "loss(distribution, rows)"

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns the log_prob (B,) of B rows, and the penalty or None."""
        log_prob = self._compiled_log_prob(batch) if self.training and self.compiled else self._log_prob(batch)
        return log_prob, None if self.penalty is None else self.penalty(self.module)

    def _compiled_log_prob(self, batch: Batch) -> Tensor:
        assert self.compiled is not None
        if not self.compiled.ready:
            log_prob = self._log_prob(batch)
            self.compiled.ready = True
            return log_prob
        if not self.seen and self.loss is None:
            with torch.no_grad(), torch.random.fork_rng([]):
                distribution = self._distribution(batch)
                if distribution._validate_args:
                    distribution._validate_sample(batch.data)
        return self.compiled(Batch(batch.rows[:0], batch.data, batch.context))  # type: ignore[no-any-return]

    def _log_prob(self, batch: Batch) -> Tensor:
        distribution = self._distribution(batch)
        return distribution.log_prob(batch.data) if self.loss is None else -self._losses(distribution, batch.data)  # type: ignore[no-any-return]

    def _distribution(self, batch: Batch) -> Any:
        args = [value for key, value in batch.context.items() if key is None]
        distribution = self.module(*args, **{key: value for key, value in batch.context.items() if key is not None})
        if not isinstance(distribution, torch.distributions.Distribution):
            raise TypeError(f"Expected module to return a distribution; got {type(distribution).__name__}.")
        return distribution

    def _losses(self, distribution: Any, data: Tensor) -> Tensor:
        assert self.loss is not None
        losses = self.loss(distribution, data)
        if not isinstance(losses, Tensor):
            raise TypeError(f"Expected loss to return a tensor; got {type(losses).__name__}.")
        return losses


def log_prob_of(plain: LogProb, batch: Batch, where: str) -> tuple[Tensor, Tensor | None]:
    """Returns the log_prob (B,) of a batch and the penalty; error messages have ``where``, the position in training."""
    try:
        log_prob, penalty = plain(batch)
    except ValueError as error:  # from validate_args: NaN parameters or a value outside the support
        rows = offending(plain, batch)  # empty if the error does not depend on the rows
        raise ValueError(f"{error}\nRaised at {where}{f', first in rows {rows}' if rows else ''}.") from error
    if log_prob.shape != batch.rows.shape:
        raise ValueError(
            f"Expected {plain.name}.shape == {tuple(batch.rows.shape)}, one value per row; got {tuple(log_prob.shape)}. "
            "Declare event dims with .to_event; a distribution over scalars takes data of shape (N,)."
        )
    return log_prob, penalty


def offending(model: Any, batch: Batch) -> list[int]:
    """Returns the first rows that, evaluated alone, raise or have a loss or gradient that is not finite."""
    model.eval()  # batch norm cannot train on one row
    with torch.enable_grad():
        return list(islice(_bisect(model, batch), SHOWN))


def _bisect(model: Any, batch: Batch) -> Iterator[int]:
    # Halves are evaluated separately: in a joint graph, an infinite gradient of one row times zero is NaN for all rows.
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
