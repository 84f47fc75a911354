"""Whether code may branch on the values of tensors, and gradients of several outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from math import isfinite

import torch
from torch import Tensor
from torch.distributions import Distribution

_ON_A_DEVICE = ContextVar("_ON_A_DEVICE", default=False)
_RECORDING = ContextVar("_RECORDING", default=False)


def compiling() -> bool:
    """Whether torch compiles, exports or records the operations of the code."""
    return torch.compiler.is_compiling() or _RECORDING.get()


@contextmanager
def _raised(flag: ContextVar[bool]) -> Iterator[None]:
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


def recording() -> AbstractContextManager[None]:
    """Returns a context in which the operations are recorded, by ``make_fx``."""
    return _raised(_RECORDING)


def transformed() -> bool:
    """Whether code cannot branch on values: under transforms of ``torch.func``, and while torch compiles or exports."""
    return compiling() or torch._C._are_functorch_transforms_active()


def visible(value: Tensor) -> bool:
    """Whether code can branch on the tensor's values: neither for meta tensors, nor if :func:`transformed`."""
    return not (value.is_meta or transformed())


def at_hand(value: Tensor) -> bool:
    """Whether reading values is free: code can branch on them, and they are on the CPU.

    To read a value on a device, code waits until the device has finished its queue. Branch-free code for the device gives
    the same numbers.
    """
    return visible(value) and value.device.type == "cpu" and not _ON_A_DEVICE.get()


def checkable(value: Tensor) -> bool:
    """Whether a check reads values: if that is free (:func:`at_hand`), or if torch validates arguments by default."""
    return at_hand(value) or (visible(value) and bool(Distribution._validate_args))


def assert_later(good: Tensor, message: str) -> None:
    """Raises a RuntimeError unless all values are True; on a GPU when it gets there, so that nothing waits for it."""
    if visible(good) and good.device.type in ("cpu", "cuda"):
        torch._assert_async(good.all(), message)
    elif visible(good) and not good.all():  # other devices have no such operation
        raise RuntimeError(message)


def as_on_a_device() -> AbstractContextManager[None]:
    """Returns a context in which tensors on the CPU count as tensors on a device: nothing is :func:`at_hand`."""
    return _raised(_ON_A_DEVICE)


def all_finite(x: Tensor) -> bool:
    """Returns whether all values are known to be finite; False also if the values cannot be read."""
    return at_hand(x) and isfinite(x.detach().sum().item())


@torch.no_grad()
def some_not_finite(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """Returns whether an element of the tensors is not finite, as a Boolean () that is not read."""
    numbers = [t for t in tensors if t.is_floating_point() and t.numel()] or [like.new_zeros(1)]
    zeros = torch._foreach_mul(torch._foreach_norm(numbers, torch.inf), 0.0)  # NaN for inf and NaN
    return torch.stack([zero.to(like.dtype) for zero in zeros]).sum() != 0


def vjp(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Returns the gradients of the inputs, with zeros for inputs that no output depends on."""
    kept = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not kept:
        return [torch.zeros_like(i) for i in inputs]
    chosen = None if grads is None else [grads[i] for i in kept]
    return list(
        torch.autograd.grad(
            [outputs[i] for i in kept], inputs, chosen, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )
