"""The training loop of ``fit`` and ``fit_guide``, with checkpoints, progress and interrupts."""

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
    """A fit that an engine runs step by step."""

    @property
    def steps(self) -> int:
        """The number of steps so far."""

    @property
    def stopped(self) -> str | None:
        """The reason why the fit ended, or None while it continues."""

    def step(self) -> None:
        """Takes one step."""

    def finish(self, hurry: bool) -> None:
        """Loads the weights to keep; called again with ``hurry=True`` if it was interrupted."""

    def state(self) -> dict[str, Any]:
        """Returns the state on which later steps depend, without torch's random state."""

    def load(self, state: dict[str, Any]) -> None:
        """Restores a state."""

    @property
    def done(self) -> float:
        """The number of steps or epochs so far, in the units of the progress report."""

    def text(self) -> str:
        """Returns the text of the progress report."""


@dataclass
class Clock:
    """Measures the seconds of a fit; ``before`` are those before the checkpoint from which it continues."""

    before: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the fit, without the time between a checkpoint and the call that continues it."""
        return self.before + time.perf_counter() - self.start


@dataclass
class Engine:
    """Runs a task to its end.

    Args:
        ranks: the processes that run the task.
        device: the device whose random state is part of a checkpoint.
        clock: the clock of the fit.
        checkpoint: the checkpoint file.
        bar: the progress report.
        interrupts: the signals that the task delays.
    """

    ranks: Ranks
    device: torch.device
    clock: Clock
    checkpoint: Checkpoint
    bar: Progress
    interrupts: Interrupts

    def run(self, task: Task) -> str:
        """Runs the task, from the checkpoint if there is one, and returns the reason why it ended."""
        state = self.checkpoint.load()
        if self.ranks.size == 1:
            with self.interrupts.watched():
                return self._run(task, state)
        # a signal must not interrupt an exchange between processes: all processes stop at the same exchange
        self.ranks.interrupted = lambda: signal.SIGINT in self.interrupts.came
        with self.interrupts.watched(), self.interrupts.held("SIGINT", "SIGCHLD"):
            stopped = self._run(task, state)
            self.interrupts.came.clear()
        return stopped

    def _run(self, task: Task, state: dict[str, Any] | None) -> str:
        stopped = None if state is None else state["stopped"]
        finished = stopped is not None
        try:
            if state is not None:
                with self.interrupts.held():
                    self._restore(task, state)
            while stopped is None:
                task.step()
                stopped = task.stopped
                self.bar.report(task.done, task.text, last=stopped is not None)
                if stopped is None and self.checkpoint.due(task.steps):
                    self._save(task, None)
        except KeyboardInterrupt:
            stopped = "interrupted"
        if _finish(task):
            stopped = "interrupted"
        if finished or stopped == "interrupted":
            return stopped
        try:
            self._save(task, stopped)
        except KeyboardInterrupt:
            return "interrupted"
        return "interrupted" if self.ranks.sum(self.ranks.interrupted())[0] else stopped

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
        self.bar.say(f"Continued from {self.checkpoint.path} after {task.steps} steps.")


def _finish(task: Task) -> bool:
    """Finishes the task, also if it is interrupted meanwhile; returns whether it was."""
    interrupted = False
    while True:
        try:
            task.finish(interrupted)
            return interrupted
        except KeyboardInterrupt:
            interrupted = True


class Interrupts:
    """Delays signals to the main thread while an update must not be interrupted.

    Attributes:
        came: the numbers of the signals that are delayed now.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._holding: set[int | None] = set()
        self._handlers: dict[int, Any] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handles SIGINT in this context, and restores the handlers of all watched signals at its end."""
        try:
            self.watch("SIGINT")
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()

    def watch(self, name: str) -> None:
        """Installs a handler that can delay a signal, unless the signal is ignored."""
        number = getattr(signal, name, None)
        if number is None or number in self._handlers or threading.current_thread() is not threading.main_thread():
            return
        if callable(handler := signal.getsignal(number)):
            self._handlers[number] = handler
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if number in self._holding:
            self.came.append(number)
        else:
            self._handlers[number](number, frame)

    @contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Delays signals, by default all watched ones, until the end of this context."""
        numbers = {getattr(signal, name, None) for name in names} or set(self._handlers)
        outer, self._holding = self._holding, self._holding | numbers
        try:
            yield
        finally:
            self._holding = outer
        for number in [number for number in self.came if number not in outer]:
            self.came.remove(number)
            signal.raise_signal(number)
