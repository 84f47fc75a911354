"""The engine under ``fit`` and ``fit_guide``: steps until the end, with checkpoints, progress and interrupts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from ..core.random import random_state, set_random_state
from .checkpoint import Checkpoint
from .fitting import Progress
from .ranks import Ranks

STOPS = [signal.SIGINT, *([signal.SIGCHLD] if hasattr(signal, "SIGCHLD") else [])]  # whose handlers may raise


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
    """

    ranks: Ranks
    device: torch.device
    clock: Clock
    checkpoint: Checkpoint
    bar: Progress

    def run(self, task: Task) -> str:
        """Continues from the checkpoint, if there is one; returns why the task ended."""
        state = self.checkpoint.load()
        if self.ranks.size == 1:
            return self._run(task, state)
        with held(signal.SIGINT) as self.ranks.interrupts:  # all processes stop after the same step
            return self._run(task, state)

    def _run(self, task: Task, state: dict[str, Any] | None) -> str:
        stopped = None if state is None else state["stopped"]
        finished = stopped is not None
        try:
            if state is not None:
                uninterrupted(partial(self._restore, task, state))
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
        return "interrupted" if self.ranks.sum(bool(self.ranks.interrupts))[0] else stopped

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


@contextmanager
def held(*numbers: int) -> Iterator[list[int]]:
    """Collects signals of the main thread in place of calling their handlers."""
    came: list[int] = []
    handlers: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if callable(signal.getsignal(number)):  # not if it is ignored
                    handlers[number] = signal.signal(number, lambda number, _: came.append(number))
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def uninterrupted(function: Callable[[], None]) -> None:
    """Calls a short function that no interrupt, or word of a dead worker of a DataLoader, may cut in two; they come after it."""
    with held(*STOPS) as came:
        function()
    for number in came:
        signal.raise_signal(number)
