"""Checkpoints of a fit: what a later call with the same arguments continues from."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from .ranks import Ranks

FORMAT = "pyro_genexact checkpoint 1"
MINUTE = 60.0


class Checkpoint:
    """The file of a fit's state, and when it is written next.

    Args:
        path: of the file; None for none.
        every: steps between two checkpoints; by default a minute.
        arguments: of the fit, by name: plain values on which its course depends.
        ranks: the first of them writes.
    """

    def __init__(self, path: str | os.PathLike[str] | None, every: int | None, arguments: dict[str, Any], ranks: Ranks):
        self.path = None if path is None else Path(path)
        self.every, self.arguments, self.ranks = every, arguments, ranks
        self.written = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state to continue from, or None where there is no file yet.

        Raises:
            ValueError: if the file is no checkpoint, or one of other arguments.
        """
        if self.path is None:
            return None
        with self.ranks.agreed():
            content = self._read(self.path) if self.ranks.first else None
        return self.ranks.gather(content)[0]

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file of anything may raise
            raise ValueError(
                f"Expected checkpoint to be a file that a fit has written; {path} is truncated or of another "
                f"kind ({type(error).__name__}). Delete it to start anew."
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f"Expected checkpoint to be a file that a fit has written; {path} has other content. "
                "Choose another path."
            )
        old = content["arguments"]
        other = [
            f"{name}={old.get(name)!r} instead of {self.arguments.get(name)!r}"
            for name in [*self.arguments, *(old.keys() - self.arguments.keys())]
            if old.get(name) != self.arguments.get(name)
        ]
        if other:
            raise ValueError(
                f"Expected checkpoint of a fit with the same arguments; {path} was written with "
                f"{', '.join(other)}. Choose another path, or delete the file to start anew."
            )
        return content["state"]

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after so many steps: the same in all processes."""
        if self.path is None:
            return False
        if self.every is not None:
            return step % self.every == 0
        late = self.ranks.first and time.monotonic() - self.written > MINUTE
        return self.ranks.sum(late)[0] > 0

    def save(self, state: dict[str, Any]) -> None:
        """Writes a temporary file and renames it, so that a file that is there is always whole."""
        if self.path is None:
            return
        with self.ranks.agreed():
            if self.ranks.first:
                part = self.path.with_name(self.path.name + ".part")
                content = {"format": FORMAT, "arguments": self.arguments, "state": state}
                try:
                    with open(part, "wb") as file:
                        torch.save(content, file)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(part, self.path)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
        self.written = time.monotonic()
