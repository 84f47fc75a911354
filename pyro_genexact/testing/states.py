"""The law of loading a state_dict into a module without values, after ``to_empty`` or on ``meta``."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base import DistributionModule
from .helpers import close, same


def reloading(module: nn.Module, run: Callable[[Any], Tensor]) -> None:
    """Checks that loading the ``state_dict`` restores a module completely after ``to("meta")`` and ``to_empty``.

    Large models are often created on ``meta``, moved to a device without values, and then loaded from a checkpoint. The law
    loads the state with ``torch.load(weights_only=True)``, also with ``assign=True`` into a module on ``meta``. After assigning
    a state, all tensors of a :class:`~pyro_genexact.DistributionModule` must have the device and dtype of the state.

    Args:
        module: any module.
        run: a function of the module that returns a tensor, such as ``lambda flow: flow().log_prob(y)``.
    """
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    expected = run(module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    for case, assign in (("to_empty and load_state_dict", False), ("load_state_dict by assign", True)):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        other = copy.deepcopy(module).to("meta")
        if not assign:
            with _filled():
                other.to_empty(device=device)
        other.load_state_dict(state, assign=assign)
        close("reloading", case, run(other), expected, 1e-12)
    if isinstance(module, DistributionModule) and state:
        _follows("another device", module, {name: t.to("meta") for name, t in state.items()})
        _follows("another dtype", module, {n: t.float() if t.is_floating_point() else t for n, t in state.items()})


def _follows(case: str, module: nn.Module, state: dict[str, Tensor]) -> None:
    other = copy.deepcopy(module)
    other.load_state_dict(state, assign=True)
    like = next(iter(state.values()))
    for name, t in (*other.named_parameters(), *other.named_buffers()):
        same("reloading", f"{case} by assign: device of {name}", t.device, like.device)
        if t.is_floating_point() and case == "another dtype":
            same("reloading", f"{case} by assign: dtype of {name}", t.dtype, torch.float32)


@contextmanager
def _filled() -> Iterator[None]:
    """Fills empty tensors with NaN or the largest integer in this context, so that values that are not loaded are wrong."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
