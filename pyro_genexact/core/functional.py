"""Whether torch.func or meta forbids to read values; gradients of several outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def transformed() -> bool:
    """Whether torch.func is at work, under which no look at values is possible."""
    return torch._C._are_functorch_transforms_active()


def visible(value: Tensor) -> bool:
    """Whether values can be looked at, to check them or to choose a way."""
    return not (value.is_meta or transformed())


def vjp(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Gradients of the inputs, zeros where nothing depends on them."""
    kept = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not kept:
        return [torch.zeros_like(i) for i in inputs]
    chosen = None if grads is None else [grads[i] for i in kept]
    return list(
        torch.autograd.grad(
            [outputs[i] for i in kept], inputs, chosen, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )
