"""For every fit: train and eval modes restored, and progress shown on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from tqdm import tqdm


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Gives each submodule its train or eval mode back."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class Progress(tqdm):  # type: ignore[type-arg]
    """Reports on stderr: a bar in a terminal, about ten lines elsewhere; a context manager.

    Args:
        total: how many units there are, at most.
        unit: "step", "epoch", ...
        on: whether there are reports at all.
    """

    def __init__(self, total: int, unit: str, on: bool) -> None:
        super().__init__(total=total, unit=unit, disable=not (on and sys.stderr.isatty()))
        self.unit, self.on, self.every = unit, on, max(1, total // (10 if self.disable else 100))

    def report(self, done: int, text: Callable[[], str], last: bool = False) -> None:
        """After each unit; the text is asked for where it is shown, as that of the last unit always is."""
        if not self.on or (done % self.every and done != self.total and not last):
            return
        if self.disable:
            print(f"{done}/{self.total} {self.unit}s: {text()}", file=sys.stderr, flush=True)
        else:
            self.set_postfix_str(text(), refresh=False)
            self.update(done - self.n)
