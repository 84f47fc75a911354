"""Autoregressive transforms: a conditioner and a bijection head; parallel in one direction, sequential in the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ..base import Conditioner, Head
from ..contexts import PaddedSequence
from ..core.binding import Held
from ..core.functional import transformed, visible, vjp
from ..core.independent import independent
from ..core.lengths import filled_constraint, present, zero_padding
from ..core.precision import at_least
from ..numerics.fixed_point import FixedPoint, Solver
from .base import adapted
from .modules import BijectionModule, ConditionedTransform
from .sequential import masked, solve_in_parallel, solve_in_turn


class ConditionedAutoregressive(ConditionedTransform):
    """Bijection x -> y over T sites, y_t = head(phi_t(context, x_{<t}))(x_t).

    The Jacobian is triangular, so log|det dy/dx| is the sum of the head's log-derivatives over sites. It keeps using
    the weights that the modules have at construction.

    Cost: ``t(x)`` evaluates the conditioner once, in parallel. ``t.inv(y)`` evaluates it site by site, by ``start`` and
    ``extend``. Both directions are twice differentiable in the argument, the context and all parameters. If the
    conditioner has an ``adjoint``, first derivatives of the inverse take one reverse sweep instead of a graph of T
    steps.

    Args:
        conditioner: reads x and predicts the parameters of the head.
        head: makes the bijection of each site.
        context: the context (*batch, C), covariates (*batch, T, C), or a source (*batch, S, C) or ``PaddedSequence``;
            None if the conditioner has no context.
        cache_size: 1 to cache the last value, 0 for no cache.
        solver: how to compute the inverse: None or "sequential" site by site, "fixed_point" or a
            :class:`~pyro_genexact.numerics.FixedPoint` by passes over all sites. Its gradient is then also solved by
            passes. ``passes`` is the number of passes of the last inverse. Under ``torch.func`` and on meta tensors,
            whose values cannot be compared, the inverse is computed site by site.

    x and y have shape (*batch, T, *site_shape); values broadcast with the batch shape of the context.

    Raises:
        ValueError: if the context does not match the conditioner, or for another ``solver``; in calls, for values with
            other sites.
        ConvergenceError: in calls with a solver, see :class:`~pyro_genexact.numerics.FixedPoint`.

    Example:
        >>> import torch
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Affine()
        >>> t = ConditionedAutoregressive(conditioners.MADE(3, head.num_params), head)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(t.inv(t(x).clone()), x, atol=1e-5)
        True
    """

    conditioner, head = Held(), Held()

    def __init__(
        self,
        conditioner: Conditioner,
        head: Head,
        context: Tensor | PaddedSequence | None = None,
        cache_size: int = 1,
        solver: Solver = None,
    ) -> None:
        super().__init__(conditioner, context, cache_size)
        self.solver = FixedPoint.of(solver)
        self.conditioner, self.head = conditioner, head
        self._sites = conditioner.num_sites, tuple(head.site_shape)
        self._domain = independent(head.domain, 1 + len(head.site_shape))

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        if self._lengths is None:
            return self._domain
        fill = partial(zero_padding, lengths=self._lengths, dim=-self._domain.event_dim)
        return filled_constraint(fill, self._domain)  # type: ignore[no-any-return]

    codomain = domain  # type: ignore[assignment]

    def on_prefixes(self, lengths: Tensor) -> ConditionedAutoregressive:
        """Returns the transform of the first sites of each row, given lengths (*batch); later sites are zero."""
        new = copy.copy(self)
        new._lengths = lengths
        return new

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, context, mask, shape = self._flatten(x)
        y, ladj = adapted(self.head(at_least(self.conditioner(rows, context), rows))).call_and_ladj(rows)
        y, ladj = masked(y, mask), masked(ladj, mask).sum(-1)
        return _shaped(y, shape), _shaped(ladj, shape[: -self._domain.event_dim])

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows, context, mask, shape = self._flatten(y)
        inputs = [rows, *([] if self.context is None else [self.context]), *self._tensors]
        functorch = transformed()  # torch.func differentiates plain operations, not autograd Functions
        tracked = torch.is_grad_enabled() and (functorch or any(t.requires_grad for t in inputs))
        conditioner = self.conditioner
        if self.solver is not None and visible(rows):
            x, ladj, self.passes = solve_in_parallel(self.with_cache(0), self._tensors, rows, context, mask)
        elif tracked and not functorch and conditioner.has_adjoint and self.source_lengths is None:
            x, ladj = _Solve.apply(self.with_cache(0), mask, rows, context, *self._tensors)
        else:
            with torch.set_grad_enabled(tracked):
                x, ladj = solve_in_turn(conditioner, self.head, rows, context, mask)[:2]
        return _shaped(x, shape), _shaped(ladj, shape[: -self._domain.event_dim])

    def _flatten(self, value: Tensor) -> tuple[Tensor, Any, Tensor | None, torch.Size]:
        """Returns the rows (B, T, *site_shape) and their contexts, the mask of lengths (B, T) and the broadcast shape."""
        dims = self._domain.event_dim
        sites, site_shape = self._sites
        event = tuple(value.shape[-dims:])
        if value.dim() < dims or event[1:] != site_shape or (sites is not None and event[0] != sites):
            expected = ("T" if sites is None else sites, *site_shape)
            raise ValueError(
                f"Expected value.shape[-{dims}:] == {expected} (the sites of the transform); got {tuple(value.shape)}."
            )
        value = self._broadcast(value)
        shape = value.shape
        rows = _shaped(value, (-1, *event))
        context: Any = self.context
        mask = None
        if context is not None:
            features = context.shape[-self._kind.dims :]
            context = _shaped(context.expand(*shape[:-dims], *features), (rows.shape[0], *features))
        if self._lengths is not None:
            mask = present(self._lengths.expand(shape[:-dims]).reshape(-1), rows, -dims).flatten(1)
            rows = masked(rows, mask)
            if context is not None and self._kind.by_site:
                context = masked(context, mask)
        if self.source_lengths is not None:
            context = PaddedSequence(context, self.source_lengths.expand(shape[:-dims]).reshape(-1))
        return rows, context, mask, shape


class AutoregressiveTransform(BijectionModule):
    """Module of a conditioner and a bijection head; its call returns a :class:`ConditionedAutoregressive`.

    That transform x -> y is parallel. Applied to a base distribution it gives an inverse autoregressive flow; the
    inverse module ``inv`` gives a masked autoregressive flow.

    Args:
        conditioner: predicts ``head.num_params`` parameters per site.
        head: maps these parameters to a strictly monotone bijection.

    Raises:
        ValueError: if conditioner and head have different ``num_params`` or kinds of sites.

    References: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016;
    Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation", NeurIPS 2017.

    Example:
        >>> import torch
        >>> from pyro_genexact import conditioners, heads
        >>> head = heads.Affine()
        >>> net = conditioners.MADE(3, head.num_params, context=2)
        >>> module = AutoregressiveTransform(net, head)
        >>> module(torch.zeros(4, 2)).forward_shape((3,))
        torch.Size([4, 3])
    """

    def __init__(self, conditioner: Conditioner, head: Head) -> None:
        super().__init__()
        if conditioner.num_params != head.num_params:
            raise ValueError(
                f"Expected conditioner.num_params == {head.num_params} (num_params of the head); got {conditioner.num_params}."
            )
        if conditioner.site != tuple(head.site_shape):
            raise ValueError(
                f"Expected conditioner.site == {tuple(head.site_shape)} (the site shape of the head); got {conditioner.site}."
            )
        self.conditioner, self.head, self.context = conditioner, head, conditioner.context

    takes_solver = True

    def forward(
        self, context: Tensor | PaddedSequence | None = None, solver: Solver = None
    ) -> ConditionedAutoregressive:
        """Returns the transform given the context (*batch, C); ``solver`` selects how it computes its inverse."""
        return ConditionedAutoregressive(self.conditioner, self.head, context, solver=solver)


def _shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshapes x, without an autograd node if x already has the shape."""
    return x if len(shape) == x.dim() and tuple(shape[1:]) == x.shape[1:] else x.reshape(shape)


class _Solve(torch.autograd.Function):
    """Sequential direction without an autograd graph of T steps: backward is the conditioner's reverse sweep.

    With ``create_graph``, backward recomputes a differentiable graph through ``start`` and ``extend``.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        transform: ConditionedAutoregressive,
        mask: Tensor | None,
        y: Tensor,
        context: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, ladj, phi, ctx.state = solve_in_turn(transform.conditioner, transform.head, y, context, mask, True)
        # the transform has no cache, so there is no reference cycle
        ctx.transform, ctx.mask, ctx.tensors = transform, mask, tensors
        ctx.save_for_backward(y, context, phi, x, *tensors)
        return x, ladj

    @staticmethod
    def backward(ctx: Any, gx: Tensor, gl: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # unpacking all tensors lets autograd detect parameters that were changed in place
        y, context, phi, x, *_ = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            grads = _graph_gradients(ctx, gx, gl, y, context, needed)
        else:
            grads = _sweep_gradients(ctx, gx, gl, y, context, phi, x.detach())
        return None, None, *(grad if need else None for grad, need in zip(grads, needed, strict=True))


def _graph_gradients(
    ctx: Any, gx: Tensor, gl: Tensor, y: Tensor, context: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    x, ladj = solve_in_turn(ctx.transform.conditioner, ctx.transform.head, y, context, ctx.mask)[:2]
    wanted = [t for t, need in zip((y, context, *ctx.tensors), needed, strict=True) if need]
    found = iter(torch.autograd.grad((x, ladj), wanted, (gx, gl), create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _sweep_gradients(
    ctx: Any, gx: Tensor, gl: Tensor, y: Tensor, context: Tensor | None, phi: Tensor, known: Tensor
) -> list[Tensor | None]:
    with torch.enable_grad():  # derivatives of x_t and log|dx/dy|_t in phi_t and y_t, for all sites at once
        phi, y = phi.detach().requires_grad_(), y.detach().requires_grad_()
        transform = adapted(ctx.transform.head(phi))
        x = transform.invert(y, known)
        ladj = -masked(transform.log_abs_det_jacobian(x, y), ctx.mask).sum(1)
        flat = (*phi.shape[:2], prod(x.shape[2:]))
        columns = [column.sum() for column in x.reshape(flat).unbind(-1)]
    gain = torch.stack([vjp([column], [phi])[0] for column in columns], 2)
    (drive,) = vjp([ladj], [phi], [gl])
    gx = masked(gx, ctx.mask).reshape(flat)
    a, of_context, pairs = ctx.transform.conditioner.adjoint(ctx.state, gx, gain, drive, context)
    # one call, so that the gradients of a tensor that is used several times add up
    outputs, grads = zip((x, a.reshape(x.shape)), (ladj, gl), *pairs, strict=True)
    wanted = [t for t in ctx.tensors if t.requires_grad]
    of_y, *of_wanted = vjp(outputs, [y, *wanted], grads)
    found = iter(of_wanted)
    return [of_y, of_context, *(next(found) if t.requires_grad else None for t in ctx.tensors)]
