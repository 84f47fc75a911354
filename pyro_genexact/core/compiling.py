"""Lazy properties, cached functions, classes made of classes, and dispatch, in forms that ``torch.compile`` accepts."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, update_wrapper, wraps
from typing import Any, TypeVar

from .functional import compiling

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
ResultT = TypeVar("ResultT", covariant=True)


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


def cached(function: FunctionT) -> FunctionT:
    """Keeps the results of a function, like ``functools.lru_cache``, but not while torch compiles, which would warn."""
    kept = lru_cache(function)

    @wraps(function)
    def get(*args: Any) -> Any:
        return function(*args) if compiling() else kept(*args)

    return get  # type: ignore[return-value]


def classes(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keeps the class that a function makes of another class, also while torch compiles, which cannot make classes.

    A class that is new then is made by ``torch.compiler.assume_constant_result``, whose import would take a second.
    """
    made: dict[Any, Any] = {}

    def add(family: Any) -> Any:
        made[family] = make(family)
        return made[family]

    add._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @wraps(make)
    def get(family: Any) -> Any:
        return made[family] if family in made else add(family)

    return get


class Dispatched:
    """A function that dispatches on the class of its first argument, like ``functools.singledispatch``.

    The latter keeps a cache, which ``torch.compile`` would trace.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self.table: dict[type, Callable[..., Any]] = {object: function}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for kind in type(args[0]).__mro__:
            if kind in self.table:
                return self.table[kind](*args, **kwargs)

    def register(self, kind: type, method: Any = None) -> Callable[[FunctionT], FunctionT]:
        """Sets the method of a class and its subclasses; without a method, returns a decorator that does."""
        if method is None:
            return partial(self.register, kind)  # type: ignore[return-value]
        self.table[kind] = method
        return method  # type: ignore[no-any-return]
