"""Parts that ``torch.compile`` can trace: a property that is computed once, and functions that it calls but does not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class Lazy:
    """A property that is computed at the first access and then kept in the instance.

    Unlike ``functools.cached_property`` of Python 3.11 it takes no lock, which ``torch.compile`` cannot trace.
    """

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.get, self.__doc__ = get, get.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        value = self.get(instance)
        object.__setattr__(instance, self.get.__name__, value)  # also of frozen dataclasses
        return value


def untraced(function: FunctionT) -> FunctionT:
    """Makes ``torch.compile`` call a function of constants and use its result, instead of tracing it.

    This is ``torch.compiler.assume_constant_result`` without the second that importing the compiler takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
