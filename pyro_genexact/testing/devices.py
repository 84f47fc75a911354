"""The laws of devices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from .helpers import ModuleT, _close, _same, _seeded, _tensors


def device(run: Callable[[], Any], seed: int = 0) -> None:
    """Nothing is made on the default device: ``run`` gives the same tensors while that is ``meta``."""
    with _seeded(seed):
        expected = list(_tensors(run()))
    try:
        with _seeded(seed), torch.device("meta"):
            found = list(_tensors(run()))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise AssertionError(f"device broken [the default device is meta]: {error}") from error
    for got, value in zip(found, expected, strict=True):
        _same("device", "the default device is meta", got.device, value.device)
        _close("device", "the default device is meta", got, value, 1e-12)


def meta(module: ModuleT, run: Callable[[ModuleT], Any]) -> None:
    """``run`` of the module on ``meta``, without validation, makes every tensor there."""
    import pyro

    try:
        with pyro.validation_enabled(False):
            values = list(_tensors(run(copy.deepcopy(module).to("meta"))))
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise AssertionError(f"device broken [all on meta]: {error}") from error
    for value in values:
        _same("device", "all on meta", value.device.type, "meta")
