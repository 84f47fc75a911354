"""The law of waits: code reads no values, for which it would wait until a device has finished its queue."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.functional import as_on_a_device
from .helpers import broken

# operations that copy a value to the host on an accelerator, or whose result's shape depends on values
_WAITING = {
    *("_local_scalar_dense", "equal", "allclose", "nonzero", "argwhere", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_linalg_check_errors"),
}
_READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}  # read tensors on the CPU without an operation
_MAKING = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}  # copy numbers from the host
_READS_ON_THE_CPU_ONLY = {torch.nn.functional.one_hot}


def count_waits(run: Callable[[], Any]) -> Counter[str]:
    """Counts the waits of ``run()`` for a device, by operation and line.

    A wait is an operation that reads values of a tensor on a device (``item``, ``bool``, ``tolist``, ``cpu``, ``torch.equal``,
    checks of matrices), whose result's shape depends on values (``nonzero``, Boolean indices, ``unique``), or that copies
    from the host to the device (``torch.tensor(..., device=x.device)``).

    No device is needed: tensors on the CPU stand for tensors on a device, and the package behaves as on a device. Tensors that
    are made with ``device="cpu"`` during the call stay on the CPU by design, as do results of only such tensors; reading
    them is free.

    Args:
        run: a function without arguments. Backward passes in the same thread are counted.

    Returns:
        the number of waits for each text such as ``"item in transforms/base.py:24"``.

    Example:
        >>> import torch
        >>> x = torch.ones(3)
        >>> sum(count_waits(lambda: x[x > 0].sum().item()).values())
        2
    """
    found: Counter[str] = Counter()
    with as_on_a_device(), _Functions(found) as functions, _Operations(found, functions):
        run()
    return found


def waits(run: Callable[[], Any], allowed: int = 0) -> None:
    """Checks that ``run()`` waits for a device at most ``allowed`` times, as :func:`count_waits` counts.

    Validation makes waits by design. Switch it off: ``pyro.enable_validation(False)``.

    Args:
        run: a function without arguments.
        allowed: the largest number of waits.

    Example:
        >>> import torch
        >>> x = torch.ones(3)
        >>> waits(lambda: torch.where(x > 0, x, 0.0).sum())
    """
    found = count_waits(run)
    if (total := sum(found.values())) > allowed:
        places = ", ".join(f"{number} {place}" for place, number in found.most_common())
        broken("waits", "values are not read", f"{total} waits, not {allowed}: {places}")


class _Functions(TorchFunctionMode):
    """Counts calls that dispatch no operation on the CPU, and marks tensors that are on the CPU by design."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found, self.free = found, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device", next((a for a in args[1:] if isinstance(a, str)), None))
        moved = func is Tensor.to and _by_design(args[0]) and _to_a_device(device, args, kwargs)
        if func in _READING or (func is Tensor.to and device == "cpu"):
            waits = not _by_design(args[0])
        elif func in _MAKING:
            numbers = device != "cpu" and not isinstance(args[-1], Tensor)
            waits = numbers and (device is not None or func is Tensor.new_tensor)
        else:
            waits = moved and not kwargs.get("non_blocking")
        if waits:
            self.found[_place(func.__name__)] += 1
        before, self.free = self.free, self.free or func in _READS_ON_THE_CPU_ONLY
        try:
            result = func(*args, **kwargs)
        finally:
            self.free = before
        if func in (Tensor.to, Tensor.cpu) and result is args[0]:  # on a device, it would be a copy
            result = result.view_as(result)
        if moved:
            del result._on_the_host
        elif device == "cpu" or func is Tensor.cpu:
            _mark(result)
        return result


class _Operations(TorchDispatchMode):
    """Counts operations that wait."""

    def __init__(self, found: Counter[str], functions: _Functions) -> None:
        super().__init__()
        self.found, self.functions = found, functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        by_design = bool(given) and all(_by_design(value) for value in given)
        name = func.overloadpacket.__name__
        if not (by_design or self.functions.free) and _waits(func, name, args, kwargs):
            self.found[_place("item" if name == "_local_scalar_dense" else name)] += 1
        result = NotImplemented
        if func._can_decompose():  # a composite operation, as in an autograd function
            with self:
                result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if by_design:
            _mark(result)
        return result


def _waits(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation waits on an accelerator."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        boolean = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return boolean and not (
            name != "index" and args[2].numel() == 1 and args[2].dim() == 0
        )  # which fills by a mask
    if name == "repeat_interleave":
        return isinstance(args[-1], Tensor) and kwargs.get("output_size") is None
    if name == "multinomial":  # checks its probabilities
        return args[1] == 1 or not (args[2] if len(args) > 2 else kwargs.get("replacement"))
    if name in ("masked_fill", "masked_fill_") and isinstance(args[2], Tensor):  # whose value is read
        return not _by_design(args[2])
    return name in _WAITING


def _to_a_device(device: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of ``Tensor.to`` names a device that is not the text "cpu", or another tensor."""
    return any(isinstance(to, (torch.device, Tensor)) for to in (device, *args[1:], kwargs.get("other")))


def _by_design(value: Any) -> bool:
    return hasattr(value, "_on_the_host")


def _mark(values: Any) -> None:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            value._on_the_host = True  # type: ignore[attr-defined]


def _place(what: str) -> str:
    """Returns the operation, with the file and line of the innermost code outside of torch and of this file."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch", __name__)):
        frame = frame.f_back
    file = frame.f_code.co_filename.rsplit("pyro_genexact/", 1)[-1]
    return f"{what} in {file}:{frame.f_lineno}"
