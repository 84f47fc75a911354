"""Where the native library is, whether it is used, and its registration with torch."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

_NAMES = ("made.cpp", "reverse.h", "roots.h", "heads.h", "network.h", "kernels.h", "build.py")  # build.py has the flags
SOURCES = [Path(__file__).with_name(name) for name in _NAMES]
_lock = Lock()
_is_enabled = True


def library_path() -> Path:
    """Returns the file of the library: in the folder ``pyro_genexact`` of torch's cache of extensions.

    That is ``$TORCH_EXTENSIONS_DIR`` if it is set, else ``~/.cache/torch_extensions``. The name contains the version of
    torch, the instruction set, and a hash of the sources, so that each of their combinations has its own file.
    """
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_folder / "torch_extensions")
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:12]
    return root / "pyro_genexact" / f"torch{torch.__version__}-{capability()}-{digest}.so"


def capability() -> str:
    """Returns torch's name of the instruction set, such as AVX2."""
    return torch.backends.cpu.get_cpu_capability().replace(" ", "_")


def is_built() -> bool:
    """Returns whether the library has been built for this version of the package and torch, and this instruction set.

    A file that cannot be loaded does not count.
    """
    return _load()


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Context that switches the use of the native operator on or off, for all threads.

    Args:
        on: False to run the loop over sites in Python, even if the operator is built.

    Example:
        >>> from pyro_genexact import flows, native
        >>> with native.enabled(False):
        ...     x = flows.maf(3)().sample((5,))
    """
    global _is_enabled
    before, _is_enabled = _is_enabled, on
    try:
        yield
    finally:
        _is_enabled = before


def available() -> bool:
    """Returns whether the operator is enabled and built; loads it at the first call.

    Compiled, exported and recorded functions do not use it, so that they run where it is not built.
    """
    if not _is_enabled or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return _load_once()


def forget() -> None:
    """Makes the next call look for the library again."""
    _load_once.cache_clear()


@cache
def _load_once() -> bool:
    return _load()


def _load() -> bool:
    try:
        file = library_path()
        if not file.exists():
            return False
    except (OSError, RuntimeError):  # there is no home directory, or the folder or the sources cannot be read
        return False
    with _lock:
        if hasattr(torch.ops.pyro_genexact, "loop"):  # another thread, or an earlier call, has loaded it
            return True
        try:
            torch.ops.load_library(str(file))
        except OSError as error:
            warnings.warn(f"The native library {file} cannot be loaded, so it is not used: {error}", stacklevel=2)
            return False
        torch.library.register_fake("pyro_genexact::loop", _fake_loop)
        torch.library.register_fake("pyro_genexact::step", _fake_step)
        torch.library.register_fake("pyro_genexact::reverse", _fake_reverse)
        return True


def _fake_loop(
    given: Tensor,
    weights: Sequence[Tensor],
    offsets: Sequence[Tensor],
    ends: Tensor,
    direct: bool,
    activation: int,
    categories: int,
    head: str,
    settings: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Returns empty tensors with the shapes and dtypes of the results."""
    rows, sites, _ = given.shape
    like, layers = weights[0], weights[: len(offsets)]
    values = like.new_empty(given.shape, dtype=torch.long if head == "categorical" else like.dtype)
    phi = like.new_empty(rows if keep else 0, sites, layers[-1].shape[0] // sites)
    units = [like.new_empty(layer.shape[1], rows) for layer in layers] if keep else []
    return values, like.new_empty(rows), phi, units


def _fake_step(
    inputs: Tensor,
    units: Sequence[Tensor],
    weights: Sequence[Tensor],
    ends: Tensor,
    direct: bool,
    activation: int,
    low: int,
    high: int,
) -> Tensor:
    """Returns an empty tensor with the shape and dtype of the result."""
    return inputs.new_empty(inputs.shape[0], high - low, units[-1].shape[0] // (ends.shape[1] - 1))


def _fake_reverse(
    g: Tensor,
    gain: Tensor,
    drive: Tensor,
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor],
    ends: Tensor,
    direct: bool,
    activation: int,
) -> tuple[Tensor, list[Tensor]]:
    """Returns empty tensors with the shapes and dtypes of the results."""
    rows, sites, numbers = g.shape
    of_pre = [g.new_empty(level.shape[0], rows) for level in hidden]
    return g.new_empty(sites * numbers, rows), [*of_pre, g.new_empty(sites * drive.shape[2], rows)]
