"""Functions that ``torch.compile`` compiles at the first call."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from types import FunctionType
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
        with _compilation():
            if self._compiled is None:
                self._compiled = torch.compile(_own_code(self.function), fullgraph=True, options=_options())
            return self._compiled(*args)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function in one with a code object of its own, since torch limits the compilations of a code object."""

    def run(*args: Any) -> Any:
        return function(*args)

    return FunctionType(run.__code__.replace(), globals(), closure=run.__closure__)


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

    The record contains the operations of the backward pass too, so that all custom gradients are those of autograd. The
    first two calls are recorded while they are evaluated, and later calls run the compiled record.

    Args:
        loss: a function that returns the loss; every evaluation must do the same operations on the same tensors.
        parameters: the parameters, which are changed in place between evaluations.

    Raises:
        ValueError: in the second call, if it does other operations than the first, or on tensors with other values.
    """

    def __init__(self, loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> None:
        self.loss, self.given, self.parameters = loss, [*parameters], list[Tensor]()
        self._records: list[torch.fx.GraphModule] = []
        self._compiled: Callable[[], list[Tensor]] | None = None

    def __call__(self) -> float:
        """Adds the gradients to the parameters; returns the loss."""
        if self._compiled is None:
            value, *grads = self._recorded()
        else:
            with _compilation(), torch.no_grad():
                value, *grads = self._compiled()
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad if p.grad is None else p.grad + grad
        return value.item()

    def _recorded(self) -> list[Tensor]:
        """Evaluates and records the loss and its gradients; returns them."""
        results: list[Tensor] = []

        def evaluate() -> list[Tensor]:
            value = torch.as_tensor(self.loss())
            grads = torch.autograd.grad(value, self.given, allow_unused=True)
            self.parameters = [p for p, grad in zip(self.given, grads, strict=True) if grad is not None]
            results[:] = [value.detach(), *(grad for grad in grads if grad is not None)]
            return results

        with _compilation(), recording(), _pyro_traced():
            self._records.append(torch.fx.experimental.proxy_tensor.make_fx(evaluate)())
            if len(self._records) == 2:
                if not _equal(*self._records):
                    raise ValueError(
                        "Expected model and guide to do the same operations on the same tensors in every step "
                        "(compile=True records one step); got others in the next step. Pass tensors that change, such "
                        "as minibatches, in no other way than by pyro.plate's subsampling."
                    )
                self._compiled = torch.compile(self._records.pop(), fullgraph=True)
                self._records.clear()
        return results


def _equal(one: torch.fx.GraphModule, other: torch.fx.GraphModule) -> bool:
    """Whether two records consist of the same operations on equal constants."""
    constants = [
        {node.target: getattr(record, node.target) for node in record.graph.nodes if node.op == "get_attr"}
        for record in (one, other)
    ]
    return one.code == other.code and all(
        a is constants[1][name] or torch.equal(a, constants[1][name]) for name, a in constants[0].items()
    )


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


class _Validation:
    """Switches validation off while at least one thread compiles or runs compiled code."""

    def __init__(self) -> None:
        self.lock, self.users = Lock(), 0
        self.off: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.off = pyro.validation_enabled(False)
                self.off.__enter__()
            self.users += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.off.__exit__(None, None, None)


_WITHOUT_VALIDATION = _Validation()


@contextmanager
def _compilation() -> Iterator[None]:
    """Switches validation off, which cannot be compiled; lets torch trace recurrent networks; adds a note to its errors."""
    dynamo: Any = torch._dynamo  # imported here, which takes a second
    try:
        with _WITHOUT_VALIDATION, dynamo.config.patch(allow_rnn=True):
            yield
    except Exception as error:
        error.add_note("Raised by the compiled function of a fit with compile=True.")
        raise
