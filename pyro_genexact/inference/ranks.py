"""Processes that train one module together: sums over them, and errors that are raised in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import distributed


class Ranks:
    """The processes of a Fabric, which exchange numbers through a group on the CPU, so that no GPU waits for them.

    Args:
        fabric: a launched Fabric with one or several devices.
    """

    def __init__(self, fabric: Any) -> None:
        self.rank, self.size = fabric.global_rank, fabric.world_size
        if self.size > 1 and not distributed.is_initialized():
            raise ValueError(
                "Expected a fabric with several devices to be launched; call fabric.launch() before the fit."
            )
        self._group = distributed.new_group(backend="gloo") if self.size > 1 else None
        self.interrupted: Callable[[], bool] = lambda: False  # whether this process was; exchanged by ``agreed``

    def close(self) -> None:
        """Destroys the process group, also if this object stays in a reference cycle.

        A group that outlives the fit would end the workers of later data loaders: they are forks without its threads, and
        a garbage collection in them would wait for those threads.
        """
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return bool(self.rank == 0)

    def sum(self, *values: float) -> tuple[float, ...]:
        """Returns the sums of values over the processes."""
        if self.size == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
        distributed.all_reduce(numbers, group=self._group)
        return tuple(numbers.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def agreed(self, numbers: list[float] | None = None) -> Iterator[None]:
        """Raises an exception or interrupt of one process in all processes.

        The processes must not exchange anything else in this context. At its end they exchange ``numbers``, a list of the
        same length in all processes, and replace them by their sums.
        """
        numbers = [] if numbers is None else numbers
        error: BaseException | None = None
        try:
            yield
        except (Exception, KeyboardInterrupt) as raised:
            if self.size == 1:
                raise
            error = raised
        failed, interrupted, *numbers[:] = self.sum(error is not None, self.interrupted(), *numbers)
        if failed:
            self._raise(error)
        if interrupted:
            raise KeyboardInterrupt

    def _raise(self, error: BaseException | None) -> NoReturn:
        errors = self.gather(error and (type(error) is KeyboardInterrupt, f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if all(one[0] for one in errors if one):
            raise KeyboardInterrupt
        rank, text = next((rank, one[1]) for rank, one in enumerate(errors) if one and not one[0])
        raise RuntimeError(f"Process {rank} of this fit raised {text}")
