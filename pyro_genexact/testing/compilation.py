"""The law of compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pyro
import torch
from torch import Tensor, nn

from .helpers import close, gradients_of, same, tensors_of


def compiled(
    module: nn.Module | None,
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    *inputs: Tensor,
    backend: str = "aot_eager",
    tol: float = 1e-12,
) -> None:
    """Checks that ``torch.compile(run, fullgraph=True)`` returns the same values and gradients as ``run``.

    The gradients are those of the sum of all values with respect to the parameters of the module and to the
    floating-point inputs. Validation is off, since checks of values cannot be compiled. The law empties the caches of
    the compiler before and after.

    Args:
        module: the module that ``run`` uses, or None.
        run: a function of the inputs that returns tensors and draws no random numbers.
        inputs: tensors.
        backend: the backend of ``torch.compile``; "aot_eager" traces the function and its gradient, but runs the
            operations as they are.
        tol: the tolerance, relative to 1 + |value|.

    Example:
        >>> import torch, pyro_genexact as gx
        >>> from pyro_genexact.testing import redraw
        >>> flow = redraw(gx.flows.maf(2, hidden=(8,), transforms=1).double())
        >>> compiled(flow, lambda y: flow().log_prob(y), torch.zeros(3, 2, dtype=torch.float64))
    """
    inputs = tuple(x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    leaves = [x for x in inputs if x.requires_grad] + ([] if module is None else list(module.parameters()))

    def found(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> list[Tensor]:
        values = list(tensors_of(function(*inputs)))
        return [*values, *gradients_of(torch.stack([value.sum() for value in values]).sum(), leaves)]

    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(torch._dynamo.config.patch(allow_rnn=True))
        stack.callback(torch._dynamo.reset)
        torch._dynamo.reset()
        expected = found(run)
        got = found(torch.compile(run, fullgraph=True, backend=backend, dynamic=False))
    same("compiled", "number of values", len(got), len(expected))
    for i, (value, other) in enumerate(zip(got, expected, strict=True)):
        close("compiled", f"tensor {i}", value, other, tol)
