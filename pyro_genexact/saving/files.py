"""save and load: a whole module in one file, which runs nothing of its own when it is loaded."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import types
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..core.buffers import WithDerived, restore_derived, without_derived
from ..core.leaves import FORGOTTEN
from ..version import __version__
from .listed import callable_of_c, full_name, listed

_STAMP = "pyro_genexact "  # the comment of the archive: this and the version
_CALLS = b"_rebuild_from_type_v2"  # torch lists it, but it calls any object and can set attributes of classes
_DANGEROUS = {"builtins", "importlib", "operator", "os", "posix", "nt", "runpy", "subprocess", "sys"}
_LOCK = (
    threading.RLock()
)  # torch's list of safe names is one for all threads; an allowed class may load a file of its own
_NAMED = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
)


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a module with its parameters, settings and modes to a file that :func:`load` reads.

    The file holds the whole module, so that no constructor's arguments need be repeated; no gradients, and nothing that
    transforms remember. The module stays as it is. The file appears at once when it is complete: an error leaves one that was
    there before as it was.

    Args:
        module: of this package, with modules of ``torch.nn`` and of your own classes.
        path: of the file, usually ``*.pt``.

    Raises:
        TypeError: if ``module`` is no module, or holds what a file cannot name: lambdas, methods, functions and classes
            that are defined within functions, tensors of subclasses, open files, locks.
        RuntimeError: if a module is parametrised (by ``torch.nn.utils.parametrizations``): save its ``state_dict``.

    Example:
        >>> import tempfile, torch
        >>> import pyro_genexact as gx
        >>> flow = gx.flows.maf(3, context=2, hidden=(8,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gx.save(flow, f"{folder}/flow.pt")
        ...     same = gx.load(f"{folder}/flow.pt")
        >>> x, context = torch.zeros(5, 3), torch.ones(2)
        >>> torch.equal(same(context).log_prob(x), flow(context).log_prob(x))
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected module to be a torch.nn.Module; got {type(module).__name__}.")
    part = Path(f"{os.fspath(path)}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            torch.save(module, file, pickle_module=_Pickles)
        with zipfile.ZipFile(part, "a") as archive:
            archive.comment = f"{_STAMP}{__version__}".encode()
        part.replace(path)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"Expected a module that can be saved; got {type(module).__name__}: {error}.") from error
    finally:
        part.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], device: str | torch.device | None = None, allow: Sequence[Any] = ()
) -> nn.Module:
    """The module of a file that :func:`save` wrote.

    Files from strangers are safe to load: the classes and functions that a file names must be among those listed by exact
    name, which are the ones of this package, the modules and activations of torch, and the families, constraints and transforms
    of torch and Pyro; or you allow them. Any other is refused before anything is loaded. What
    ``torch.serialization.add_safe_globals`` was given counts as listed. The list that torch has for the process is the same
    afterwards.

    Args:
        path: of the file.
        device: where the tensors go; by default those where they were.
        allow: more classes and functions that the file may name, such as modules of your own: it can call them with any
            arguments. A pair ``(class, "old_module.Name")`` gives the name that the file has for one that was moved.

    Raises:
        ValueError: if the file was not written by :func:`save`, is incomplete or damaged, is of another major version, or names
            something that is not listed.
        TypeError: if ``allow`` is no sequence of classes and functions.

    Example:
        See :func:`save`.
    """
    names = listed() | _allowed(allow)
    with open(path, "rb") as file, _LOCK:
        version = _stamped(file, path)
        if (major := version.partition(".")[0]) != __version__.partition(".")[0]:
            raise ValueError(
                f"Expected a file of pyro_genexact {__version__}; got {path} of version {version}. "
                f"Install pyro-genexact=={major}.* to load it."
            )
        try:
            module = _loaded(file, path, names, device)
        except (pickle.UnpicklingError, EOFError) as error:  # torch's own text says how to load it without any list
            raise ValueError(
                f"Expected a file written by pyro_genexact.save; got {path}, which was changed."
            ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"Expected a file with a module; got {path} with {type(module).__name__}.")
    restore_derived(module)
    return module


def _loaded(file: IO[bytes], path: Any, names: dict[str, Any], device: Any) -> Any:
    """What the file holds, if it names only these."""
    file.seek(0)
    if _CALLS in torch._C.PyTorchFileReader(file).get_record("data.pkl"):
        raise pickle.UnpicklingError(f"{path} has {_CALLS.decode()}")
    file.seek(0)
    needed = sorted(get_unsafe_globals_in_checkpoint(file))
    if unlisted := [name for name in needed if name not in names]:
        got = f"Expected only listed classes in {path}; got {', '.join(unlisted)}."
        if any(name.partition(".")[0] in _DANGEROUS for name in unlisted):
            raise ValueError(f"{got} With these the file could run anything on your machine.")
        kinds = ", ".join(name.rpartition(".")[2] for name in unlisted)
        raise ValueError(f"{got} Pass allow=[{kinds}] if you trust the file.")
    file.seek(0)
    with safe_globals([(names[name], name) for name in needed]):  # pairs, none of which was there before
        return torch.load(file, map_location=None if device is None else torch.device(device), weights_only=True)


def _stamped(file: IO[bytes], path: Any) -> str:
    """The version in the file; an error if there is none."""
    expected = f"Expected a file written by pyro_genexact.save; got {path}"
    try:
        with zipfile.ZipFile(file) as archive:
            comment = archive.comment.decode(errors="replace")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{expected}, which is incomplete or of another kind.") from error
    if damaged:
        raise ValueError(f"{expected}, whose checksums differ: it is damaged.")
    if not comment.startswith(_STAMP):
        raise ValueError(
            f"{expected}, which torch.save wrote. Load a state_dict with "
            "module.load_state_dict(torch.load(path, weights_only=True))."
        )
    return comment.removeprefix(_STAMP)


def _allowed(allow: Any) -> dict[str, Any]:
    if not isinstance(allow, (list, tuple, set, frozenset)):
        raise TypeError(f"Expected allow to be a sequence of classes and functions; got {allow!r}.")
    pairs = [one if isinstance(one, tuple) else (one, full_name(_checked(one))) for one in allow]
    return {name: _checked(value) for value, name in pairs}


def _checked(value: Any) -> Any:
    if not isinstance(value, _NAMED):
        raise TypeError(f"Expected allow to hold classes and functions; got {value!r}.")
    return value


class _Pickler(pickle.Pickler):
    """Names classes and functions as they can be imported, and leaves out what transforms remember and derived buffers."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _NAMED):
            if not _importable(value):
                raise pickle.PicklingError(
                    f"{value!r} cannot be imported by name; define it at the top level of a file"
                )
            if value.__name__ == _CALLS.decode():
                raise pickle.PicklingError("tensors of subclasses have no place in a file; make them plain tensors")
            return value.__name__ if callable_of_c(value) else NotImplemented
        if type(value) is Tensor and value.__dict__:  # without attributes of its own, which only _CALLS would set
            return value.detach().requires_grad_(value.requires_grad).__reduce_ex__(2)
        if not isinstance(value, (Transform, WithDerived)):
            return NotImplemented
        reduced: Any = value.__reduce_ex__(2)
        make, args, state, *rest = reduced
        if isinstance(value, Transform):
            state = state | {name: forgotten for name, forgotten in FORGOTTEN.items() if name in state}
        if isinstance(value, WithDerived):
            state = without_derived(state)
        return make, args, state, *rest


class _Pickles:
    """What torch.save takes for the pickle module."""

    Pickler = _Pickler


def _importable(value: Any) -> bool:
    """Whether the name that a pickle has for a class or function leads to it."""
    found = sys.modules.get(getattr(value, "__module__", None) or "")
    for name in (value.__name__ if callable_of_c(value) else value.__qualname__).split("."):
        found = getattr(found, name, None)
    return found is value
