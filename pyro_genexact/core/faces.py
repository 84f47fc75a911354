"""Sets ``__module__`` of public classes and functions to the module that users import them from."""

from __future__ import annotations

from typing import Any

_FACES: set[str] = set()
PUBLISHED: dict[str, Any] = {}
"""The published classes and functions, by their full names in each public module."""


def publish(face: dict[str, Any]) -> None:
    """Sets ``__module__`` of the objects in a module's ``__all__`` to that module, unless they were published before.

    Error messages, pickles and the documentation then use the public name.

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
