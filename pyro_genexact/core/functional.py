"""Whether code may branch on the values of tensors, and gradients of several outputs."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is active, under which code cannot branch on values."""
    return torch._C._are_functorch_transforms_active()


def visible(value: Tensor) -> bool:
    """Whether code can branch on the tensor's values: not for meta tensors, nor under ``torch.func``."""
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
