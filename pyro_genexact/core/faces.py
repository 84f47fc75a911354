"""publish: sets the __module__ of public names to the module that users import them from."""

from __future__ import annotations

from typing import Any

_FACES: set[str] = set()
PUBLISHED: dict[str, Any] = {}
"""What faces publish, by its full name in each."""


def publish(face: dict[str, Any]) -> None:
    """Sets ``__module__`` of what a module's ``__all__`` re-exports to that module, unless another face did before.

    So error texts, pickles and the documentation name the public module.

    Args:
        face: the ``globals()`` of the module.
    """
    _FACES.add(face["__name__"])
    for name in face["__all__"]:
        value = face[name]
        if hasattr(value, "__qualname__"):
            PUBLISHED[f"{face['__name__']}.{value.__qualname__}"] = value
            if value.__module__ not in _FACES:
                value.__module__ = face["__name__"]
