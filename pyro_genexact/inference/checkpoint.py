"""Checkpoint files, from which a later call of a fit with the same arguments continues."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ranks import Ranks

FORMAT = "pyro_genexact checkpoint 1"
MINUTE = 60.0
NUMPY: list[Any] = [
    np.dtype,
    np.float64(0).__reduce__()[0],
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]  # types of its scalars, which torch.load must be allowed to read


class Checkpoint:
    """The checkpoint file of a fit.

    Args:
        path: the path of the file, or None for no checkpoints.
        every: the number of steps between two checkpoints; by default they are a minute apart.
        arguments: the arguments of the fit by name, as plain values; a later call must have the same ones.
        ranks: the processes of the fit. The first one writes the file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, every: int | None, arguments: dict[str, Any], ranks: Ranks):
        self.path = None if path is None else Path(path)
        self.every, self.arguments, self.ranks = every, arguments, ranks
        self.written = time.monotonic()
        self.readable = False  # whether a file that this object wrote could be read again

    def load(self) -> dict[str, Any] | None:
        """Returns the state to continue from, or None if there is no file yet.

        Raises:
            ValueError: if the file is not a checkpoint, or was written by a fit with other arguments.
        """
        if self.path is None:
            return None
        with self.ranks.agreed():
            if self.ranks.first and not self.path.parent.is_dir():
                raise ValueError(f"Expected checkpoint in a folder that exists; got {self.path}.")
            content = self._read(self.path) if self.ranks.first else None
        return self.ranks.gather(content)[0]

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            content = _content(path)
        except Exception as error:  # arbitrary files can raise anything
            raise ValueError(
                f"Expected checkpoint to be a file that a fit has written; {path} is truncated or of another "
                f"kind ({type(error).__name__}). Delete it to start again."
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
                f"{', '.join(other)}. Choose another path, or delete the file to start again."
            )
        return content["state"]

    def due(self, step: int) -> bool:
        """Returns whether to write a checkpoint after this number of steps; the result is the same in all processes."""
        if self.path is None:
            return False
        if self.every is not None:
            return step % self.every == 0
        late = self.ranks.first and time.monotonic() - self.written > MINUTE
        return self.ranks.sum(late)[0] > 0

    def save(self, state: dict[str, Any]) -> None:
        """Writes a temporary file and renames it, so that an interruption leaves the previous file intact."""
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
                    self._check_readable(part)
                    os.replace(part, self.path)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
        self.written = time.monotonic()

    def _check_readable(self, part: Path) -> None:
        if self.readable:  # all states of one fit have the same structure
            return
        try:
            _content(part)
        except Exception as error:
            raise ValueError(
                "Expected the states of optimizer, schedule and module to consist of tensors, numbers, strings, lists and "
                "dicts; a checkpoint of other objects could not be read again."
            ) from error
        self.readable = True


def _content(path: Path) -> Any:
    with torch.serialization.safe_globals(NUMPY):
        return torch.load(path, map_location="cpu", weights_only=True)


def digest(value: Any) -> str:
    """Returns a short hash of tensors, arrays, numbers and strings, also in dicts and lists; of other objects, of their types."""
    content = hashlib.sha256()
    _feed(content, value)
    return content.hexdigest()[:8]


def _feed(content: Any, value: Any) -> None:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        content.update(f"{value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        content.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        _feed(content, [*value.items()])
    elif isinstance(value, (tuple, list)):
        content.update(str(len(value)).encode())
        for part in value:
            _feed(content, part)
    else:
        content.update(
            (repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__).encode()
        )
