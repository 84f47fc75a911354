"""Gradients of the mean log_prob over all rows of a step, in all its batches and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .batches import SHOWN, Batch
from .log_prob import LogProb, Penalty, RowLoss, log_prob_of, offending
from .ranks import Ranks


@dataclass(frozen=True)
class Joint:
    """The rows of a step.

    Attributes:
        batches: the batches of this process.
        rows: the number of rows in all processes.
        where: the position in training, for error messages.
        error: an exception that was raised while the batches were read.
    """

    batches: Sequence[Batch | None]
    rows: float
    where: str
    error: BaseException | None = None


class Part:
    """A batch of a step, hidden from Fabric, whose mixed precision would otherwise round its numbers."""

    def __init__(self, batch: Batch | None, joint: Joint) -> None:
        self.batch, self.joint = batch, joint


class Loss(nn.Module):
    """Computes the contribution of a batch to the mean loss of a step in one forward pass, as wrappers of modules require.

    Args:
        plain: computes the log_prob of batches.
        size: the number of processes. If there are several, an exception is stored in ``error`` and the loss is 0, because
            the other processes wait for the gradients of this one.
    """

    def __init__(self, plain: LogProb, size: int) -> None:
        super().__init__()
        self.plain, self.size = plain, size
        self.error: BaseException | None = None

    def forward(self, part: Part) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the loss, the penalty, and the detached log_prob (B,)."""
        if self.error is None:
            try:
                return self._parts(part)
            except (Exception, KeyboardInterrupt) as error:
                if self.size == 1:
                    raise
                self.error = error
        zero = 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
        return zero, None, zero.detach()[None]

    def _parts(self, part: Part) -> tuple[Tensor, Tensor | None, Tensor]:
        joint, batch = part.joint, part.batch
        if joint.error is not None or batch is None:
            raise joint.error or ValueError("Expected a batch in each step; got none.")
        log_prob, penalty = log_prob_of(self.plain, batch, joint.where)
        if not log_prob.requires_grad and (penalty is None or not penalty.requires_grad):
            raise ValueError(
                f"Expected {self.plain.name} to depend on parameters of module; got a tensor without gradient."
            )
        loss = weighted(log_prob, batch).sum() * (-self.size / joint.rows)  # Fabric averages over the processes
        return loss, penalty, log_prob.detach()


class Gradients:
    """Computes the gradients of a module's parameters.

    Args:
        module: the module whose log_prob is maximised.
        penalty: the penalty that is subtracted from it, or None.
        row_loss: the function whose negative replaces log_prob, or None.
        optimizer: the optimizer of the parameters.
        fabric: the Fabric that wraps module and optimizer.
        ranks: the processes of the fabric.
        compile: whether to compile the log_prob.

    Attributes:
        step: the step of the wrapped optimizer.
        log_prob: log_prob (B,) of the rows of the last batch.
    """

    def __init__(
        self,
        module: nn.Module,
        penalty: Penalty | None,
        row_loss: RowLoss | None,
        optimizer: Optimizer,
        fabric: Any,
        ranks: Ranks,
        compile: bool,
    ) -> None:
        self.module, self.fabric, self.ranks = module, fabric, ranks
        self.plain = LogProb(module, penalty, row_loss, compile)
        self.loss = Loss(self.plain, ranks.size)
        self.model, self.optimizer = fabric.setup(self.loss, optimizer)
        self.step = self.optimizer.step
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.all_used = False  # whether the loss must depend on each parameter
        for part in self.model.modules():
            if isinstance(part, DistributedDataParallel):
                # buffers can be as large as weights, so the fit shares them only after each epoch
                part.broadcast_buffers = False
                self.all_used = not part.find_unused_parameters
        self.log_prob = torch.empty(0, device="cpu")

    def __call__(self, joint: Joint) -> tuple[float, float, float]:
        """Sets the gradients; returns the loss, the mean log_prob and the norm of the gradients."""
        self.optimizer.zero_grad()
        log_probs: list[Tensor] = []
        losses: list[Tensor] = []
        penalty: Tensor | None = None
        for number, batch in enumerate(joint.batches, 1):
            last = number == len(joint.batches)
            with nullcontext() if last or self.ranks.size == 1 else self.fabric.no_backward_sync(self.model):
                loss, penalty, log_prob = self.model(Part(batch, joint))
                self.fabric.backward(loss if penalty is None or not last else loss + penalty)
            losses.append(loss)
            log_probs.append(log_prob)
        norm = nn.utils.get_total_norm(self._values())
        scalars = [norm, *([] if penalty is None else [penalty]), *losses]
        length, *values = torch.stack(
            [x.detach().to(norm.device) for x in scalars]
        ).tolist()  # the only synchronisation with the device
        extra = 0.0 if penalty is None else values.pop(0)
        numbers = [-sum(values), extra]
        with self.ranks.agreed(numbers):
            error, self.loss.error = self.loss.error, None
            if error is not None:
                raise error
            self._check_known()
            self._check_used()
        nats, extra = (x / self.ranks.size for x in numbers)
        if not math.isfinite(nats + extra + length):
            what, got = ("gradient", length) if math.isfinite(nats + extra) else ("loss", extra - nats)
            bad = [row for rows in self.ranks.gather(self._bad_rows(joint, log_probs)) for row in rows]
            raise FloatingPointError(
                f"Expected a finite {what}; got {got} at {joint.where}, first in rows {bad[:SHOWN]}."
            )
        self.log_prob = log_probs[-1]
        return extra - nats, nats, length

    def _check_known(self) -> None:
        """Raises in the first step if the module has parameters that the optimizer does not have."""
        if len(self.log_prob):
            return
        known = {id(p) for p in self.params}
        new = [name for name, p in self.module.named_parameters() if p.requires_grad and id(p) not in known]
        if new:
            raise ValueError(
                f"Expected module to keep its parameters; its forward created or replaced {new}. If Pyro's parameter store "
                "has others of the same names, call pyro.clear_param_store() first."
            )

    def _values(self) -> list[Tensor]:
        """Returns the gradients; for sparse ones their stored entries, which share memory with the gradients."""
        grads = []
        for p in self.params:
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce()
            if p.grad is not None:
                grads.append(p.grad._values() if p.grad.is_sparse else p.grad)
        return grads

    def cut(self, longest: float, norm: float) -> None:
        """Clips gradients of the given norm to the longest norm."""
        if norm > longest:
            torch._foreach_mul_(self._values(), longest / norm)

    def _check_used(self) -> None:
        """Raises if a parameter has no gradient, since DDP would then not average the other gradients."""
        if self.all_used and any(p.grad is None for p in self.params):
            unused = [name for name, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
            raise ValueError(
                f"Expected the loss to depend on each parameter if there are several processes; it does not depend on {unused}. "
                "Freeze them with requires_grad_(False), or use strategy='ddp_find_unused_parameters_true' for the fabric."
            )

    def _bad_rows(self, joint: Joint, log_probs: list[Tensor]) -> list[int]:
        batches = [batch for batch in joint.batches if batch is not None]
        bad = [batch.rows[~x.isfinite()].tolist() for batch, x in zip(batches, log_probs, strict=True)]
        if not any(bad):
            with self.fabric.autocast():
                bad = [offending(self.plain, batch) for batch in batches]
        return [row for rows in bad for row in rows]


def weighted(log_prob: Tensor, batch: Batch) -> Tensor:
    """Multiplies log_prob by the row weights; the result is 0 for weight 0, even if log_prob is not finite."""
    return log_prob if batch.weights is None else log_prob.where(batch.weights > 0, 0.0) * batch.weights
