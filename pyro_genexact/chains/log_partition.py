"""log Z of a chain of potentials, differentiable to any order, and other values that the messages tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.functional import transformed
from .messages import Messages, last_site, messages_of, rows, wide
from .semirings import Chain, LogSumExp, fold


def log_partition(chain: Chain, messages: Messages | None) -> Tensor:
    """log Z (B) in nats, wide; its gradients are the marginals, taken from the messages.

    A gradient that is to be differentiated again goes through the recursion in log space; so does all without messages.
    """
    if messages is None:
        return in_log_space(chain)
    return _LogPartition.apply(*chain[:4], chain.lengths, messages)


def log_partition_or_none(chain: Chain) -> Tensor:
    """log Z (B) in nats, wide; -inf with gradient zero for rows where nothing is possible."""
    if opaque():
        return in_log_space(chain)
    messages = messages_of(chain)
    dead = messages.log_partition == -torch.inf
    if dead.is_meta or not dead.any():
        return log_partition(chain, messages)
    alive = (~dead).nonzero().squeeze(-1)
    if not len(alive):
        return messages.log_partition
    return messages.log_partition.index_copy(0, alive, log_partition_or_none(rows(chain, alive)))


def known(value: Tensor, function: Callable[..., Tensor], *chains: Chain) -> Tensor:
    """The value, which ``function(*chains)`` would compute too, with the gradients of the function, computed when asked for."""
    tensors = [p for chain in chains for p in chain[:4]]
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in tensors)):
        return value

    def of_tensors(*tensors: Tensor) -> Tensor:
        parts = [tensors[4 * i : 4 * i + 4] for i in range(len(chains))]
        return function(*(Chain(u, t, i, f, c.lengths) for (u, t, i, f), c in zip(parts, chains, strict=True)))

    return _Known.apply(value, of_tensors, *tensors)


def in_log_space(chain: Chain) -> Tensor:
    """log Z (B) in nats, wide, by plain operations."""
    return fold(LogSumExp(), widened(chain))[0]


def widened(chain: Chain) -> Chain:
    """Its potentials in float64 where the device has it."""
    return chain.map(wide)


def opaque() -> bool:
    """Whether torch.func or the tracer is at work, which follow plain operations alone and show no values."""
    return transformed() or torch.jit._trace.is_tracing()


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        unary: Tensor,
        transition: Tensor,
        initial: Tensor,
        final: Tensor,
        lengths: Tensor | None,
        messages: Messages,
    ) -> Tensor:
        ctx.save_for_backward(unary, transition, initial, final)
        ctx.lengths, ctx.messages = lengths, messages
        return messages.log_partition.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        potentials, needed = ctx.saved_tensors, ctx.needs_input_grad[:4]
        unary, transition, initial, final = potentials
        chain = Chain(unary, transition, initial, final, ctx.lengths)
        if torch.is_grad_enabled():
            return (
                *_gradients(lambda u, t, i, f: in_log_space(Chain(u, t, i, f, ctx.lengths)), potentials, needed, grad),
                None,
                None,
            )
        nodes = ctx.messages.nodes() * grad[:, None, None]
        grads: list[Tensor | None] = [nodes, None, nodes[:, 0], None]
        if needed[1]:
            grads[1] = _of_transition(ctx.messages, transition, grad)
        if needed[3]:
            grads[3] = nodes.take_along_dim(last_site(chain).unsqueeze(-1), 1).squeeze(1)
        pairs = zip(grads, potentials, strict=True)
        return *(None if g is None else g.to(p.dtype) for g, p in pairs), None, None


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *_gradients(ctx.function, ctx.saved_tensors, ctx.needs_input_grad[2:], grad)


def _gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Of those tensors that need one; to be differentiated again where grad mode is on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # others than those given, of which one may be made from another
        inputs = [t.view_as(t) if again else t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        value = function(*inputs)
    wanted = [t for t, needs in zip(inputs, needed, strict=True) if needs]
    found: Iterator[Tensor] = iter([torch.zeros_like(t) for t in wanted])
    if value.requires_grad:
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=again, materialize_grads=True))
    return [next(found) if needs else None for needs in needed]


def _of_transition(messages: Messages, transition: Tensor, grad: Tensor) -> Tensor:
    if transition.dim() == 2:
        return messages.pair_total(grad)
    pairs = messages.pairs() * grad[:, None, None, None]
    return pairs if pairs.shape == transition.shape else pairs.sum(1, keepdim=True)
