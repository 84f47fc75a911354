"""Broadcasting of batch shapes, checks of event shapes, and sums over event dims."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import index
from typing import Any

import torch
from torch import Tensor

from .checks import check_widths


def broadcast_batches(**shapes: Sequence[int]) -> torch.Size:
    """Returns the shape that batch shapes broadcast to.

    Raises:
        ValueError: if they do not broadcast. The message names each of them.
    """
    try:
        return broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"Expected batch shapes that broadcast; got {got}.") from error


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Returns ``torch.broadcast_shapes(*shapes)``, which is slow and only called if the shapes differ."""
    given = [tuple(shape) for shape in shapes if shape] or [()]
    if all(shape == given[0] for shape in given[1:]):  # a set would fix the sizes while torch compiles
        return torch.Size(given[0])
    return torch.broadcast_shapes(*shapes)


def shape_of(event_shape: Any) -> torch.Size:
    """Returns the event shape as a Size.

    Raises:
        TypeError: if it is not a tuple or a list.
        ValueError: if its sizes are not positive integers.
    """
    if not isinstance(event_shape, (tuple, list)):
        raise TypeError(f"Expected event_shape to be a sequence of integers; got {event_shape!r}.")
    sizes = tuple(_as_integer(size) for size in event_shape)
    check_widths(1, event_shape=sizes)
    return torch.Size(sizes)


def _as_integer(size: Any) -> Any:
    """Converts an integer of NumPy or torch to Python's int; returns anything else unchanged."""
    with suppress(TypeError):
        return size if isinstance(size, bool) else index(size)
    return size


def sum_rightmost(x: Tensor, dims: int) -> Tensor:
    """Returns the sum over the last dims; x itself if ``dims`` is 0."""
    return x.sum(tuple(range(-dims, 0))) if dims else x


def parts_of(x: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
    """Returns ``x.unbind(dim)``; along a last dim, the gradient of torch's function copies the numbers one by one."""
    return x.movedim(dim, 0).unbind(0)
