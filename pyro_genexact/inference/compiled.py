"""Functions that ``torch.compile`` compiles at the first call."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pyro
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core.functional import recording

_OF_LIBRARIES = re.compile(r"G\['__(import_(torch|pyro|pyro_genexact)_dot_|builtins_)")


class Compiled:
    """A function that is compiled as a whole at its first call, and runs without validation.

    Attributes:
        ready: whether the caller has evaluated the function once without compilation.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.ready = function, False
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(self.function, fullgraph=True, options=_options())
        with _compilation():
            return self._compiled(*args)


def _options() -> dict[str, Any]:
    """Returns options of torch's compiler that make a step of a small flow up to a tenth faster.

    Functions of parameters that alternate in memory use vector instructions, too. Guards on the globals of libraries,
    which no fit changes, are left out; those on the module, its attributes and the globals of the user remain.
    """
    options: dict[str, Any] = {}
    if hasattr(torch._inductor.config.cpp, "enable_tiling_heuristics"):
        options["cpp.enable_tiling_heuristics"] = False
    if hasattr(torch.compiler, "keep_tensor_guards_unsafe"):  # this version filters guards
        options["guard_filter_fn"] = lambda entries: [not _OF_LIBRARIES.match(str(e.orig_guard.name)) for e in entries]
    return options


class RecordedGradients:
    """Compiles a loss and its gradients from the operations of one evaluation.

    The record contains the operations of the backward pass too, so that all custom gradients are those of autograd.

    Args:
        loss: a function that returns the loss; every evaluation must do the same operations on tensors.
        parameters: the parameters, which are changed in place between evaluations.
    """

    def __init__(self, loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> None:
        given, self.parameters = [*parameters], list[Tensor]()

        def evaluate() -> list[Tensor]:
            value = torch.as_tensor(loss())
            grads = torch.autograd.grad(value, given, allow_unused=True)
            self.parameters = [p for p, grad in zip(given, grads, strict=True) if grad is not None]
            return [value.detach(), *(grad for grad in grads if grad is not None)]

        with _compilation(), recording(), _pyro_traced(), torch.random.fork_rng([]):
            record = torch.fx.experimental.proxy_tensor.make_fx(evaluate)()
        self._compiled = torch.compile(record, fullgraph=True)

    def __call__(self) -> float:
        """Adds the gradients to the parameters; returns the loss."""
        with _compilation(), torch.no_grad():
            value, *grads = self._compiled()
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad if p.grad is None else p.grad + grad
        return value.item()  # type: ignore[no-any-return]


class _ItemsAsTensors(TorchFunctionMode):
    """Makes ``Tensor.item`` return a tensor, since Pyro's ELBOs add up numbers. Branches on such tensors raise an error."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].detach() if function is Tensor.item else function(*args, **(kwargs or {}))


def _constant(value: bool, *_: Any) -> bool:
    return value


@contextmanager
def _pyro_traced() -> Iterator[None]:
    """Makes Pyro read no values: neither for its choices, as while ``torch.jit`` traces, nor for warnings and sums."""
    fixed = {"torch._C._get_tracing_state": True, "pyro.util.torch_isnan": False, "pyro.util.torch_isinf": False}
    with warnings.catch_warnings(), _ItemsAsTensors(), ExitStack() as stack:
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        for name, value in fixed.items():
            stack.enter_context(patch(name, partial(_constant, value)))
        yield


@contextmanager
def _compilation() -> Iterator[None]:
    """Switches validation off, which cannot be compiled; lets torch trace recurrent networks; adds a note to its errors."""
    dynamo = torch._dynamo  # imported here, which takes a second
    try:
        with pyro.validation_enabled(False), dynamo.config.patch(allow_rnn=True):
            yield
    except (dynamo.exc.TorchDynamoException, RuntimeError) as error:
        error.add_note("Raised by the compiled function of a fit with compile=True.")
        raise
