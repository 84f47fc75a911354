"""MADE: masked dense network, evaluated in parallel or incrementally (Germain et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from ..base import Conditioner, Head, Site
from ..contexts import check_context
from ..core.binding import Bound
from ..core.checks import check_sizes, check_widths
from ..core.functional import transformed
from ..core.precision import full_precision
from ..native.library import available
from .checks import check_chunk, check_rate, check_sites
from .encoding import dropped, encode, site_widths, visits, with_tensors
from .masked import MaskedLinear, check_connected, degrees_of, masks_of, reads_of
from .native_loop import applies, can_step, padded, reverse, solve, step, weights_of
from .sweeps import MADEState, Sweeps

_IN_PLACE: dict[Any, Callable[[Tensor], Tensor]] = {
    torch.relu: torch.relu_,
    torch.tanh: torch.tanh_,
    torch.sigmoid: torch.sigmoid_,
    silu: partial(silu, inplace=True),
}
_STEPS = ("start", "extend", "_finish")


class MADE(Conditioner):
    """Masked dense network over a fixed number of sites, with incremental evaluation.

    Each hidden unit has a degree d and reads what site d may read: all earlier sites, or those of ``adjacency[d]``.
    Degrees do not decrease along a layer, so the masks are block lower-triangular. The units of one degree need only
    the finished units of the layer below, so T calls of :meth:`extend` take about the arithmetic of one
    :meth:`forward`. With a context, degrees start at 0. Units of degree 0 read only the context, so that the parameters
    of the first site are a non-linear function of the context.

    Cost: ``forward`` is one dense pass. ``start`` and T - 1 calls of ``extend`` take the arithmetic of half a pass.
    Under ``no_grad`` they work in place, in panels of sites. With grad they build a graph of T steps; :meth:`adjoint`
    avoids it, unless dropout is active.

    Masked weights have random values, which matter only in :meth:`permuted` copies. L2 penalties, weight decay and
    priors include them; apply these to ``layer.masked()`` if that matters.

    Args:
        num_sites: T, the number of sites.
        num_params: P, the number of parameters per site.
        site: kind of a site: ``()`` for a real number, ``(k,)`` for a real vector, an integer V for categories 0 ...
            V-1 (one-hot encoded; any dtype), or a list of ``()`` and integers, one per site.
        context: C, the number of context features, which enter every layer; 0 for none.
        hidden: widths of the hidden layers, which may be less than T; ``()`` gives a masked linear map.
        activation: elementwise function, or a module without parameters.
        adjacency: Boolean (T, T), strictly lower triangular: site t reads site s if ``adjacency[t, s]``. By default,
            each site reads all earlier sites. A band of width k gives the order-k Markov model.
        direct: adds a masked linear map from the sites to the outputs. It improves density models of many sites, and
            makes a training step up to 1.5 times as long; the recipes of flows do not use it.
        dropout: dropout rate in training mode, after the activation of each hidden layer.

    Raises:
        TypeError: if ``dropout`` is not a number.
        ValueError: if a size is not a positive integer, ``adjacency`` has another shape or is not strictly lower
            triangular, or the hidden layers are too narrow for each site to read a site (unless ``direct``).

    Reference: Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution Estimation", ICML 2015.

    Example:
        >>> import torch
        >>> net = MADE(5, 2, context=3, hidden=(32, 32))
        >>> net(torch.zeros(7, 5), torch.zeros(7, 3)).shape
        torch.Size([7, 5, 2])
        >>> phi, state = net.start(torch.zeros(7, 3), batch_size=7)
        >>> phi, state = net.extend(torch.zeros(7, 1), state)
        >>> phi.shape
        torch.Size([7, 1, 2])
    """

    num_sites: int

    def __init__(
        self,
        num_sites: int,
        num_params: int,
        *,
        site: Site | Sequence[Site] = (),
        context: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: Callable[[Tensor], Tensor] = torch.relu,
        adjacency: Tensor | None = None,
        direct: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_rate(dropout)
        check_widths(1, hidden=hidden)
        check_sizes(1, num_sites=num_sites, num_params=num_params)
        check_sizes(0, context=context)
        self.num_sites, self.num_params, self.site, self.context = num_sites, num_params, site, context
        self.hidden, self.activation, self.dropout = tuple(hidden), _check_activation(activation), float(dropout)
        widths = site_widths(site, num_sites)
        reads = reads_of(adjacency, num_sites)
        self._reads_all = adjacency is None
        sites = [s for s, width in enumerate(widths) for _ in range(width)]
        degrees = degrees_of(self.hidden, num_sites, lowest=0 if context else min(1, num_sites - 1))
        outputs = [t for t in range(num_sites) for _ in range(num_params)]
        self._unread = widths[-1]  # zero inputs in place of the last site: matrices of even widths are faster
        masks = masks_of(reads, sites, degrees, outputs)
        if self.hidden and not direct:
            check_connected(reads, masks, self.hidden)
        scales = [1.0] * len(degrees) + [0.1]  # the last layer starts small, so that heads start near the identity
        self.layers = nn.ModuleList(MaskedLinear(m, context, scale=s) for m, s in zip(masks, scales, strict=True))
        skip = masks_of(reads, sites, [], outputs)[0] if direct and self.hidden and num_sites > 1 else None
        self.direct = None if skip is None else MaskedLinear(skip, bias=False, scale=0.1)

        levels = [[s + 1 for s in sites], *degrees, outputs]
        self._sweeps = Sweeps(levels, num_sites, num_params, direct=skip is not None)

    def extra_repr(self) -> str:
        sizes = f"{self.num_sites}, {self.num_params}, site={self.site}, context={self.context}, hidden={self.hidden}"
        return sizes + (f", dropout={self.dropout}" if self.dropout else "")

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps y (B, T, *site_shape) and the context (B, C) to phi (B, T, P); the last site of y is never read."""
        check_sites(self, y)
        check_context(self, context)
        inputs = below = pad(encode(y[:, :-1], self.site, 0, self.layers[0].weight), (0, self._unread))
        *hidden, last = self.layers
        for layer in hidden:
            below = dropped(self.activation(layer(below, context)), self)
        phi = last(below, context)
        if self.direct is not None:
            phi = phi + self.direct(inputs)
        return phi.unflatten(1, (self.num_sites, self.num_params))

    @full_precision
    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, MADEState]:
        """Returns the parameters (B, P) of the first site, and a state; without grad, its buffers are written in place."""
        check_context(self, context)
        links = self._modules_of_links()
        if any(link._forward_pre_hooks for link in links):
            raise RuntimeError(
                "Expected layers without forward pre-hooks, because incremental evaluation does not run them; got some "
                "(use torch.nn.utils.parametrizations instead)."
            )
        weights = tuple(link.masked().contiguous() for link in links)
        offsets = [layer.columns(context, batch_size) for layer in links[: len(self.layers)]]
        functorch = transformed()  # in-place writes of transformed tensors fail
        in_place = not (torch.is_grad_enabled() or functorch or torch.jit.is_tracing())  # type: ignore[attr-defined]
        native = in_place and available() and can_step(self.activation, weights)
        if in_place:
            inputs = weights[0].new_zeros(weights[0].shape[1], batch_size)
            units = [inputs, *(o.clone(memory_format=torch.contiguous_format) for o in offsets)]
            units = [*map(padded, units)] if native else units
        else:
            units = [weights[0].new_empty(0, batch_size)] * (len(offsets) + 1)
        state = MADEState(0, self.new_version(), weights, tuple(offsets), tuple(units), None, in_place, native)
        phi, state = self._finish(1, 0, state, units[0][:0].t())
        return phi.squeeze(1), state

    def extend(self, y: Tensor, state: MADEState) -> tuple[Tensor, MADEState]:
        """Reads y (B, S, *site_shape); returns the parameters (B, S, P) of the sites that follow, T - 1 sites in all."""
        first, sites = state.position, y.shape[1]
        check_chunk(self, y, first, state.units[0].shape[1])
        if state.in_place and torch.is_grad_enabled():
            raise RuntimeError(
                "Expected extend to run in the grad mode of start; got a state from start under no_grad, with grad on."
            )
        inputs = encode(y, self.site, first, state.weights[0])
        return self._finish(first + sites + 1, first + 1, self.advance(state, sites), inputs)

    def reorder(self, state: MADEState, index: Tensor) -> MADEState:
        """Returns a copy of the batch rows ``index`` (B',) of a state."""
        self.advance(state, 0)
        offsets, units = (
            tuple(part.index_select(1, index) for part in parts) for parts in (state.offsets, state.units)
        )
        units = tuple(map(padded, units)) if state.native else units
        return state._replace(version=list(state.version), offsets=offsets, units=units, panel=None)

    @full_precision
    def native_loop(self, head: Head, given: Tensor, context: Any, keep: bool = False) -> Any:
        """Computes all sites by the operator of :mod:`pyro_genexact.native`, or returns None if it does not apply.

        Args:
            head: the head of the sites.
            given: (B, T, *site_shape), the image y of a bijection, whose solution x is computed; for a distribution,
                numbers u in float64 whose quantiles are computed.
            context: the context (B, C), or None.
            keep: whether to return the parameters and the last state, too.

        Returns:
            A tuple of the values (B, T, *site_shape), the totals (B,), the parameters (B, T, P) and the last state. The
            totals are log|dx/dy| for a bijection, and NaN for a distribution if one of its parameters is.
        """
        if not (available() and applies(self.activation, head, given)):
            return None
        if any(name in vars(self) or getattr(type(self), name) is not getattr(MADE, name) for name in _STEPS):
            return None
        links = self._modules_of_links()
        if isinstance(self.site, list) or (self.dropout and self.training) or any(k._forward_pre_hooks for k in links):
            return None
        check_context(self, context)
        offsets = [layer.columns(context, len(given)) for layer in links[: len(self.layers)]]
        weights = [link.masked() for link in links] if keep else weights_of(self._sweeps, links)
        return solve(self, self._sweeps, head, given, weights, offsets, keep)

    @property
    def has_adjoint(self) -> bool:
        """Whether :meth:`adjoint` applies; False while dropout is active."""
        return not (self.dropout and self.training)

    @full_precision
    def adjoint(
        self, state: MADEState, g: Tensor, gain: Tensor, drive: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        """Reverse sweep: backpropagates through sites x that were computed one by one, each from its own parameters.

        Solves, from the last site to the first, the transposed triangular system

            a_t = g_t + sum_{s>t} (dphi_s/dx_t)^T b_s,      b_t = drive_t + (dx_t/dphi_t)^T a_t

        and returns the gradients of what phi depends on. Cost: about one :meth:`start` and T - 1 ``extend``.

        Args:
            state: the last state of an evaluation under ``no_grad`` that read all sites of x but the last.
            g: (B, T, k), the cotangent of x, where k is the number of elements of a site.
            gain: (B, T, k, P), the derivatives dx_t/dphi_t.
            drive: (B, T, P), the cotangent of phi.
            context: the context (B, C) that was given to ``start``, or None.

        Returns:
            a (B, T, k), the gradient of the context (B, C) or None, and a list of pairs (parameter, gradient).
        """
        found = reverse(self, self._sweeps, state, g, gain, drive, self._slope) if available() else None
        if found is None:
            slopes = [g, *(self._slope(level, state) for level in range(1, len(self.layers)))]
            found = self._sweeps.reverse(state, slopes, gain, drive)
        of_inputs, of_pre = found
        return of_inputs.view(g.shape[1], g.shape[2], len(g)).permute(2, 0, 1), *self._gradients(of_pre, state, context)

    def permuted(self, order: Tensor) -> MADE:
        """Returns a bound copy for variables visited in another order: site i is variable ``order[i]``.

        The columns of the first layer and the rows of the last layer that belong to a variable move to the site where
        the order puts it; the masks do not change. Gradients reach this module's parameters. Cost: a copy of these two
        layers.

        Args:
            order: (T,) a permutation of 0 ... T-1.

        Raises:
            ValueError: if ``order`` is not a permutation, the sites are of several kinds, or there is an ``adjacency``.

        Reference: Uria, Murray, Larochelle, "A Deep and Tractable Density Estimator", ICML 2014.

        Example:
            >>> import torch
            >>> net = MADE(3, 2)
            >>> net.permuted(torch.tensor([2, 0, 1]))(torch.zeros(5, 3)).shape
            torch.Size([5, 3, 2])
        """
        if not self._reads_all:
            raise ValueError(
                "Expected adjacency=None (an adjacency matrix refers to sites, so sites cannot be permuted); got a matrix."
            )
        net = Bound(self).copy()
        layers: Any = net.layers._modules
        first, last = "0", str(len(layers) - 1)
        inputs = layers[first].mask.shape[1] // self.num_sites
        columns, rows = visits(self, order, layers[first].weight, inputs, self.num_params)
        layers[first] = with_tensors(layers[first], weight=layers[first].weight[:, columns])
        parts = ("weight", "bias", "context_weight") if self.context else ("weight", "bias")
        layers[last] = with_tensors(layers[last], **{part: getattr(layers[last], part)[rows] for part in parts})
        if net.direct is not None:
            net._modules["direct"] = with_tensors(net.direct, weight=net.direct.weight[rows][:, columns])
        return net

    def _gradients(
        self, of_pre: list[Tensor], state: MADEState, context: Tensor | None
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """Returns the gradient of the context and pairs (parameter, gradient), given those of the pre-activations."""
        modules = self._modules_of_links()
        with torch.enable_grad():  # gradients of a parametrised weight continue to its original parameters
            weights = [link.weight for link in modules]
        layers = list(zip(modules[: len(self.layers)], of_pre[1:], strict=True))
        pairs = [  # masked_fill, because inf * 0 would be NaN
            (weights[index], (of_pre[level] @ state.units[source].t()).masked_fill_(modules[index].mask == 0, 0.0))
            for index, (level, source, _) in enumerate(self._sweeps.links)
        ]
        pairs += [(layer.bias, of.sum(1)) for layer, of in layers]
        if context is None:
            return None, pairs
        pairs += [(layer.context_weight, of @ context) for layer, of in layers]
        return torch.stack([of.t() @ layer.context_weight for layer, of in layers]).sum(0), pairs

    def _slope(self, level: int, state: MADEState) -> Tensor:
        """Returns the derivatives (units, B) of the activations of a hidden layer."""
        pre = state.offsets[level - 1]
        for above, source, weight in self._sweeps.links:
            if above == level:
                pre = torch.addmm(pre, state.weights[weight], state.units[source])
        with torch.enable_grad():
            pre = pre.detach().requires_grad_()
            return torch.autograd.grad(self.activation(pre).sum(), pre)[0]

    def _modules_of_links(self) -> list[Any]:
        return [*self.layers, *(() if self.direct is None else (self.direct,))]

    def _finish(self, high: int, low: int, state: MADEState, inputs: Tensor) -> tuple[Tensor, MADEState]:
        """Returns the outputs (B, high - low, P) of degrees low ... high - 1, given their new inputs (B, features)."""

        def activate(z: Tensor) -> Tensor:
            return dropped(self.activation(z), self)

        if not state.in_place:
            return self._sweeps.finish(low, high, state, inputs, activate)
        if state.native and not (self.dropout and self.training) and available():
            phi = step(self.activation, self._sweeps, low, high, state, inputs)
            if phi is not None:
                return phi, state
        in_place = None if self.dropout and self.training else _IN_PLACE.get(self.activation)
        return self._sweeps.finish_in_place(low, high, state, inputs, in_place or (lambda z: z.copy_(activate(z))))


def _check_activation(activation: Any) -> Callable[[Tensor], Tensor]:
    if not (
        callable(activation)
        and not (isinstance(activation, nn.Module) and [*activation.parameters()])
        and _elementwise(activation)
    ):
        raise ValueError(
            f"Expected activation to be an elementwise function without parameters that is not in place; got {activation}."
        )
    return activation


def _elementwise(activation: Callable[[Tensor], Tensor]) -> bool:
    """Returns whether a function maps a probe elementwise and does not change it."""
    z = torch.linspace(-2, 2, 12, device="cpu").view(3, 4)
    probe = z.clone()
    whole = activation(probe)
    if whole.shape != z.shape or not torch.equal(probe, z):
        return False
    return torch.allclose(whole, torch.cat([activation(row.clone()) for row in z.view(12, 1)]).view_as(z))
