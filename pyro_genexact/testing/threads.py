"""The law of threads: the result of a call does not depend on calls of other threads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from .helpers import close

Run = Callable[[Any], tuple[Tensor, ...]]


def threads(subject: Any, run: Run, other: Run) -> None:
    """Checks that ``run(subject)`` returns the same values if ``other(subject)`` runs at any line of the subject's methods.

    Another thread could run it at any time. The law needs no threads and is deterministic: it uses Python's tracing to run
    ``other`` before each line in turn.

    Args:
        subject: a transform or distribution.
        run: a function that calls methods of the subject without random numbers, and returns tensors.
        other: a function that calls the same methods with other arguments.
    """
    expected, places = _interrupted(subject, run, other, None)
    for place in places:
        got, _ = _interrupted(subject, run, other, place)
        for value, alone in zip(got, expected, strict=True):
            close("threads", f"another call before {place[0].co_name}, line {place[1]}", value, alone, 1e-12)


Place = tuple[CodeType, int]


def _interrupted(subject: Any, run: Run, other: Run, at: Place | None) -> tuple[tuple[Tensor, ...], list[Place]]:
    """Runs ``run``, and ``other`` before the first execution of a line; returns the result and all lines of the methods."""
    places: list[Place] = []

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_locals.get("self") is not subject:
            return None
        place = frame.f_code, frame.f_lineno
        if event == "line" and place not in places:
            places.append(place)
            if place == at:
                other(subject)  # not traced
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return run(subject), places
    finally:
        sys.settrace(before)
