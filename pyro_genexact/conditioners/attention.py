"""Transformer: causal self-attention over sites, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.functional import scaled_dot_product_attention as attention

from ..base import Conditioner, Site
from ..contexts import Covariates, PaddedSequence, Source, check_context, kind_of
from ..core.checks import check_sizes
from ..core.rows import take_rows
from .cache import Cache, concatenates, empty_cache
from .checks import check_chunk, check_rate, check_rows, check_sites
from .encoding import SiteEncoder, covariates, dropped, resumed, share, small_linear, source_steps
from .rotary import checked_grid, speeds, turns

Weights = dict[str, tuple[Tensor, Tensor]]  # transposed weight and bias of each part of a layer


class TransformerState(NamedTuple):
    """State of a :class:`Transformer`.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        used: number of filled positions of the cache, including the start vector's.
        cache: (depth, 2, B, heads, capacity, width / heads), the rotated keys, and the values.
        speed: (3, 1, width / heads / 2), the rotation angle per position of queries, keys and values; of a grid, per row
            in the first half and per column in the second.
        weights: without grad, a copy of each layer's weights in the fastest layout for single steps.
        context: (B, 1, width) or (B, T, width), the encoded context or covariates; or None.
        source: for each layer, the steps (B, S, C) of the source, or their keys and values (B, heads, S, width / heads).
        allowed: (B, 1, 1, S), Boolean, the source steps that a row attends to; None for all.
    """

    position: int
    version: list[int]
    used: int
    cache: Tensor
    speed: Tensor
    weights: list[Weights]
    context: Tensor | None
    source: tuple[Any, ...]
    allowed: Tensor | None


class Transformer(Conditioner):
    """Pre-norm Transformer decoder: each site attends to all earlier sites.

        h_t = in(y_{t-1}) + in'(x),     h = h + attention(norm(h)),     h = h + mlp(norm(h)),     phi_t = W norm(h_t) + b

    The two middle steps are repeated ``depth`` times. A learned start vector replaces in(y_0), so that the parameters
    of the first site are also a non-linear function of the context x. Queries and keys have rotary position embeddings,
    so attention depends on distances only and the network accepts any length. With a source, each layer also attends to
    the source, between its two steps. A source of length 0 contributes exactly zero. The source has no position
    embedding: its order matters only through its features.

    With a ``grid``, the sites are the pixels or patches of an image in raster order. The position of a site is then its
    row and its column: half of the frequencies of each head turn with the row and half with the column. The inputs also
    have a learned vector per site, because places of an image differ.

    Cost: ``forward`` evaluates all T sites in parallel in O(T^2) operations, without a mask unless ``window`` is set.
    ``extend`` evaluates only the S new sites, which attend to the cached keys and values of earlier ones. The cache
    holds 2 * depth * width numbers per site and row, and only the last w - 1 sites if ``window`` is w. Without grad the
    cache is a preallocated buffer, which grows by an eighth or at least 32 sites when it is full; with grad it is
    concatenated. ``forward`` calls its layers, so that their hooks run. ``start`` computes the keys and values of a
    source once, and reads the weights of the layers; hooks on the parts of a layer do not run. On CPUs, torch's attention
    has no second and no forward-mode derivatives; for these use
    ``torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)``.

    Args:
        site: kind of a site: ``()`` for a real number and ``(k,)`` for a real vector, which a linear layer reads, or an
            integer V for categories 0 ... V-1, which are embedded.
        num_params: P, the number of parameters per site.
        context: C, the number of features of a context vector; ``Covariates(C)`` for covariates, where site t reads
            those of the sites up to t; or ``Source(C)`` for a source sequence that all sites attend to
            (encoder-decoder), passed as a :class:`~pyro_genexact.PaddedSequence` if its rows have different lengths.
        width: width of the residual stream; the MLPs have 4 * width hidden units.
        depth: number of layers.
        num_heads: number of attention heads; 2 * num_heads divides ``width``.
        max_len: the largest number of sites; unlimited by default.
        window: w, the number of positions that each position attends to, including itself; unlimited by default. With
            depth d, site t reads the last d * (w - 1) + 1 sites before it.
        dropout: dropout rate in training mode, after the inputs and after each attention and MLP.
        grid: (H, W), the rows and columns of the sites of an image; 4 * num_heads then divides ``width``, and
            ``max_len`` is H * W. By default the sites are a sequence.

    Raises:
        TypeError: if ``dropout`` is not a number.
        ValueError: if a size is not a positive integer, ``width`` is not a multiple of 2 * num_heads, ``dropout`` is
            outside [0, 1), ``grid`` is not two positive integers, or it is given with ``max_len``. In calls, for
            categories out of range, a context of another width, a number of rows other than the state's, and more sites
            than covariates or ``max_len``.

    References: Vaswani et al., "Attention is all you need", NeurIPS 2017; Xiong et al., "On layer normalization in the
    Transformer architecture", ICML 2020 (pre-norm); Su et al., "RoFormer: enhanced Transformer with rotary position
    embedding", 2021; Beltagy, Peters, Cohan, "Longformer", 2020 (window); Heo et al., "Rotary position embedding for
    vision Transformer", ECCV 2024 (grid).

    Example:
        >>> import torch
        >>> from pyro_genexact import PaddedSequence, Source
        >>> net = Transformer(5, 3, width=16, depth=2, num_heads=2, context=Source(4))
        >>> lengths = torch.tensor([0, 1, 2, 3, 4, 5, 6])
        >>> source = PaddedSequence(torch.zeros(7, 6, 4), lengths)
        >>> net(torch.zeros(7, 9, dtype=torch.long), source).shape
        torch.Size([7, 9, 3])
        >>> phi, state = net.start(source, batch_size=7)
        >>> phi, state = net.extend(torch.zeros(7, 4, dtype=torch.long), state)
        >>> phi.shape
        torch.Size([7, 4, 3])
    """

    def __init__(
        self,
        site: Site,
        num_params: int,
        *,
        context: int | Covariates | Source = 0,
        width: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        max_len: int | None = None,
        window: int | None = None,
        dropout: float = 0.0,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        given = {name: n for name, n in (("max_len", max_len), ("window", window)) if n is not None}
        check_sizes(1, num_params=num_params, width=width, depth=depth, num_heads=num_heads, **given)
        check_rate(dropout)
        self.grid = None if grid is None else checked_grid(grid, max_len)
        factor = 2 if grid is None else 4
        if width % (factor * num_heads):
            raise ValueError(
                f"Expected width divisible by {factor} * num_heads == {factor * num_heads} (rotary embedding); got {width}."
            )
        self.site, self.num_params, self.context = site, num_params, context
        self.width, self.depth, self.num_heads = width, depth, num_heads
        self.max_len = max_len if grid is None else prod(grid)
        self.window, self.dropout = window, float(dropout)
        self.encoder = SiteEncoder(site, width)
        self.read = nn.Identity() if isinstance(site, int) else nn.Linear(self.encoder.features, width)
        self.begin = nn.Parameter(torch.randn(width))
        kind = kind_of(context)
        self.read_context = nn.Linear(kind.joined, width) if kind.joined else None
        self.layers: Any = nn.ModuleList(
            Layer(width, num_heads, kind.attended, depth, self.dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.last = small_linear(width, num_params)
        self.places = None if grid is None else nn.Parameter(0.02 * torch.randn(prod(grid), width))

    def extra_repr(self) -> str:
        return (
            f"{self.site}, {self.num_params}, context={self.context}, width={self.width}, depth={self.depth}, "
            f"num_heads={self.num_heads}, max_len={self.max_len}, window={self.window}, dropout={self.dropout}"
            + ("" if self.grid is None else f", grid={self.grid}")
        )

    def forward(self, y: Tensor, context: Tensor | PaddedSequence | None = None) -> Tensor:
        """Maps y (B, T, *site_shape) and the context to phi (B, T, P) in parallel over the sites.

        The context has shape (B, C), or (B, T or more, C) for covariates, or (B, S, C) for a source.
        """
        check_sites(self, y)
        state = self._before(context, y.shape[0])
        begin = self.begin.expand(y.shape[0], 1, -1)
        inputs = torch.cat([begin, self.read(self.encoder(y[:, :-1], self.begin))], 1)
        return self._run(self._joined(inputs, state, 0), state, 0)

    def start(self, context: Tensor | PaddedSequence | None, batch_size: int) -> tuple[Tensor, TransformerState]:
        """Returns the parameters (B, P) of the first site and the state after the start vector."""
        state = self._before(context, batch_size)
        weights = [layer.weights() for layer in self.layers]
        sources = zip(self.layers, state.source, weights, strict=False)
        state = state._replace(source=tuple(layer.of_source(steps, w) for layer, steps, w in sources))
        if not concatenates():
            state = state._replace(weights=[_for_steps(w, batch_size) for w in weights])
        phi, state = self._read(self._joined(self.begin.expand(batch_size, 1, -1), state, 0), state, 0)
        return phi.squeeze(1), state

    def extend(self, y: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """Reads y (B, S, *site_shape) in parallel; returns the parameters (B, S, P) of the sites that follow."""
        first = state.position + 1
        check_chunk(self, y, state.position, state.cache.shape[2])
        state = resumed(state)
        inputs = self._joined(self.read(self.encoder(y, self.begin)), state, first)
        return self._read(inputs, self.advance(state, y.shape[1]), first)

    def reorder(self, state: TransformerState, index: Tensor) -> TransformerState:
        """Returns a copy of the batch rows ``index`` (B',) of a state, with only the used part of the cache."""
        self.advance(state, 0)
        seen = self._seen(state.used)
        old = state.cache[..., state.used - seen : state.used, :]
        if concatenates():
            cache = old.index_select(2, index)
        else:
            cache = empty_cache(old, self.depth, len(index), self._capacity(seen + 1))
            torch.index_select(old, 2, index, out=cache[..., :seen, :])
        return state._replace(
            version=list(state.version),
            used=seen,
            cache=cache,
            context=take_rows(state.context, index),
            source=take_rows(state.source, index),
            allowed=take_rows(state.allowed, index),
        )

    def _before(self, context: Any, batch_size: int) -> TransformerState:
        """Returns the state before the start vector."""
        check_context(self, context)
        size = self.width // self.num_heads
        cache = self.begin.new_empty(self.depth, 2, batch_size, self.num_heads, 0, size)
        speed = speeds(size, self.grid, self.begin)
        state = TransformerState(0, self.new_version(), 0, cache, speed, [], None, (), None)
        if kind_of(self.context).attended:
            steps, allowed = source_steps(context, batch_size)
            return state._replace(
                source=(steps,) * self.depth, allowed=None if allowed is None else allowed.unsqueeze(1)
            )
        if self.read_context is None:
            return state
        check_rows("context", context, batch_size, "the batch")
        inputs = self.read_context(context)
        return state._replace(context=inputs.unsqueeze(1) if inputs.dim() == 2 else inputs)

    def _joined(self, inputs: Tensor, state: TransformerState, first: int) -> Tensor:
        if self.places is not None:
            inputs = inputs + self.places[first : first + inputs.shape[1]]
        if state.context is not None:
            by_site = kind_of(self.context).by_site
            inputs = inputs + (covariates(state.context, first, inputs.shape[1]) if by_site else state.context)
        return dropped(inputs, self)

    def _run(self, x: Tensor, state: TransformerState, first: int, cache: Cache | None = None) -> Tensor:
        """Returns phi (B, S, P) of S positions, the first at ``first``, from their inputs x (B, S, width)."""
        mask, causal = self._mask(x, self._seen(state.used))
        turn = turns(state.speed, first, x.shape[1], self.grid)
        source = state.source or [None] * self.depth
        weights = state.weights if state.weights and not concatenates() else [None] * self.depth

        def attend(i: int, turned: Tensor) -> Tensor:
            query, key, value = turned.unbind(0) if cache is None else (turned[0], *cache.append(i, turned[1:]))
            return attention(query, key, value, mask, is_causal=causal)

        for i, (layer, w, of_source) in enumerate(zip(self.layers, weights, source, strict=True)):
            x = layer(x, turn, partial(attend, i), of_source, state.allowed, w)
        return self.last(self.norm(x))

    def _read(self, x: Tensor, state: TransformerState, first: int) -> tuple[Tensor, TransformerState]:
        """Returns phi as :meth:`_run` does, and the state after these positions."""
        seen, sites = self._seen(state.used), x.shape[1]
        cache = Cache(state.cache, state.used, seen, sites, self._capacity(seen + sites))
        phi = self._run(x, state, first, cache)
        buffer, used = cache.end()
        return phi, state._replace(cache=buffer, used=used)

    def _seen(self, used: int) -> int:
        """Returns how many earlier positions the next position attends to."""
        return used if self.window is None else min(used, self.window - 1)

    def _capacity(self, needed: int) -> int:
        room = needed + max(needed // 8, 32)  # a compact buffer is faster to read than a very large one
        return room if self.max_len is None else max(needed, min(room, self.max_len))

    def _mask(self, x: Tensor, seen: int) -> tuple[Tensor | None, bool]:
        """Returns the attention mask of S new positions over ``seen`` earlier ones and themselves, and ``is_causal``.

        The mask is None if ``is_causal`` is sufficient or all positions may attend to each other.
        """
        sites = x.shape[1]
        if sites == 1:
            return None, False
        if not seen and (self.window is None or sites <= self.window):
            return None, True
        mask = torch.ones(sites, seen + sites, dtype=torch.bool, device=x.device).tril(seen)
        return mask if self.window is None else mask.triu(seen - self.window + 1), False


class Layer(nn.Module):
    """A layer of :class:`Transformer`: self-attention over sites, attention to a source if there is one, and an MLP."""

    def __init__(self, width: int, num_heads: int, source: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        shares = 3 * depth if source else 2 * depth  # number of terms that the residual stream sums
        self.norm, self.qkv, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width), share(width, width, shares)
        self.norm_mlp, self.up = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.down = share(4 * width, width, shares)
        if source:  # no biases, so that a source of zeros contributes zero
            self.norm_source, self.query = nn.LayerNorm(width), nn.Linear(width, width)
            self.source = nn.Linear(source, 2 * width, bias=False)
            self.mix_source = share(width, width, shares, bias=False)

    def weights(self) -> Weights:
        """Returns the transposed weight and the bias of each part."""
        return {name: (part.weight.t(), part.bias) for name, part in self.named_children()}  # type: ignore[operator,misc]

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        attend: Callable[[Tensor], Tensor],
        source: Any,
        allowed: Tensor | None,
        w: Weights | None,
    ) -> Tensor:
        """Maps x (B, S, width) to the outputs of the layer.

        Args:
            x: the inputs.
            turn: the rotations of queries, keys and values.
            attend: maps these (3, B, heads, S, width / heads) to the attention output.
            source: the steps of the source or their keys and values, or None.
            allowed: the steps of the source that a row attends to, or None for all.
            w: the weights if they were read before, or None.
        """
        w = w or self.weights()
        if isinstance(source, Tensor):
            source = self.of_source(source, w)
        return self._after(x, w, attend(self._project(x, w, turn)), source, allowed)

    def _project(self, x: Tensor, w: Weights, turn: Tensor) -> Tensor:
        """Returns the rotated queries, keys and values (3, B, heads, S, width / heads)."""
        qkv = _linear(_normed(x, w["norm"]), w["qkv"])
        pairs = torch.view_as_complex(qkv.to(turn.real.dtype).unflatten(2, (3, self.num_heads, -1, 2)))
        return torch.view_as_real(pairs * turn).flatten(4).to(qkv.dtype).permute(2, 0, 3, 1, 4)

    def of_source(self, steps: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
        """Returns the keys and values (B, heads, S, width / heads) of a source (B, S, C)."""
        both = _linear(steps, w["source"]).unflatten(2, (2, self.num_heads, -1))
        key, value = both.transpose(1, 3).unbind(2)
        return key, value

    def _after(self, x: Tensor, w: Weights, found: Tensor, source: Any, allowed: Tensor | None) -> Tensor:
        """Adds to x the attention output (B, heads, S, width / heads), the attention to the source and the MLP."""
        x = x + dropped(_linear(_merged(found), w["mix"]), self)
        if source is not None:
            query = _linear(_normed(x, w["norm_source"]), w["query"])
            query = query.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            found = attention(query, source[0], source[1], allowed)
            x = x + dropped(_linear(_merged(found), w["mix_source"]), self)
        hidden = gelu(_linear(_normed(x, w["norm_mlp"]), w["up"]))
        return x + dropped(_linear(hidden, w["down"]), self)


def _for_steps(weights: Weights, rows: int) -> Weights:
    """Returns copies of weights in the layout that is fastest for one site per row."""
    return {n: (w.contiguous() if rows > 1 or w.shape[0] <= w.shape[-1] else w, b) for n, (w, b) in weights.items()}


def _linear(x: Tensor, w: tuple[Tensor, Tensor | None]) -> Tensor:
    rows = x.flatten(0, -2)
    return (rows @ w[0] if w[1] is None else torch.addmm(w[1], rows, w[0])).unflatten(0, x.shape[:-1])


def _normed(x: Tensor, w: tuple[Tensor, Tensor]) -> Tensor:
    return torch.layer_norm(x, w[0].shape, *w)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
