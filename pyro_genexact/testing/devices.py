"""Laws of devices and functional calls."""

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
    """Checks that ``run`` creates nothing on the default device: with default device ``meta`` it returns the same tensors.

    Args:
        run: a function that returns tensors.
        seed: the seed of torch's random state.
    """
    with seeded(seed):
        expected = list(tensors_of(run()))
    with no_error("device", "the default device is meta", *REFUSALS), seeded(seed), torch.device("meta"):
        found = list(tensors_of(run()))
    for got, value in zip(found, expected, strict=True):
        same("device", "the default device is meta", got.device, value.device)
        close("device", "the default device is meta", got, value, 1e-12)


def constructed(make: Callable[[], Any]) -> None:
    """Checks that ``make()`` reads no values: without validation, it runs with default device ``meta``."""
    with no_error("device", "made on meta", *REFUSALS), torch.device("meta"), pyro.validation_enabled(False):
        make()


def meta(module: ModuleT, run: Callable[[ModuleT], Any]) -> None:
    """Checks that all tensors of ``run(module)`` are on ``meta`` if the module is, without validation."""
    with no_error("device", "all on meta", *REFUSALS), pyro.validation_enabled(False):
        values = list(tensors_of(run(copy.deepcopy(module).to("meta"))))
    for value in values:
        same("device", "all on meta", value.device.type, "meta")


def per_example(module: nn.Module, score: Callable[..., Tensor], *rows: Tensor | None, tol: float = 1e-9) -> None:
    """Checks that ``vmap(grad(functional_call))`` gives the same gradients per row as autograd on each row alone.

    Args:
        module: the module whose parameters the gradients are for.
        score: a function that is called as ``score(call, *row)``, where ``call`` calls the module, and returns a scalar.
        rows: tensors (B, ...), or None for arguments that are None in each row.
        tol: the tolerance, relative to 1 + |gradient|.
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
