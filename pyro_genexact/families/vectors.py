"""Shapes of distributions of vectors from those of their parameters."""

from __future__ import annotations

from typing import Any

from torch import Size

from ..core.shapes import broadcast_shapes


class OfVectors:
    """``infer_shapes`` of a family of vectors as long as those among its parameters, which Pyro's mixin has for scalars alone."""

    arg_constraints: dict[str, Any]

    @classmethod
    def infer_shapes(cls, **arg_shapes: tuple[int, ...]) -> tuple[Size, Size]:
        """The batch and the event shape, from the shape of each parameter by its name."""
        dims = {name: getattr(cls.arg_constraints.get(name), "event_dim", 0) for name in arg_shapes}
        batches = [shape[: len(shape) - dims[name]] for name, shape in arg_shapes.items()]
        event = next((shape[-1:] for name, shape in arg_shapes.items() if dims[name]), ())
        return broadcast_shapes(*batches), Size(event)
