"""``save`` and ``load``: whole modules in files that cannot execute code when they are loaded."""

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

_STAMP = "pyro_genexact "  # the comment of the archive is this and the version
_CALLS = b"_rebuild_from_type_v2"  # torch allows it, but it can call any object and set attributes of classes
_DANGEROUS = {"builtins", "importlib", "operator", "os", "posix", "nt", "runpy", "subprocess", "sys"}
_LOCK = threading.RLock()  # torch's list of safe names is global; reentrant, as an allowed class may load another file
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
    """Saves a module to a file that :func:`load` can read.

    The file contains the whole module with its parameters, settings and train or eval modes, so loading needs no arguments of
    constructors. It contains no gradients and no caches of transforms. The file is replaced only when the new one is
    complete; after an error, a previous file is unchanged.

    Args:
        module: a module of this package, which may contain modules of ``torch.nn`` and of your own classes.
        path: the path of the file, usually with the suffix ``.pt``.

    Raises:
        TypeError: if ``module`` is not a module, or contains objects that cannot be saved: lambdas, methods, functions and
            classes that are defined within functions, subclasses of tensors, open files, locks.
        RuntimeError: if a module is parametrised (by ``torch.nn.utils.parametrizations``); save its ``state_dict``
            instead.

    Example:
        >>> import tempfile, torch
        >>> import pyro_genexact as gx
        >>> flow = gx.flows.maf(3, context=2, hidden=(8,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gx.save(flow, f"{folder}/flow.pt")
        ...     same = gx.load(f"{folder}/flow.pt")
        >>> d, x = flow(torch.ones(2)), torch.zeros(5, 3)
        >>> torch.equal(same(torch.ones(2)).log_prob(x), d.log_prob(x))
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
    """Loads a module from a file that :func:`save` wrote.

    Files from untrusted sources are safe to load: a file may refer only to classes and functions on a list of exact names,
    and to those that you allow. The list contains the classes of this package, the modules and activations of torch, and
    the families, constraints and transforms of torch and Pyro. For a file with other names, ``load`` raises an error
    before it loads anything.
    Names given to ``torch.serialization.add_safe_globals`` are allowed too; torch's list does not change.

    Args:
        path: the path of the file.
        device: the device of the tensors; by default, the devices at the time of saving.
        allow: further classes and functions to which the file may refer, such as modules of your own. The file can call them
            with any arguments. Use a pair ``(class, "old_module.Name")`` for a class that was moved or renamed since.

    Returns:
        The module, in the train or eval mode in which it was saved.

    Raises:
        ValueError: if the file was not written by :func:`save`, is incomplete or damaged, was written by another major
            version, or refers to a name that is not allowed.
        TypeError: if ``allow`` is not a sequence of classes and functions.

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
        except (pickle.UnpicklingError, EOFError) as error:  # torch's text suggests loading without a list
            raise ValueError(
                f"Expected a file written by pyro_genexact.save; got {path}, which was changed."
            ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"Expected a file with a module; got {path} with {type(module).__name__}.")
    restore_derived(module)
    return module


def _loaded(file: IO[bytes], path: Any, names: dict[str, Any], device: Any) -> Any:
    """Returns the content of the file if it refers only to these names."""
    file.seek(0)
    if _CALLS in torch._C.PyTorchFileReader(file).get_record("data.pkl"):
        raise pickle.UnpicklingError(f"{path} has {_CALLS.decode()}")
    file.seek(0)
    needed = sorted(get_unsafe_globals_in_checkpoint(file))
    if unlisted := [name for name in needed if name not in names]:
        got = f"Expected only listed classes in {path}; got {', '.join(unlisted)}."
        if any(name.partition(".")[0] in _DANGEROUS for name in unlisted):
            raise ValueError(f"{got} These could execute arbitrary code on your machine.")
        kinds = ", ".join(name.rpartition(".")[2] for name in unlisted)
        raise ValueError(f"{got} Pass allow=[{kinds}] if you trust the file.")
    file.seek(0)
    with safe_globals([(names[name], name) for name in needed]):  # restores torch's list afterwards
        return torch.load(file, map_location=None if device is None else torch.device(device), weights_only=True)


def _stamped(file: IO[bytes], path: Any) -> str:
    """Returns the version in the file, after checking that the file is complete."""
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
        raise TypeError(f"Expected allow to contain classes and functions; got {value!r}.")
    return value


class _Pickler(pickle.Pickler):
    """Pickles classes and functions by importable names, and leaves out caches of transforms and derived buffers."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _NAMED):
            if not _importable(value):
                raise pickle.PicklingError(
                    f"{value!r} cannot be imported by name; define it at the top level of a file"
                )
            if value.__name__ == _CALLS.decode():
                raise pickle.PicklingError("subclasses of tensors cannot be saved; convert them to plain tensors")
            return value.__name__ if callable_of_c(value) else NotImplemented
        if (
            type(value) in (Tensor, nn.Parameter) and value.__dict__
        ):  # drops attributes, which only _CALLS could restore
            plain = value.detach()  # Pyro's parameter store, for example, sets attributes of parameters
            plain = nn.Parameter(plain, False) if isinstance(value, nn.Parameter) else plain
            return plain.requires_grad_(value.requires_grad).__reduce_ex__(2)
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
    """The ``pickle_module`` of torch.save."""

    Pickler = _Pickler


def _importable(value: Any) -> bool:
    """Returns whether a class or function can be imported by the name that a pickle uses for it."""
    found = sys.modules.get(getattr(value, "__module__", None) or "")
    for name in (value.__name__ if callable_of_c(value) else value.__qualname__).split("."):
        found = getattr(found, name, None)
    return found is value
