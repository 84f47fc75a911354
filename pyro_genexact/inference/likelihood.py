"""The task that the engine runs for ``fit``: steps and epochs of maximum likelihood."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, signature
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..base import DistributionModule
from ..core.random import random_state, set_random_state
from .batches import Batch
from .engine import Clock, Interrupts
from .gradients import Gradients, Joint, weighted
from .kept import Kept
from .learning_rate import LearningRate, set_rate
from .loaders import Loader
from .log_prob import LogProb, Penalty, RowLoss, log_prob_of
from .ranks import Ranks

T = TypeVar("T")
PATIENCE = 10  # epochs without better validation nats after which the learning rate drops
SHORTEST = 200  # minimum number of steps in this time
FLAT = 1e-8  # relative decrease of the loss in a step with a closure below which the fit ends
PLAIN = ("steps", "stopped", "last_epoch", "history", "spent", "start", "worst", "last_loss")  # saved in checkpoints


@dataclass
class Position:
    """The current epoch and batch of a fit, and sums over the rows of this epoch so far."""

    epoch: int = 0
    batch: int = 0
    nats: float = 0.0
    rows: float = 0.0


@dataclass
class MaximumLikelihood:
    """Maximises the mean log_prob of batches step by step; a task for the engine.

    Args:
        module: the module to fit.
        optimizer: the optimizer of its parameters.
        fabric: the Fabric that wraps both.
        ranks: the processes of the fabric.
        train: the training batches.
        held_out: the validation batches, or None.
        rate: the learning-rate rule, which also ends the fit.
        schedule: the user's scheduler, stepped after every step, or None to use ``rate``.
        clock: the clock of the fit.
        epochs: as in ``fit``.
        seconds: as in ``fit``.
        max_grad_norm: as in ``fit``.
        accumulate: as in ``fit``.
        penalty: as in ``fit``.
        loss: as in ``fit``.
        ema: as in ``fit``.
        patience: as in ``fit``; None for the patience of the rule.
        interrupts: signals that are delayed during each update.
        compile: as in ``fit``.
    """

    module: nn.Module
    optimizer: Optimizer
    fabric: Any
    ranks: Ranks
    train: Loader
    held_out: Loader | None
    rate: LearningRate
    schedule: LRScheduler | None
    clock: Clock
    epochs: int
    seconds: float | None
    max_grad_norm: float
    accumulate: int
    penalty: Penalty | None
    loss: RowLoss | None
    ema: float | None
    patience: int | None
    interrupts: Interrupts
    compile: bool
    steps: int = 0
    stopped: str | None = None
    last_epoch: int = -1
    history: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    at: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.gradients = Gradients(
            self.module, self.penalty, self.loss, self.optimizer, self.fabric, self.ranks, self.compile
        )
        self.params = nn.ParameterList(self.gradients.params)
        self.averages, self.swapped = None, False
        if self.ema is not None:
            with torch.device("cpu"):  # the step count is read in each step, so it must not be on a GPU
                self.averages = AveragedModel(self.params, multi_avg_fn=partial(_average, self.ema))
        self.kept = Kept(self.module, 1 if self.averages is None else 2)
        self.closure = takes_closure(self.optimizer)
        self.batches: Iterator[Batch] | None = None
        self.start, self.spent, self.worst, self.last_loss, self.flat = 0.0, 0.0, -math.inf, math.inf, False
        self.random: list[Tensor] = []  # states of generators at the start of the epoch
        self.drawn: list[Tensor] = []

    # --- steps --------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Takes a step, or ends an epoch."""
        if self.batches is None:
            self.batches = self._epoch()
            self.interrupts.watch("SIGCHLD")  # DataLoader's handler raises if a worker died
            self.module.train()
        joint = self._fetch()
        if joint is None:
            self._end_epoch()
            return
        if self.schedule is None:
            set_rate(self.optimizer, self.rate.factor(self.steps, self.spent))
        nats = self._search(joint) if self.closure else self._descend(joint)
        with self.interrupts.held():
            if not self.closure:
                self.gradients.step()
            if self.schedule is not None:
                self.schedule.step()
            if self.averages is not None:
                self.averages.update_parameters(self.params)
            self.steps += 1
            self.at.batch += len(joint.batches)
            self.at.nats += nats * joint.rows
            self.at.rows += joint.rows
        self.fabric.call("on_train_batch_end", module=self.module, step=self.steps, nats=nats)
        late = self._late()
        if late or self.at.batch == self.train.batches:
            self._end_epoch("seconds" if late else None)

    def _fetch(self) -> Joint | None:
        """Returns the batches of the next step, or None at the end of an epoch."""
        assert self.batches is not None
        where = f"epoch {self.at.epoch}, batch {self.at.batch // self.accumulate}"
        rows = self.train.rows(self.at.batch, self.accumulate)
        if rows is not None:  # known without an exchange between processes
            try:
                return Joint(list(islice(self.batches, self.accumulate)), rows, where)
            except (Exception, KeyboardInterrupt) as error:  # raised later, at the next exchange
                return Joint([None], rows, where, error)
        numbers = [0.0, 0.0]
        with self.ranks.agreed(numbers):
            batches = list(islice(self.batches, self.accumulate))
            numbers[:] = sum(len(batch.rows) for batch in batches), not batches
        return None if numbers[1] else Joint(batches, numbers[0], where)

    def _epoch(self) -> Iterator[Batch]:
        if self.at.batch == 0:
            self.random, self.drawn = random_state(self.fabric.device), self.train.states()
            return self.train.epoch(self.at.epoch)
        now = random_state(self.fabric.device)
        set_random_state(self.random, self.fabric.device)  # the loader repeats its draws at the start of the epoch
        batches = self.train.epoch(self.at.epoch, self.at.batch)
        set_random_state(now, self.fabric.device)
        return batches

    def _late(self) -> bool:
        """Updates the fraction of the budget that is spent; returns whether its seconds are over."""
        self.spent = self.done / self.epochs
        if self.seconds is None:
            return False
        seconds = self.ranks.sum(self.clock.seconds)[0] / self.ranks.size
        self.spent = max(self.spent, seconds / self.seconds)
        return seconds >= self.seconds

    @property
    def done(self) -> float:
        """The number of epochs, including the fraction of the current one if its length is known."""
        return self.at.epoch + (self.at.batch / self.train.batches if self.train.batches else 0.0)

    def _descend(self, joint: Joint) -> float:
        """Sets the clipped gradients of a step; returns the mean log_prob."""
        _, nats, norm = self.gradients(joint)
        self.gradients.cut(self.max_grad_norm, norm)
        if self.steps == 0:
            log_prob = self.gradients.log_prob
            spread = log_prob.std() if len(log_prob) > 1 else log_prob.abs().sum()
            self.start, self.worst = nats, nats - 3 * float(spread)
        return nats

    def _search(self, joint: Joint) -> float:
        """Takes a step of an optimizer that evaluates the loss itself; returns the mean log_prob before the step."""
        params = self.gradients.params
        before = [p.detach().clone() for p in params]
        seen: list[tuple[float, float]] = []

        def evaluate() -> Tensor:
            loss, nats, _ = self.gradients(joint)
            seen.append((loss, nats))
            return torch.as_tensor(loss, dtype=params[0].dtype, device=params[0].device)

        try:
            self.gradients.step(evaluate)
        except BaseException:
            with torch.no_grad():
                for p, value in zip(params, before, strict=True):
                    p.copy_(value)
            raise
        loss, nats = seen[0]
        self.flat = self.last_loss - loss <= FLAT * abs(loss)
        self.last_loss = loss
        return nats

    # --- epochs -------------------------------------------------------------------------------------------

    def _end_epoch(self, stopped: str | None = None) -> None:
        """Validates, keeps the best weights, and sets ``stopped`` if the fit ends."""
        if self.at.rows == 0:
            raise ValueError("Expected data with at least one row; got a loader without batches.")
        self._share_buffers()
        scores = [] if self.held_out is None else self._of_each_kind(self._score)
        late = self._late()  # validation takes time too
        with self.interrupts.held():
            self.history[0].append(self.at.nats / self.at.rows)
            self.last_epoch = self.at.epoch
            if scores:
                self.history[1].append(max(scores, key=lambda x: -math.inf if math.isnan(x) else x))
                better = self._of_each_kind(lambda kind: self.kept.record(kind, scores[kind], self.at.epoch))
                if self.rate.read(any(better), self._waited()) and not self.rate.flat:
                    self._load_kept()
            self.at, self.batches = Position(self.at.epoch + 1), None
            self.gradients.plain.seen = True  # by the support, if the log_prob is compiled
            ends = {"flat": self.rate.flat or self.flat, "epochs": self.at.epoch == self.epochs, "seconds": late}
            self.stopped = stopped or next((end for end, reached in ends.items() if reached), None)
        named = {name: values[-1] for name, values in zip(("train", "validation"), self.history, strict=True) if values}
        self.fabric.log_dict(named, step=self.steps)
        self.fabric.call("on_train_epoch_end", module=self.module, epoch=self.at.epoch - 1, **named)

    def _waited(self) -> float:
        """Returns the fraction of the patience that an epoch takes."""
        if self.patience is not None:
            return 1 / self.patience
        return min(1 / PATIENCE, self.steps / (self.last_epoch + 1) / SHORTEST)

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights the module has at the end."""
        return self.last_epoch if self.held_out is None else self.kept.epoch

    def _of_each_kind(self, function: Callable[[int], T]) -> list[T]:
        """Returns the results of a function for the module with its weights and, if there are any, with their averages."""
        try:
            results = [function(0)]
            if self.averages is not None:
                self._swap(True)
                results.append(function(1))
        finally:
            self._swap(False)
        return results

    @torch.no_grad()
    def _swap(self, swapped: bool) -> None:
        """Exchanges the weights of the module and their averages, if they are not yet in the given state."""
        with self.interrupts.held():
            if self.averages is not None and self.swapped != swapped:
                for p, average in zip(self.params, self.averages.parameters(), strict=True):
                    value = p.clone()
                    p.copy_(average)
                    average.copy_(value)
                self.swapped = swapped

    def _load_kept(self) -> None:
        if self.kept.load() and self.averages is not None:
            self.averages.module.load_state_dict(self.params.state_dict())

    @torch.no_grad()
    def _score(self, kind: int) -> float:
        """Returns the mean log_prob of the validation rows of all processes; may be -inf or NaN."""
        assert self.held_out is not None
        module = self.module
        scorer = module.for_validation() if isinstance(module, DistributionModule) else module
        plain, where = LogProb(scorer.eval(), loss=self.loss), f"epoch {self.at.epoch}, validation"
        nats, weight = [], 0.0
        with self.ranks.agreed(), self.fabric.autocast():
            for batch in self.held_out.epoch(0):
                nats.append(weighted(log_prob_of(plain, batch, where)[0], batch).sum())
                weight += len(batch.rows) if batch.weights is None else float(batch.weights.sum())
            own = torch.stack(nats).sum().item() if nats else 0.0
        total, weight = self.ranks.sum(own, weight)
        return total / weight if weight else math.nan

    def _share_buffers(self) -> None:
        """Copies the buffers of the first process to all others, since running statistics may differ."""
        if self.ranks.size == 1:
            return
        for buffer in self.module.buffers():
            value = buffer.contiguous()
            distributed.broadcast(value, 0)
            if not torch.equal(value, buffer):
                buffer.copy_(value)

    def finish(self, hurry: bool) -> None:
        """Loads the weights to keep."""
        self._swap(False)
        if self.held_out is not None:
            self._load_kept()
        elif self.averages is not None and self.steps:
            self.params.load_state_dict(self.averages.module.state_dict())
        self.module.zero_grad()

    def close(self) -> None:
        """Ends the workers of the loaders."""
        for loader in filter(None, (self.train, self.held_out)):
            loader.close()

    def warn(self) -> None:
        """Warns if the last epoch was far worse than the first step, or if no epoch improved on the first one."""
        if self.history[0] and self.history[0][-1] < self.worst:
            warnings.warn(
                f"The fit diverged: {self.history[0][-1]:.4g} nats in the last epoch, {self.start:.4g} nats in the first step. "
                "Try a smaller lr or max_grad_norm.",
                stacklevel=3,
            )
        elif self.stopped == "flat" and self.history[1] and self.best_epoch == 0:
            warnings.warn(
                f"The validation nats, {self.history[1][0]:.4g}, did not improve after the first epoch. Check the scales of "
                "the data (standardize= of the recipes) and of the context, which should be of order 1.",
                stacklevel=3,
            )

    # --- checkpoints and progress -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Returns the state on which later steps depend, without torch's random state."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": (self.schedule or self.rate).state_dict(),
            "kept": self.kept.state_dict(),
            "averages": None if self.averages is None else self.averages.state_dict(),
            "random": self.random,
            "loaders": (
                self.train.states() if self.batches is None else self.drawn,
                [] if self.held_out is None else self.held_out.states(),
            ),
            "at": vars(self.at),
            "plain": {name: getattr(self, name) for name in PLAIN},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores a state."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        (self.schedule or self.rate).load_state_dict(state["schedule"])
        self.kept.load_state_dict(state["kept"])
        if self.averages is not None:
            self.averages.load_state_dict(state["averages"])
        self.random, self.at = state["random"], Position(**state["at"])
        self.drawn, held_out = state["loaders"]
        self.train.restore(self.drawn)
        if self.held_out is not None:
            self.held_out.restore(held_out)
        for name, value in state["plain"].items():
            setattr(self, name, value)

    def text(self) -> str:
        """Returns the nats of the last epoch, or of the first epoch so far."""
        if not self.history[0]:
            return f"train {self.at.nats / max(self.at.rows, 1):.4f} nats so far"
        named = zip(("train", "validation"), self.history, strict=True)
        return ", ".join(f"{name} {values[-1]:.4f} nats" for name, values in named if values)


def takes_closure(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer evaluates the loss itself, as L-BFGS does."""
    closure = signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def _average(decay: float, averages: list[Tensor], values: list[Tensor], number: Tensor) -> None:
    """Updates exponential averages; at first they are plain means, so that the initial weights lose their influence."""
    torch._foreach_lerp_(averages, values, max(1 - decay, 1 / (float(number) + 1)))
