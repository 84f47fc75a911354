"""Shared by all fits: the Fabric, restoring train and eval modes, and progress reports on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

STRATEGIES = ("SingleDeviceStrategy", "SingleDeviceXLAStrategy", "DDPStrategy")
PRECISIONS = ("32-true", "bf16-mixed")
FUSED = ("cpu", "cuda")  # devices with a fused Adam
PATIENCE = 60.0  # seconds after which a line of progress is printed in any case


def fabric_of(fabric: Any, device: torch.device) -> Any:
    """Checks the user's Fabric, or creates one with a single device."""
    if fabric is None:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.single_device import SingleDeviceStrategy

        return Fabric(accelerator=device.type, devices=1, strategy=SingleDeviceStrategy(device))
    if not all(hasattr(fabric, name) for name in ("setup", "backward", "strategy", "world_size")):
        raise TypeError(f"Expected fabric to be a lightning Fabric; got {type(fabric).__name__}.")
    strategy = fabric.strategy
    if type(strategy).__name__ not in STRATEGIES:
        raise ValueError(
            f"Expected fabric with one device or strategy 'ddp' (each process needs all parameters); got "
            f"{type(strategy).__name__}."
        )
    if strategy.precision.precision not in PRECISIONS:
        raise ValueError(
            f"Expected fabric with precision {' or '.join(map(repr, PRECISIONS))}; got {strategy.precision.precision!r}."
        )
    return fabric


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Returns Adam for the parameters, fused if their devices and dtypes permit."""
    fused = all(p.device.type in FUSED and p.is_floating_point() for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=fused)


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Restores the train or eval mode of each submodule at the end of this context."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class Progress(tqdm):  # type: ignore[type-arg]
    """Reports progress on stderr: a bar in a terminal, elsewhere about ten lines and at least one per minute.

    Args:
        total: the maximum number of units.
        unit: the name of a unit, such as "step" or "epoch".
        on: whether to report at all.
    """

    monitor_interval = 0  # no monitor thread

    def __init__(self, total: int, unit: str, on: bool) -> None:
        form = "{l_bar}{bar}| {n:.4g}/{total} " + unit + "s [{elapsed}<{remaining}{postfix}]"
        super().__init__(total=total, bar_format=form, disable=not (on and sys.stderr.isatty()))
        self.unit, self.on, self.every = unit, on, max(1, total // (10 if self.disable else 100))
        self.next, self.said = float(self.every), time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line to stderr, above the bar if there is one."""
        if self.on:
            self.write(text, file=sys.stderr)

    def report(self, done: float, text: Callable[[], str], last: bool = False) -> None:
        """Called after each step. Reports if it is time to, and always if this is the last step.

        Args:
            done: the number of units done.
            text: returns the text; called only if there is a report.
            last: whether this is the last step.
        """
        if not self.on:
            return
        silence = time.monotonic() - self.said
        if self.disable:
            if done < self.next and not last and silence < PATIENCE:
                return
            whole = f"{done:.0f}" if float(done).is_integer() else f"{done:.2f}"
            print(f"{whole}/{self.total} {self.unit}s: {text()}", file=sys.stderr, flush=True)
        else:
            if silence < self.mininterval and not last:
                return
            self.set_postfix_str(text(), refresh=False)
            self.n = done
            self.refresh()
        self.said = time.monotonic()
        while self.next <= done:
            self.next += self.every
