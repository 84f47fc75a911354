"""The law of threads: a call returns its own result, whatever another thread calls meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from .helpers import close

Run = Callable[[Any], tuple[Tensor, ...]]


def threads(subject: Any, run: Run, other: Run) -> None:
    """``run(subject)`` returns the same values, whichever of its lines ``other(subject)`` comes before.

    That is what another thread may do at any time. The law needs no threads and no luck: Python's tracing runs ``other``
    before each line of the subject's own methods, in turn.

    Args:
        subject: a transform or distribution.
        run: calls methods of the subject, without random numbers, and returns tensors.
        other: calls the same methods with other arguments.
    """
    expected, places = _interrupted(subject, run, other, None)
    for place in places:
        got, _ = _interrupted(subject, run, other, place)
        for value, alone in zip(got, expected, strict=True):
            close("threads", f"another call before {place[0].co_name}, line {place[1]}", value, alone, 1e-12)


Place = tuple[CodeType, int]


def _interrupted(subject: Any, run: Run, other: Run, at: Place | None) -> tuple[tuple[Tensor, ...], list[Place]]:
    """What ``run`` returns if ``other`` is run when it first comes to a line, and the lines of the subject's methods."""
    places: list[Place] = []

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_locals.get("self") is not subject:
            return None
        place = frame.f_code, frame.f_lineno
        if event == "line" and place not in places:
            places.append(place)
            if place == at:
                other(subject)  # which is not traced
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return run(subject), places
    finally:
        sys.settrace(before)
