"""Mix-ins that implement ``infer_shapes`` and ``expand`` from a family's ``arg_constraints``."""

from __future__ import annotations

from typing import Any

from torch import Size

from ..core.shapes import broadcast_shapes


class ShapesByParameters:
    """Adds ``infer_shapes`` to families of vectors that are as long as their vector parameters.

    Pyro's own method only supports scalars.
    """

    arg_constraints: dict[str, Any]

    @classmethod
    def infer_shapes(cls, **arg_shapes: tuple[int, ...]) -> tuple[Size, Size]:
        """Returns the batch shape and the event shape, given the shapes of the parameters by name."""
        dims = {name: getattr(cls.arg_constraints.get(name), "event_dim", 0) for name in arg_shapes}
        batches = [shape[: len(shape) - dims[name]] for name, shape in arg_shapes.items()]
        event = next((shape[-1:] for name, shape in arg_shapes.items() if dims[name]), ())
        return broadcast_shapes(*batches), Size(event)


class Parametrised:
    """A family that stores each parameter of ``arg_constraints`` as an attribute, expanded to the batch shape."""

    arg_constraints: dict[str, Any]

    def expand(self: Any, batch_shape: Any, _instance: Any = None) -> Any:
        """Returns the distribution with its parameters expanded to another batch shape."""
        new, batch_shape = object.__new__(type(self)) if _instance is None else _instance, Size(batch_shape)
        new.__dict__.update(self.__dict__, _batch_shape=batch_shape)
        for name, constraint in self.arg_constraints.items():
            parameter = getattr(self, name)
            own = parameter.shape[parameter.dim() - constraint.event_dim :]
            setattr(new, name, parameter.expand(batch_shape + own))
        return new
