"""Whether code may branch on the values of tensors, and gradients of several outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import isfinite

import torch
from torch import Tensor

_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


def compiling() -> bool:
    """Whether torch compiles, exports or records the operations of the code."""
    return torch.compiler.is_compiling() or _RECORDING.get()


@contextmanager
def recording() -> Iterator[None]:
    """Declares that the operations in this context are recorded, by ``make_fx``."""
    token = _RECORDING.set(True)
    try:
        yield
    finally:
        _RECORDING.reset(token)


def transformed() -> bool:
    """Whether code must consist of plain operations and cannot branch on values.

    This is so under transforms of ``torch.func``, and while torch compiles, exports or traces.
    """
    return (
        compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def visible(value: Tensor) -> bool:
    """Whether code can branch on the tensor's values: neither for meta tensors, nor if :func:`transformed`."""
    return not (value.is_meta or transformed())


def all_finite(x: Tensor) -> bool:
    """Returns whether all values are known to be finite; False also if the values cannot be read."""
    return visible(x) and isfinite(x.detach().sum().item())


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
