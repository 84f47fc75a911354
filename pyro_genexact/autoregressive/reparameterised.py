"""Gradients of rsample by the conditioner's adjoint: one reverse sweep for all sites."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..conditioners.site_loop import SiteLoop
from ..core.functional import transformed, vjp
from .chain_rule import ChainRule


def can_sweep(conditioner: Any) -> bool:
    """Returns whether grad is on and the conditioner's ``adjoint`` applies."""
    functorch = transformed()  # torch.func differentiates plain operations, not autograd Functions
    return torch.is_grad_enabled() and not functorch and bool(conditioner.has_adjoint)


def sweep(chain: ChainRule, context: Any, lengths: Tensor | None, rows: int) -> Tensor:
    """Draws the sites (B, T, *site_shape) of B rows from a chain rule, in visiting order, with zeros for padding.

    Cost of the backward pass: about that of one sample. Its memory is a small graph of the head per site. With
    ``create_graph``, backward draws the same noise again, through a differentiable graph of T steps.
    """
    return _Sweep.apply(chain, lengths, rows, context, *chain.tensors)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, chain: ChainRule, lengths: Tensor | None, rows: int, context: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        leaves: list[Tensor] = []
        drawn: list[Tensor] = []

        def draw(phi: Tensor, t: int) -> Tensor:
            with torch.enable_grad():
                leaves.append(phi.detach().clone().requires_grad_())
                drawn.append(chain.head.forward(leaves[-1], t).rsample())
            return drawn[-1].detach()

        device = chain.like.device
        ctx.noise = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        loop = SiteLoop(chain.conditioner, context, rows, chain.sites)
        ys = chain.draw(loop, draw, lengths)
        ctx.chain, ctx.lengths, ctx.rows, ctx.state, ctx.leaves, ctx.drawn = (
            chain, lengths, rows, loop.state, leaves, drawn,
        )  # fmt: skip
        ctx.save_for_backward(context, *tensors)
        return torch.cat(ys, 1)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        context, *tensors = ctx.saved_tensors  # unpacking lets autograd detect parameters changed in place
        if torch.is_grad_enabled():
            return None, None, None, *_graph_gradients(ctx, gy, context, tensors)
        site = ctx.drawn[0]
        units = torch.eye(prod(site.shape[2:]), dtype=site.dtype, device=site.device).reshape(-1, *site.shape[2:])
        gains = [torch.cat(vjp(ctx.drawn, ctx.leaves, [unit.expand_as(site)] * len(ctx.drawn)), 1) for unit in units]
        gain = torch.stack(gains, 2)  # dy_t/dphi_t, (B, T, k, P)
        a, of_context, pairs = ctx.chain.conditioner.adjoint(
            ctx.state, gy.reshape(*gy.shape[:2], len(units)), gain, torch.zeros_like(gain[:, :, 0]), context
        )
        # gradients of the head's own parameters flow through the draws, with the solved cotangents
        outputs = [*ctx.drawn, *(weight for weight, _ in pairs)]
        grads = [*a.reshape(gy.shape).split(1, 1), *(grad for _, grad in pairs)]
        found = iter(vjp(outputs, [t for t in tensors if t.requires_grad], grads))
        return None, None, None, of_context, *(next(found) if t.requires_grad else None for t in tensors)


def _graph_gradients(ctx: Any, gy: Tensor, context: Tensor | None, tensors: list[Tensor]) -> list[Tensor | None]:
    chain, device = ctx.chain, ctx.chain.like.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(ctx.noise[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(ctx.noise[1], device)
        loop = SiteLoop(chain.conditioner, context, ctx.rows, chain.sites)
        ys = chain.draw(loop, lambda phi, t: chain.head.forward(phi, t).rsample(), ctx.lengths)
    inputs: list[Any] = [context, *tensors]
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad[3:], strict=True) if need]
    found = iter(torch.autograd.grad(torch.cat(ys, 1), wanted, gy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[3:]]
