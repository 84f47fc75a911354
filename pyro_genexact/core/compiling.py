"""Lazy properties, cached functions, classes made of classes, and dispatch, in forms that ``torch.compile`` accepts."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, Protocol, TypeVar, cast, overload

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


class Dispatching(Protocol[ResultT]):
    """A function that dispatches on the class of its first argument."""

    def __call__(self, *args: Any, **kwargs: Any) -> ResultT: ...

    @overload
    def register(self, kind: type) -> Callable[[FunctionT], FunctionT]: ...

    @overload
    def register(self, kind: type, method: FunctionT) -> FunctionT: ...


def dispatched(function: Callable[..., ResultT]) -> Dispatching[ResultT]:
    """Dispatches on the class of the first argument, like ``functools.singledispatch``, whose cache torch would trace."""
    table: dict[type, Callable[..., Any]] = {object: function}

    @wraps(function)
    def call(first: Any, /, *args: Any, **kwargs: Any) -> Any:
        for kind in type(first).__mro__:
            if kind in table:
                return table[kind](first, *args, **kwargs)

    def register(kind: type, method: Any = None) -> Any:
        if method is None:
            return partial(register, kind)
        table[kind] = method
        return method

    call.register = register  # type: ignore[attr-defined]
    return cast(Dispatching[ResultT], call)
