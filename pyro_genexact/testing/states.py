"""The law of loading: after to_empty or on meta, a state_dict makes a module whole again."""

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
    """After ``to("meta")`` and ``to_empty`` the module's ``state_dict`` brings back all that ``run`` depends on.

    Large models are made so: on ``meta``, then on a device without numbers, then from a checkpoint. The state goes through
    ``torch.load(weights_only=True)``, and once more by ``assign``, into a module still on ``meta``. A
    :class:`~pyro_genexact.DistributionModule` is wholly on the device and in the dtype of a state that is assigned to it.

    Args:
        module: any module.
        run: what to compute with it, for instance ``lambda flow: flow().log_prob(y)``.
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
    """Fills empty tensors with NaN or the largest integer, so that what was not loaded cannot be right by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
