"""Functions that ``torch.compile`` compiles at the first call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch


class Compiled:
    """A function, compiled as a whole at its first call, that runs without validation.

    Errors of the compiler are raised with a note.

    Attributes:
        ready: whether the caller has evaluated the function once without compilation.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.ready = function, False
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(self.function, fullgraph=True)
        with compilation():
            return self._compiled(*args)


@contextmanager
def compilation() -> Iterator[None]:
    """Switches validation off, since it cannot be compiled, lets torch trace recurrent networks, and adds a note to its errors."""
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException

    try:
        with pyro.validation_enabled(False), config.patch(allow_rnn=True):
            yield
    except TorchDynamoException as error:
        error.add_note(
            "Raised while torch compiled the function; call the fit with compile=False to run without compilation."
        )
        raise
