"""Mix-ins that derive infer_shapes and expand from a family's arg_constraints."""

from __future__ import annotations

from typing import Any

from torch import Size

from ..core.shapes import broadcast_shapes


class ShapesByParameters:
    """``infer_shapes`` also of a family of vectors, as long as those among its parameters; Pyro has it for scalars alone."""

    arg_constraints: dict[str, Any]

    @classmethod
    def infer_shapes(cls, **arg_shapes: tuple[int, ...]) -> tuple[Size, Size]:
        """The batch and the event shape, from the shape of each parameter by its name."""
        dims = {name: getattr(cls.arg_constraints.get(name), "event_dim", 0) for name in arg_shapes}
        batches = [shape[: len(shape) - dims[name]] for name, shape in arg_shapes.items()]
        event = next((shape[-1:] for name, shape in arg_shapes.items() if dims[name]), ())
        return broadcast_shapes(*batches), Size(event)


class Parametrised:
    """A family whose parameters are attributes of their whole shapes, by the names in ``arg_constraints``."""

    arg_constraints: dict[str, Any]

    def expand(self: Any, batch_shape: Any, _instance: Any = None) -> Any:
        """The same with another batch shape, of expanded parameters."""
        new, batch_shape = object.__new__(type(self)) if _instance is None else _instance, Size(batch_shape)
        new.__dict__.update(self.__dict__, _batch_shape=batch_shape)
        for name, constraint in self.arg_constraints.items():
            parameter = getattr(self, name)
            own = parameter.shape[parameter.dim() - constraint.event_dim :]
            setattr(new, name, parameter.expand(batch_shape + own))
        return new
