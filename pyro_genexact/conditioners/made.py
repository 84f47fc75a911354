"""MADE: a masked dense network, evaluated in parallel or incrementally (Germain et al. 2015)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from ..base import Conditioner, Site, check_context, check_sizes
from .masks import check_connected, degrees_of, masks_of, reads_of

PANEL = 16  # sites between two products with the whole finished prefix; 8 to 32 measure alike


class MaskedLinear(nn.Module):
    """A linear layer whose weight is masked wherever it is used, with a linear term in the context beside it.

    y = (mask * weight) x + context_weight c + bias

    Args:
        mask: (out, in) Boolean, which inputs an output may read.
        context: C, features of the context; 0 for none.
        bias: whether there is a bias.
        scale: the start's weights are uniform within scale / sqrt(inputs that the output reads).

    Example:
        >>> layer = MaskedLinear(torch.tensor([[True, False], [True, True]]))
        >>> layer(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    mask: Tensor

    def __init__(self, mask: Tensor, context: int = 0, bias: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        weight = torch.empty(mask.shape)
        mask = mask.to(weight)
        bound = scale * (mask.sum(1, keepdim=True) + context).clamp(min=1).rsqrt()

        def uniform(columns: int) -> Tensor:
            return (2 * torch.rand(len(mask), columns) - 1) * bound

        self.register_buffer("mask", mask, persistent=False)
        self.weight = nn.Parameter(uniform(mask.shape[1]) * mask)
        self.bias = nn.Parameter(uniform(1).squeeze(1)) if bias else None
        self.context_weight = nn.Parameter(uniform(context)) if context else None

    def masked(self) -> Tensor:
        """The weight (out, in), zero where the mask forbids a connection."""
        return self.weight * self.mask

    def offset(self, context: Tensor | None) -> Tensor | None:
        """What does not depend on x: (B, out) from a context (B, C), else the bias (out,) or None."""
        return self.bias if self.context_weight is None else linear(_given(context), self.context_weight, self.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, in) and (B, C) to (B, out)."""
        if self.context_weight is None:
            return linear(x, self.masked(), self.bias)
        return torch.addmm(_given(self.offset(context)), x, self.masked().t())


class MADEState(NamedTuple):
    """An incremental evaluation of :class:`MADE` at some site; its tensors are feature-major, (units, B).

    Attributes:
        position: sites read so far.
        clock: sites read by any successor of this state.
        weights: the masked weights, one a link.
        below: the inputs and the activations of each hidden layer, as far as they are known.
        pre: the offsets of each layer; in place, what was added to them so far.
        in_place: whether the buffers are of full size and written in place.
    """

    position: int
    clock: Tensor
    weights: tuple[Tensor, ...]
    below: tuple[Tensor, ...]
    pre: tuple[Tensor, ...]
    in_place: bool


class MADE(Conditioner):
    r"""Masked dense network over a fixed number of sites, with a truly incremental evaluation.

    Each hidden unit has a degree d and reads what site d may read: all earlier sites, or those of ``adjacency[d]``.
    Degrees do not decrease along a layer, so the masks are block lower-triangular: the units of one degree need only
    what is finished below them, and T calls of :meth:`extend` cost about the arithmetic of one :meth:`forward`. With a
    context degrees start at 0: such units read the context only, which makes the first site's parameters a non-linear
    function of it.

    Cost: ``forward`` is one dense pass. ``start`` and T - 1 times ``extend`` have the arithmetic of half a pass: under
    ``no_grad`` in place, in panels of sites; with grad in a graph of T steps, which :meth:`adjoint` makes unnecessary.

    Args:
        num_sites: T.
        num_params: P, parameters a site.
        site: what one site looks like: ``()`` a real number, ``(k,)`` a real vector, an integer V one of the categories
            0 ... V-1 (one-hot, of any dtype), or a list of ``()`` and integers, one a site.
        context: C, features of the context vector; it enters every layer.
        hidden: widths of the hidden layers, which may be narrower than T; ``()`` leaves a masked linear map.
        activation: an elementwise function, or a module without parameters.
        adjacency: (T, T) Boolean, strictly lower triangular: ``adjacency[t, s]`` lets site t read site s. By default
            all earlier sites. A band of width k is the order-k Markov model.
        direct: adds a masked linear link from the sites to the outputs.

    Raises:
        ValueError: for sizes that are no positive integers, an adjacency of another shape or not strictly lower
            triangular, and hidden layers so narrow that a site reads none of the sites it may read (unless ``direct``).

    Reference: Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution Estimation", ICML 2015.

    Example:
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
        direct: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(1, num_sites=num_sites, num_params=num_params, hidden=hidden)
        check_sizes(0, context=context)
        self.num_sites, self.num_params, self.site, self.context = num_sites, num_params, site, context
        self.hidden, self.activation = tuple(hidden), _check_activation(activation)
        widths = _site_widths(site, num_sites)[:-1]  # nobody reads the last site
        reads = reads_of(adjacency, num_sites)
        sites = [s for s, width in enumerate(widths) for _ in range(width)]
        degrees = degrees_of(self.hidden, num_sites, lowest=0 if context else min(1, num_sites - 1))
        outputs = [t for t in range(num_sites) for _ in range(num_params)]
        masks = masks_of(reads, sites, degrees, outputs)
        if self.hidden and not direct:
            check_connected(reads, masks, sites, num_params, self.hidden)
        scales = [1.0] * len(degrees) + [0.1]  # a small last layer: heads start near the identity
        self.layers = nn.ModuleList(MaskedLinear(m, context, scale=s) for m, s in zip(masks, scales, strict=True))
        skip = masks_of(reads, sites, [], outputs)[0] if direct and self.hidden else None
        self.direct = None if skip is None else MaskedLinear(skip, bias=False, scale=0.1)

        # The units of a level (inputs, hidden layers, outputs) with degree below d are its first _ends[level][d].
        levels = [[s + 1 for s in sites], *degrees, outputs]
        self._ends = [[bisect_left(level, d) for d in range(num_sites + 1)] for level in levels]
        # (level, level that it reads, weight), from the bottom up
        self._links = [(level + 1, level, level) for level in range(len(masks))]
        if skip is not None:
            self._links.append((len(masks), 0, len(masks)))

    def extra_repr(self) -> str:
        return f"{self.num_sites}, {self.num_params}, site={self.site}, context={self.context}, hidden={self.hidden}"

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, T, *site_shape) and (B, C) to (B, T, P) by one masked dense pass; the last site is never read."""
        if y.shape[1] != self.num_sites:
            raise ValueError(f"Expected y.shape[1] == {self.num_sites} (num_sites of MADE); got {tuple(y.shape)}.")
        check_context(self, context)
        inputs = below = self._encode(y[:, :-1], 0, self.layers[0].weight)
        for layer in self.layers[:-1]:
            below = self.activation(layer(below, context))
        phi = self.layers[-1](below, context)
        if self.direct is not None:
            phi = phi + self.direct(inputs)
        return phi.unflatten(1, (self.num_sites, self.num_params))

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, MADEState]:
        """(B, C) to the first site's parameters (B, P) and a state, whose buffers are written in place unless grad is on."""
        check_context(self, context)
        in_place = not torch.is_grad_enabled()
        links = self._modules_of_links()
        weights = tuple(link.masked() for link in links)
        offsets = [_given(layer.offset(context)) for layer in self.layers]
        pre = [o.t() if o.dim() == 2 else o[:, None].expand(-1, batch_size) for o in offsets]
        if in_place:  # never write into a parameter
            pre = [o.clone(memory_format=torch.contiguous_format) for o in pre]
        below = [weights[0].new_empty(ends[-1] if in_place else 0, batch_size) for ends in self._ends[:-1]]
        state = MADEState(0, self.clock(), weights, tuple(below), tuple(pre), in_place)
        phi, state = self._advance_to(1, 0, state)
        return phi.squeeze(1), state

    def extend(self, y: Tensor, state: MADEState) -> tuple[Tensor, MADEState]:
        """Reads y (B, S, *site_shape): the parameters (B, S, P) of the sites after them; at most T - 1 sites in all."""
        first, sites = state.position, y.shape[1]
        if not 1 <= sites < self.num_sites - first:
            raise ValueError(
                f"Expected y.shape[1] between 1 and {self.num_sites - 1 - first} ({first} of {self.num_sites} sites were "
                f"read and the last one never is); got {tuple(y.shape)}."
            )
        new = self.advance(state, sites)
        inputs = self._encode(y, first, state.weights[0]).t()
        if state.in_place:
            state.below[0][self._ends[0][first + 1] : self._ends[0][first + sites + 1]] = inputs
        else:
            new = new._replace(below=(torch.cat([state.below[0], inputs]), *state.below[1:]))
        return self._advance_to(first + sites + 1, first + 1, new)

    def reorder(self, state: MADEState, index: Tensor) -> MADEState:
        """A copy of the batch rows ``index`` (B',) of a state, to branch from it."""
        self.advance(state, 0)
        below, pre = (tuple(part.index_select(1, index) for part in parts) for parts in (state.below, state.pre))
        return state._replace(clock=state.clock.clone(), below=below, pre=pre)

    def adjoint(
        self, state: MADEState, g: Tensor, gain: Tensor, drive: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        """The reverse sweep: gradients through sites x that were drawn one by one, each from its own parameters.

        Solves, from the last site to the first, the transposed triangular system

            a_t = g_t + sum_{s>t} (dphi_s/dx_t)^T b_s,      b_t = drive_t + (dx_t/dphi_t)^T a_t

        and turns b into gradients of what phi is computed from. Cost: about one :meth:`start` and T - 1 ``extend``.

        Args:
            state: the last state of an evaluation under ``no_grad``, all of x but the last site read.
            g: (B, T, k) the cotangent of x, k the numbers of a site.
            gain: (B, T, k, P) the derivatives dx_t/dphi_t.
            drive: (B, T, P) the cotangent of phi.
            context: what ``start`` was given.

        Returns:
            a (B, T, k), the gradient of the context (B, C) or None, and (parameter, gradient) pairs.
        """
        T, P, k, last = self.num_sites, self.num_params, g.shape[2], len(self.layers)
        slopes = [_slope(self.activation, pre) for pre in state.pre[:-1]]
        of_sites, of_phi = _feature_major(g), _feature_major(drive)
        gains = gain.permute(2, 1, 3, 0).reshape(k, T * P, -1)
        of_below = [of_sites, *(torch.zeros_like(slope) for slope in slopes)]
        of_pre = [of_phi, *(torch.zeros_like(slope) for slope in slopes)]  # by level, the outputs first
        of_pre = [*of_pre[1:], of_pre[0]]

        def pull(level: int, below: int, weight: Tensor, low: int, high: int, start: int, stop: int) -> None:
            """Adds to units of degrees low ... high - 1 what those of degrees start ... stop - 1 above ask of them."""
            rows = slice(self._ends[level][start], self._ends[level][stop])
            columns = slice(self._ends[below][low], self._ends[below][high])
            if rows.start < rows.stop and columns.start < columns.stop:
                of_below[below][columns].addmm_(weight[rows, columns].t(), of_pre[level - 1][rows])

        for panel in range((T - 1) // PANEL * PANEL, -1, -PANEL):
            end = min(panel + PANEL, T)
            for level, below, weight in self._links:
                pull(level, below, state.weights[weight], panel, end, end, T)
            for t in range(end - 1, panel - 1, -1):
                rows = slice(t * P, (t + 1) * P)
                for j in range(k):
                    of_phi[rows].addcmul_(gains[j, rows], of_sites[t * k + j])
                for source in range(last - 1, -1, -1):
                    for level, below, weight in self._links:
                        if below == source:
                            pull(level, below, state.weights[weight], t, t + 1, t, end)
                    units = slice(self._ends[source][t], self._ends[source][t + 1])
                    if source and units.start < units.stop:
                        torch.mul(of_below[source][units], slopes[source - 1][units], out=of_pre[source - 1][units])

        pairs: list[tuple[Tensor, Tensor]] = []
        for (level, below, _), link in zip(self._links, self._modules_of_links(), strict=True):
            pairs.append((link.weight, (of_pre[level - 1] @ state.below[below].t()) * link.mask))
        of_context = None
        for layer, of in zip(self.layers, of_pre, strict=True):
            pairs.append((layer.bias, of.sum(1)))
            if context is not None:
                pairs.append((layer.context_weight, of @ context))
                share = of.t() @ layer.context_weight
                of_context = share if of_context is None else of_context + share
        return of_sites.view(T, k, -1).permute(2, 0, 1), of_context, pairs

    def _modules_of_links(self) -> list[MaskedLinear]:
        return [*self.layers, *(() if self.direct is None else (self.direct,))]  # type: ignore[list-item]

    def _advance_to(self, high: int, low: int, state: MADEState) -> tuple[Tensor, MADEState]:
        """The outputs (B, high - low, P) of degrees low ... high - 1, whose inputs have been read."""
        if state.in_place:
            self._finish_in_place(low, high, state)
            phi = state.pre[-1][low * self.num_params : high * self.num_params]
        else:
            phi, below = self._finish(low, high, state)
            state = state._replace(below=below)
        return phi.unflatten(0, (high - low, self.num_params)).permute(2, 0, 1), state

    def _finish(self, low: int, high: int, state: MADEState) -> tuple[Tensor, tuple[Tensor, ...]]:
        below, total = list(state.below), state.pre[0]
        for top, pre in enumerate(state.pre, start=1):
            rows = slice(self._ends[top][low], self._ends[top][high])
            total = pre[rows]
            for level, source, weight in self._links:
                if level == top:
                    total = total + state.weights[weight][rows, : len(below[source])] @ below[source]
            if top < len(state.pre):
                below[top] = torch.cat([below[top], self.activation(total)])
        return total, tuple(below)

    def _finish_in_place(self, low: int, high: int, state: MADEState) -> None:
        ends, pre, below = self._ends, state.pre, state.below
        while low < high:
            panel = low - low % PANEL
            stop, end = min(high, panel + PANEL), min(panel + PANEL, self.num_sites)
            if low == panel > 0:  # at once, for the whole panel: what the finished prefix contributes
                for level, source, weight in self._links:
                    rows, columns = slice(ends[level][panel], ends[level][end]), slice(0, ends[source][panel])
                    pre[level - 1][rows].addmm_(state.weights[weight][rows, columns], below[source][columns])
            for level, source, weight in self._links:  # the rest: what lies inside the panel
                rows, columns = slice(ends[level][low], ends[level][stop]), slice(ends[source][panel], ends[source][stop])
                total = pre[level - 1][rows]
                total.addmm_(state.weights[weight][rows, columns], below[source][columns])
                if level < len(pre):
                    below[level][rows] = self.activation(total)
            low = stop

    def _encode(self, y: Tensor, first: int, like: Tensor) -> Tensor:
        """(B, S, *site_shape) from site ``first`` on to the network's inputs (B, features)."""
        if isinstance(self.site, tuple):
            if y.dtype != like.dtype:
                raise ValueError(f"Expected y.dtype == {like.dtype} (that of the parameters); got {y.dtype}.")
            return y.flatten(1)
        if isinstance(self.site, int):
            return _one_hot(y, self.site, like).flatten(1)
        kinds = self.site[first : first + y.shape[1]]
        columns = [
            _one_hot(y[:, i], kind, like) if isinstance(kind, int) else y[:, i, None].to(like.dtype)
            for i, kind in enumerate(kinds)
        ]
        return torch.cat(columns, 1) if columns else like.new_empty(len(y), 0)


def _one_hot(y: Tensor, categories: int, like: Tensor) -> Tensor:
    labels = y.long()
    if y.is_floating_point() and (labels != y).any():
        raise ValueError(f"Expected integers 0 ... {categories - 1} at a site with {categories} categories; got {y[labels != y][0]}.")
    if not y.is_meta and y.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < categories:
        raise ValueError(
            f"Expected integers 0 ... {categories - 1} at a site with {categories} categories; "
            f"got {int(labels.min())} ... {int(labels.max())}."
        )
    return one_hot(labels, categories).to(like.dtype)


def _site_widths(site: Site | Sequence[Site], num_sites: int) -> list[int]:
    """The number of network inputs of each site."""
    kinds = list(site) if isinstance(site, list) else [site] * num_sites
    if len(kinds) != num_sites or (isinstance(site, list) and not all(k == () or isinstance(k, int) for k in kinds)):
        raise ValueError(f"Expected site to be one kind or a list of {num_sites} scalar kinds, () or an integer; got {site}.")
    for kind in kinds:
        check_sizes(1, site=kind if isinstance(kind, int) else tuple(kind))  # type: ignore[arg-type]
    return [kind if isinstance(kind, int) else prod(kind) for kind in kinds]  # type: ignore[arg-type]


def _check_activation(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    parameters = list(activation.parameters()) if isinstance(activation, nn.Module) else []
    if not callable(activation) or parameters or getattr(activation, "inplace", False):
        raise ValueError(f"Expected activation to be an elementwise function without parameters, not in place; got {activation}.")
    return activation


def _slope(activation: Callable[[Tensor], Tensor], pre: Tensor) -> Tensor:
    with torch.enable_grad():
        z = pre.detach().requires_grad_()
        return torch.autograd.grad(activation(z).sum(), z)[0]


def _feature_major(x: Tensor) -> Tensor:
    """A fresh (T * n, B) from (B, T, n)."""
    return x.permute(1, 2, 0).flatten(0, 1).clone(memory_format=torch.contiguous_format)


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
