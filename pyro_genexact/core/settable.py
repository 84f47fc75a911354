"""A property that can be overridden for one instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Settable:
    """A property whose value can be set for one instance, as Pyro's ``has_rsample_`` does."""

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.get, self.__doc__ = get, get.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else self.get(instance)
