"""The engine under ``fit`` and ``fit_guide``: steps until the end, with checkpoints, progress and interrupts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..core.random import random_state, set_random_state
from .checkpoint import Checkpoint
from .fitting import Progress
from .ranks import Ranks


class Task(Protocol):
    """What an engine runs."""

    @property
    def steps(self) -> int:
        """How many it has taken."""

    @property
    def stopped(self) -> str | None:
        """Why no step follows, or None."""

    def step(self) -> None:
        """Takes one step."""

    def finish(self, hurry: bool) -> None:
        """Loads the weights that are kept; called again, in a hurry, if it was interrupted."""

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, but for torch's random state."""

    def load(self, state: dict[str, Any]) -> None:
        """Restores a state."""

    @property
    def done(self) -> float:
        """How much of the largest number of steps or epochs is done."""

    def text(self) -> str:
        """The news."""


@dataclass
class Clock:
    """Seconds of a fit, those before the checkpoint that it continues from included."""

    before: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start


@dataclass
class Engine:
    """Runs a task to its end.

    Args:
        ranks: the processes that run it.
        device: whose random state is part of a checkpoint.
        clock: of the fit.
        checkpoint: where states are written.
        bar: shows progress.
        interrupts: that the task holds back.
    """

    ranks: Ranks
    device: torch.device
    clock: Clock
    checkpoint: Checkpoint
    bar: Progress
    interrupts: Interrupts

    def run(self, task: Task) -> str:
        """Continues from the checkpoint, if there is one; returns why the task ended."""
        state = self.checkpoint.load()
        with self.interrupts.watched():
            stopped = self._steps(task, state)
            if _finish(task):
                stopped = "interrupted"
        if stopped != "interrupted" and (state is None or state["stopped"] is None):
            self._save(task, stopped)
        return stopped

    def _steps(self, task: Task, state: dict[str, Any] | None) -> str:
        try:
            if state is not None:
                self._restore(task, state)
            stopped = task.stopped
            while stopped is None:
                self._step(task)
                stopped = task.stopped
                self.bar.report(task.done, task.text, last=stopped is not None)
                if stopped is None and self.checkpoint.due(task.steps):
                    self._save(task, None)
            return stopped
        except KeyboardInterrupt:
            return "interrupted"

    def _step(self, task: Task) -> None:
        if self.ranks.size == 1:
            task.step()
            return
        try:
            with self.interrupts.held():
                task.step()
            came = False
        except KeyboardInterrupt:
            came = True
        if self.ranks.sum(came)[0]:  # all processes stop after the same step
            raise KeyboardInterrupt

    def _save(self, task: Task, stopped: str | None) -> None:
        if self.checkpoint.path is None:
            return
        random = self.ranks.gather(random_state(self.device))
        seconds = self.clock.seconds
        self.checkpoint.save({"task": task.state(), "random": random, "seconds": seconds, "stopped": stopped})

    def _restore(self, task: Task, state: dict[str, Any]) -> None:
        task.load(state["task"])
        set_random_state(state["random"][self.ranks.rank], self.device)
        self.clock.before = state["seconds"]


def _finish(task: Task) -> bool:
    """Finishes in any case; whether that was interrupted."""
    interrupted = False
    while True:
        try:
            task.finish(interrupted)
            return interrupted
        except KeyboardInterrupt:
            interrupted = True


class Interrupts:
    """Interrupts (SIGINT) of the main thread, which can be held back while what is done belongs together."""

    def __init__(self) -> None:
        self.holding, self.came = False, False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handles the signal in this context."""
        old = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(old):
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self.holding:
                self.came = True
            else:
                old(number, frame)

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises a KeyboardInterrupt at the end in place of one that comes."""
        outer, self.holding = self.holding, True
        try:
            yield
        finally:
            self.holding = outer
        if self.came and not outer:
            self.came = False
            raise KeyboardInterrupt
