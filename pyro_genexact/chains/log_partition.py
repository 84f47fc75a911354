"""log Z of linear chains and other message queries, with gradients of any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.functional import transformed
from .messages import LogGradients, Messages, ScaledMessages, last_site, messages_of, select_rows
from .semirings import ChainPotentials

Gradients = list[Tensor | None]


def plain_operations_only() -> bool:
    """Returns whether torch.func or the tracer is active, which hide values and support plain operations only."""
    return transformed() or torch.jit._trace.is_tracing()


def messages_for(chain: ChainPotentials, usual: Tensor | None = None) -> Messages:
    """Returns the fastest exact messages of B chains, without gradients; in log space under torch.func or tracing."""
    return LogGradients(chain) if plain_operations_only() else messages_of(chain, usual=usual)


def log_partition(chain: ChainPotentials, messages: Messages) -> Tensor:
    """Returns log Z (B,) in nats in double precision; its gradients are the marginals, computed from the messages."""
    return with_gradients(
        lambda messages: messages.log_partition.clone(),  # the result becomes part of a graph
        messages,
        chain,
        first_order=lambda grad, needed: _from_marginals(chain, messages, grad, needed),
    )


def log_partition_or_none(chain: ChainPotentials, messages: Messages | None = None) -> Tensor:
    """Returns log Z (B,) in nats in double precision; -inf with gradient zero for rows where nothing is possible."""
    messages = messages_for(chain) if messages is None else messages
    # messages in exp space are exact, and therefore something is possible in each row
    if plain_operations_only() or isinstance(messages, ScaledMessages):
        return log_partition(chain, messages)
    impossible = messages.log_partition == -torch.inf
    if not impossible.any():
        return log_partition(chain, messages)
    possible = (~impossible).nonzero().squeeze(-1)
    if not len(possible):
        return messages.log_partition
    return messages.log_partition.index_copy(0, possible, log_partition_or_none(select_rows(chain, possible)))


def with_gradients(
    query: Callable[..., Tensor],
    messages: Messages,
    *chains: ChainPotentials,
    first_order: Callable[[Tensor, Sequence[bool]], Gradients] | None = None,
) -> Tensor:
    """Returns a query of messages with gradients with respect to all potentials, which backward computes when needed.

    The gradients are those of the same query in log space by plain operations, so they are differentiable, too.

    Args:
        query: function of the messages and further chains that returns a new tensor.
        messages: the messages of the first chain, from :func:`messages_for`.
        chains: the chains, whose potentials get gradients.
        first_order: function that returns the gradients of the first chain's potentials if they need not be
            differentiable, given the gradient of the result and which gradients are needed.
    """
    tensors = [p for chain in chains for p in chain[:4]]
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in tensors)
    if not wanted or plain_operations_only():
        return query(messages, *chains[1:])

    def of_tensors(*tensors: Tensor) -> Tensor:
        parts = (tensors[4 * i : 4 * i + 4] for i in range(len(chains)))
        first, *others = (ChainPotentials(*part, c.lengths) for part, c in zip(parts, chains, strict=True))  # type: ignore[call-arg, arg-type]
        return query(LogGradients(first), *others)

    return _WithGradients.apply(lambda: query(messages, *chains[1:]), of_tensors, first_order, *tensors)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, value: Callable[[], Tensor], function: Callable[..., Tensor], first_order: Any, *tensors: Tensor
    ) -> Tensor:
        ctx.function, ctx.first_order = function, first_order
        ctx.save_for_backward(*tensors)
        return value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if ctx.first_order is None or torch.is_grad_enabled():
            return None, None, None, *_gradients(ctx.function, tensors, needed, grad)
        return None, None, None, *ctx.first_order(grad, needed)


def _gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> Gradients:
    """Returns the gradients of the tensors that need one; they are differentiable if grad mode is on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # new tensors, because one of the given tensors may have been computed from another
        inputs = [t.view_as(t) if again else t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        value = function(*inputs)
    wanted = [t for t, needs in zip(inputs, needed, strict=True) if needs]
    found: Iterator[Tensor] = iter([torch.zeros_like(t) for t in wanted])
    if value.requires_grad:
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=again, materialize_grads=True))
    return [next(found) if needs else None for needs in needed]


def _from_marginals(chain: ChainPotentials, messages: Messages, grad: Tensor, needed: Sequence[bool]) -> Gradients:
    """Returns the gradients of log Z with respect to the four kinds of potentials."""
    nodes = messages.marginals() * grad[:, None, None]
    grads: Gradients = [nodes, None, nodes[:, 0], None]
    if needed[1] and chain.transition.dim() == 2:
        grads[1] = messages.expected_steps(grad)
    elif needed[1]:
        pairs = messages.pair_marginals().mul_(grad[:, None, None, None])  # in place: a copy costs as much as the step
        grads[1] = pairs if pairs.shape == chain.transition.shape else pairs.sum(1, keepdim=True)
    if needed[3]:
        grads[3] = nodes.take_along_dim(last_site(chain).unsqueeze(-1), 1).squeeze(1)
    return [None if g is None else g.to(p.dtype) for g, p in zip(grads, chain[:4], strict=True)]
