"""log Z of a chain of potentials, differentiable to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import transformed
from ..semirings import Chain, LogSumExp, fold
from .messages import Messages, last_site, messages_of, rows, wide


def log_partition(chain: Chain, messages: Messages | None) -> Tensor:
    """log Z (B) in nats, wide; its gradients are the marginals, taken from the messages.

    A gradient that is to be differentiated again, and one under ``torch.func``, goes through the recursion in log space.
    """
    if messages is None or transformed():
        return fold(LogSumExp(), widened(chain))[0]
    return _LogPartition.apply(*chain[:4], chain.lengths, messages)


def log_partition_or_none(chain: Chain) -> Tensor:
    """log Z (B) in nats, wide; -inf with gradient zero for rows where nothing is possible."""
    if transformed():
        return log_partition(chain, None)
    messages = messages_of(chain)
    dead = messages.log_partition == -torch.inf
    if dead.is_meta or not dead.any():
        return log_partition(chain, messages)
    alive = (~dead).nonzero().squeeze(-1)
    if not len(alive):
        return messages.log_partition
    return messages.log_partition.index_copy(0, alive, log_partition_or_none(rows(chain, alive)))


def widened(chain: Chain) -> Chain:
    """Its potentials in float64 where the device has it."""
    return chain.map(wide)


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
            total = fold(LogSumExp(), widened(chain))[0]
            wanted = [p for p, needs in zip(potentials, needed, strict=True) if needs]
            found = iter(torch.autograd.grad(total, wanted, grad, create_graph=True, materialize_grads=True))
            return *(next(found) if needs else None for needs in needed), None, None
        nodes = ctx.messages.nodes() * grad[:, None, None]
        grads: list[Tensor | None] = [nodes, None, nodes[:, 0], None]
        if needed[1]:
            grads[1] = _of_transition(ctx.messages, potentials[1], grad)
        if needed[3]:
            grads[3] = nodes.take_along_dim(last_site(chain).unsqueeze(-1), 1).squeeze(1)
        pairs = zip(grads, potentials, strict=True)
        return *(None if g is None else g.to(p.dtype) for g, p in pairs), None, None


def _of_transition(messages: Messages, transition: Tensor, grad: Tensor) -> Tensor:
    if transition.dim() == 2:
        return messages.pair_total(grad)
    pairs = messages.pairs() * grad[:, None, None, None]
    return pairs if pairs.shape == transition.shape else pairs.sum(1, keepdim=True)
