"""The laws of devices and of functional calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .helpers import ModuleT, close, gradients_of, no_error, same, seeded, tensors_of

REFUSALS = RuntimeError, ValueError, TypeError


def device(run: Callable[[], Any], seed: int = 0) -> None:
    """Nothing is made on the default device: ``run`` gives the same tensors while that is ``meta``."""
    with seeded(seed):
        expected = list(tensors_of(run()))
    with no_error("device", "the default device is meta", *REFUSALS), seeded(seed), torch.device("meta"):
        found = list(tensors_of(run()))
    for got, value in zip(found, expected, strict=True):
        same("device", "the default device is meta", got.device, value.device)
        close("device", "the default device is meta", got, value, 1e-12)


def constructed(make: Callable[[], Any]) -> None:
    """``make()`` looks at no values: without validation it runs while the default device is ``meta``."""
    with no_error("device", "made on meta", *REFUSALS), torch.device("meta"), pyro.validation_enabled(False):
        make()


def meta(module: ModuleT, run: Callable[[ModuleT], Any]) -> None:
    """``run`` of the module on ``meta``, without validation, makes every tensor there."""
    with no_error("device", "all on meta", *REFUSALS), pyro.validation_enabled(False):
        values = list(tensors_of(run(copy.deepcopy(module).to("meta"))))
    for value in values:
        same("device", "all on meta", value.device.type, "meta")


def per_example(module: nn.Module, score: Callable[..., Tensor], *rows: Tensor | None, tol: float = 1e-9) -> None:
    """``vmap(grad(functional_call))`` gives the gradients of each row that autograd gives of it alone.

    Args:
        module: whose parameters they are of.
        score: called as ``score(call, *row)``, where ``call`` is the module's; a scalar.
        rows: tensors (B, ...), or None for what no row has.
        tol: relative to 1 + |gradient|.
    """

    def of_row(values: dict[str, Tensor], *row: Tensor | None) -> Tensor:
        return score(lambda *args: functional_call(module, values, args), *row)

    given: dict[str, Tensor] = dict(module.named_parameters())
    dims = (None, *(None if row is None else 0 for row in rows))
    with no_error("per example", "vmap of grad", *REFUSALS):
        found = vmap(grad(of_row), in_dims=dims)(given, *rows)
    for i in range(max(len(row) for row in rows if row is not None)):
        row = [None if values is None else values[i] for values in rows]
        expected = gradients_of(score(module, *row), list(given.values()))
        for name, gradient in zip(given, expected, strict=True):
            close("per example", f"gradient of {name}, row {i}", found[name][i], gradient, tol)
