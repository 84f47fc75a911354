"""PixelCNN: gated convolutions over the pixels of an image in raster order, with a cache per layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from ..base import Site
from ..contexts import PaddedSequence, Source, check_context, kind_of
from ..core.checks import check_sizes, check_widths
from ..core.rows import take_rows
from .checks import check_chunk, check_rate, check_rows, check_sites
from .encoding import SiteEncoder, resumed, small_linear
from .pixel_layer import PixelLayer, Tensors, convolved, matrix
from .steps import ReadsSource


class PixelCNNState(NamedTuple):
    """State of a :class:`PixelCNN`, which has read B rows up to some channel of the pixel at row i and column j.

    In the shapes, D is the width of the layers, n is ``kernel // 2``, and F is the number of features of a pixel.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        channels: (B, c, features of a channel), the encoded channels of pixel (i, j) that have been read.
        out: (B, 1, D), the output of the layers at pixel (i, j).
        row: (B, pixels, F), the encoded pixels of row i to the left of column j, in parts.
        left: for each layer, the last pixels (B, 1, n, D) that its horizontal convolution read.
        terms: for each layer, what the vertical stack adds to the gates of row i, (B, 1, W, 2 D).
        above: for each layer, the last rows (B, n, W, D) that its vertical convolution read.
        context: (B, depth, 4 D), what the context adds to the gates, or None.
        source: (B, S, D), the encoded source, or None.
        allowed: (B, 1, S), Boolean, the source steps that a row attends to; None for all.
        weights: the transposed weights of the horizontal stack.
        grad: whether ``weights`` were computed with grad.
    """

    position: int
    version: list[int]
    channels: Tensor
    out: Tensor
    row: tuple[Tensor, ...]
    left: tuple[Tensor, ...]
    terms: tuple[Tensor, ...]
    above: tuple[Tensor, ...]
    context: Tensor | None
    source: Tensor | None
    allowed: Tensor | None
    weights: list[tuple[Tensor, ...]]
    grad: bool


class PixelCNN(ReadsSource):
    """Gated convolutions over the pixels of an image, without a blind spot: each site reads the sites before it.

    An image has C channels, H rows and W columns, with one site per channel and pixel, T = C H W in all. The sites are
    visited pixel by pixel in raster order, where the channel changes fastest; :meth:`order_of` returns this order, which
    :class:`~pyro_genexact.Autoregressive` uses for events (C, H, W). The first sites of an event are therefore its
    upper rows. Let z_ij be the encoded channels of the pixel at row i and column j, k the kernel, n = k // 2, and K the
    first kernel. The vertical stack v reads the rows above, and the horizontal stack h also the pixels to the left:

        v_ij = sum_{0 < a <= K // 2, |b| <= K // 2} A_ab z_{i-a, j+b} + r_i + s_j,
        h_ij = sum_{0 < b <= K // 2} B_b z_{i, j-b} + B_0,
        v_ij <- v_ij + M gate(sum_{0 <= a <= n, |b| <= n} V_ab v_{i-a, j+b} + c),
        h_ij <- h_ij + N gate(sum_{0 <= b <= n} U_b h_{i, j-b} + D v_ij + d),     gate([a, b]) = a sigmoid(b).

    Lines 3 and 4 are one layer. The gates are gated linear units, as in PixelCNN++; the first PixelCNNs have
    tanh(a) sigmoid(b). The convolutions read zeros outside the image, and z_ij contains a 1 inside it. The terms r_i and
    s_j are learned for each row and column. A network of one hidden layer per channel computes phi from norm(h_ij)
    and the channels of the same pixel before it. A vector context adds linear terms to c and d in each layer. With
    ``context=Source(C)``, norm(h_ij) attends to the steps of the source after the last layer, as in
    :class:`~pyro_genexact.conditioners.Recurrent`.

    Site t reads the sites to the left that are at most K // 2 + depth * n pixels away, and those in as many rows above,
    as far to both sides.

    Cost: for L layers of width D, ``forward`` takes O(B H W L k^2 D^2) operations, in parallel over the sites.
    ``extend`` evaluates the readout for each new channel, one column of the horizontal stack for each new pixel, and one
    row of the vertical stack for each new row; whole rows of a chunk are evaluated in parallel. A state holds the last n
    pixels and rows of each layer: about L W D (n + 2) numbers per row of the batch. Buffers are never written in place.
    ``start`` reads the weights of the horizontal stack for all later steps. Hooks on submodules may not run.

    Args:
        image_shape: (C, H, W).
        num_params: P, the number of parameters per site.
        site: kind of a site: ``()`` for a real number and ``(k,)`` for a real vector, or an integer V for categories
            0 ... V-1, which are embedded.
        width: D, the width of both stacks.
        depth: L, the number of layers.
        kernel: k, the size of the kernels of the layers, an odd number.
        first_kernel: K, the size of the kernels that read the pixels, an odd number of at least 3.
        dropout: dropout rate in training mode, after the gates.
        context: C, the number of features of a context vector, such as a one-hot class; or ``Source(C)`` for a source
            sequence, passed as a :class:`~pyro_genexact.PaddedSequence` if its rows have different lengths.

    Raises:
        TypeError: if ``dropout`` is not a number.
        ValueError: if ``image_shape`` is not three positive integers, a kernel is even, a size is not a positive integer,
            ``dropout`` is outside [0, 1), or ``context`` is of another kind. In calls, for another number of sites,
            categories out of range, a context of another width, and a number of rows other than the state's.

    References: van den Oord et al., "Conditional image generation with PixelCNN decoders", NeurIPS 2016 (stacks);
    Dauphin et al., "Language modeling with gated convolutional networks", ICML 2017 (gates); Salimans et al.,
    "PixelCNN++", ICLR 2017; Ramachandran et al., "Fast generation for convolutional autoregressive models", 2017
    (caches).

    Example:
        >>> import torch
        >>> from pyro_genexact import Autoregressive, heads
        >>> head = heads.Bernoulli()
        >>> net = PixelCNN((1, 28, 28), head.num_params, width=16, depth=4)
        >>> model = Autoregressive(net, head, (28, 28))
        >>> model().log_prob(torch.ones(5, 28, 28)).shape
        torch.Size([5])
        >>> lower = model().conditional_on_prefix(torch.ones(5, 14 * 28))
        >>> lower.sample().shape
        torch.Size([5, 392])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_params: int,
        *,
        site: Site = (),
        width: int = 64,
        depth: int = 8,
        kernel: int = 3,
        first_kernel: int = 7,
        dropout: float = 0.0,
        context: int | Source = 0,
    ) -> None:
        super().__init__()
        _check_options(image_shape, kernel, first_kernel)
        check_sizes(1, num_params=num_params, width=width, depth=depth)
        check_rate(dropout)
        kind = kind_of(context, Source)
        self.image_shape, self.num_sites = tuple(image_shape), prod(image_shape)
        self.num_params, self.site, self.context, self.dropout = num_params, site, context, float(dropout)
        self.width, self.depth, self.kernel, self.first_kernel = width, depth, kernel, first_kernel
        channels, height, columns = self.image_shape
        self.encoder = SiteEncoder(site, min(width, 16))
        encoded, reach = self.encoder.features, first_kernel // 2
        features = channels * encoded + 1  # the last is 1 inside the image, and 0 outside
        self.above = nn.Conv2d(features, width, (reach, first_kernel), padding=(0, reach))
        self.left = nn.Conv2d(features, width, (1, reach))
        self.of_row = nn.Parameter(0.3 * torch.randn(height, 1, width))
        self.of_column = nn.Parameter(0.3 * torch.randn(columns, width))
        self.layers: Any = nn.ModuleList(PixelLayer(width, kernel, depth, self.dropout) for _ in range(depth))
        self.read_context = nn.Linear(kind.joined, depth * 4 * width, bias=False) if kind.joined else None
        self.norm = nn.LayerNorm(width)
        self.add_source(width)
        self.hidden = nn.ModuleList(nn.Linear(width + c * encoded, width) for c in range(channels))
        self.last = nn.ModuleList(small_linear(width, num_params) for _ in range(channels))

    def extra_repr(self) -> str:
        return (
            f"{self.image_shape}, {self.num_params}, site={self.site}, width={self.width}, depth={self.depth}, "
            f"kernel={self.kernel}, first_kernel={self.first_kernel}, dropout={self.dropout}, context={self.context}"
        )

    def order_of(self, dims: Sequence[int]) -> Tensor | None:
        """Returns the order (T,) in which it visits the sites of an event (C, H, W), or of the last rows (C, h, W) of one.

        It is None, raster order, if C = 1, where events may also have shape (H, W), and for events (T,), whose sites are
        in the order of the network.

        Raises:
            ValueError: for other dims.
        """
        dims, shape = tuple(dims), self.image_shape
        if len(dims) == 1:
            return None
        rows = (1, *dims) if len(dims) == 2 and shape[0] == 1 else dims
        if (rows[:1], rows[2:]) != (shape[:1], shape[2:]) or rows[1] > shape[1]:
            raise ValueError(f"Expected sites of shape {shape} (image_shape of PixelCNN); got {dims}.")
        if shape[0] == 1:
            return None
        with torch.inference_mode(False):  # autograd cannot save indices from inference mode
            return torch.arange(prod(rows), device=self.of_row.device).view(shape[0], -1).t().flatten()

    def forward(self, y: Tensor, context: Tensor | PaddedSequence | None = None) -> Tensor:
        """Maps y (B, T, *site_shape) and the context to phi (B, T, P), in parallel over the sites."""
        check_sites(self, y)
        state, (channels, height, columns) = self._before(context, y.shape[0]), self.image_shape
        pixels = pad(self.encoder(y[:, :-1], self.of_row), (0, 0, 0, 1)).unflatten(1, (-1, channels))
        image = _inside(pixels).unflatten(1, (height, columns))
        terms, _ = self._rows(pad(image[:, :-1], (0, 0, 0, 0, 1, 0)), state, 0)
        left = _left_of(image)
        out, _ = self._columns(left, self._edge(left), terms, state.weights)
        out = self.attending(out.flatten(1, 2), state)
        return self._phi(out, pixels, 0, y.shape[1])

    def start(self, context: Tensor | PaddedSequence | None, batch_size: int) -> tuple[Tensor, PixelCNNState]:
        """Returns the parameters (B, P) of the first site and the state before any site."""
        state = self._before(context, batch_size)
        if not state.grad:
            state = state._replace(weights=[tuple(w.contiguous() for w in layer) for layer in state.weights])
        out, state = self._begin(state.row[0], state.row[0][:, :0], state, 0)
        out = self.attending(out, state)
        return self._phi(out, state.channels.unsqueeze(1), 0, 1).squeeze(1), state._replace(out=out)

    def extend(self, y: Tensor, state: PixelCNNState) -> tuple[Tensor, PixelCNNState]:
        """Reads y (B, S, *site_shape); returns the parameters (B, S, P) of the sites that follow."""
        check_chunk(self, y, state.position, len(state.out))
        state = resumed(state)
        if torch.is_grad_enabled() and not state.grad:
            state = state._replace(weights=self._weights(), grad=True)
        channels, first, sites = self.image_shape[0], state.position, y.shape[1]
        encoded = torch.cat([state.channels, self.encoder(y, self.of_row)], 1)
        full = encoded.shape[1] // channels
        state = self.advance(state, sites)._replace(channels=encoded[:, full * channels :])
        pixels = pad(encoded, (0, 0, 0, channels - encoded.shape[1] % channels)).unflatten(1, (-1, channels))
        outs = state.out
        if full:
            out, state = self._read(_inside(pixels[:, :full]), state, first // channels)
            out = self.attending(out, state)
            outs = torch.cat([outs, out], 1)
            state = state._replace(out=out[:, -1:])
        if full > self.image_shape[2]:  # views would keep all rows of the chunk
            state = self.reorder(state, torch.arange(y.shape[0], device=y.device))
        begin = first % channels + 1
        return self._phi(outs, pixels, begin, begin + sites), state

    def reorder(self, state: PixelCNNState, index: Tensor) -> PixelCNNState:
        """Returns a copy of the batch rows ``index`` (B',) of a state."""
        self.advance(state, 0)
        taken = PixelCNNState(*(take_rows(field, index) for field in state._replace(weights=[])))
        return taken._replace(version=list(state.version), weights=state.weights)

    def _before(self, context: Any, rows: int) -> PixelCNNState:
        """Returns the state before row 0, with a row of zeros above it."""
        check_context(self, context)
        like, (_, _, columns), grad = self.of_row, self.image_shape, torch.is_grad_enabled()
        features, reach, before = self.above.in_channels, self.first_kernel // 2, self.kernel // 2
        below = like.new_zeros(rows, before, columns, self.width)
        above = (like.new_zeros(rows, reach - 1, columns, features), *[below] * self.depth)
        row, channels = like.new_zeros(rows, columns, features), like.new_zeros(rows, 0, self.encoder.features)
        weights = self._weights()
        state = PixelCNNState(
            0, self.new_version(), channels, row, (row,), (), (), above, None, None, None, weights, grad
        )
        if kind_of(self.context).attended:
            source, allowed = self.encoded_source(context, rows)
            return state._replace(source=source, allowed=allowed)
        if self.read_context is None:
            return state
        check_rows("context", context, rows, "the batch")
        return state._replace(context=self.read_context(context).unflatten(1, (self.depth, 4 * self.width)))

    def _weights(self) -> list[Tensors]:
        return [(matrix(self.left), self.left.bias), *(layer.weights() for layer in self.layers)]

    def _read(self, pixels: Tensor, state: PixelCNNState, first: int) -> tuple[Tensor, PixelCNNState]:
        """Reads the pixels (B, n, F) from index ``first`` on; returns the outputs (B, n, D) at the pixels after each."""
        i, j = divmod(first, self.image_shape[2])
        rest = min(pixels.shape[1], self.image_shape[2] - 1 - j)  # the number of outputs in row i
        outs = []
        if rest:
            terms = tuple(part[:, :, j + 1 : j + 1 + rest] for part in state.terms)
            out, left = self._columns(pixels[:, None, :rest], state.left, terms, state.weights)
            outs, state = [out.squeeze(1)], state._replace(left=left)
        state = state._replace(row=(*state.row, pixels[:, : rest + 1]))
        if rest < pixels.shape[1]:
            out, state = self._begin(torch.cat(state.row, 1), pixels[:, rest + 1 :], state, i + 1)
            outs.append(out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1), state

    def _begin(self, above: Tensor, pixels: Tensor, state: PixelCNNState, first: int) -> tuple[Tensor, PixelCNNState]:
        """Begins row ``first`` below the row ``above`` (B, W, F), and reads pixels (B, n, F) of it and later rows.

        Returns the outputs (B, n + 1, D) at the first pixel of the row and at the pixel after each one read.
        """
        columns = self.image_shape[2]
        full, cut = divmod(pixels.shape[1], columns)
        image, last = pixels[:, : full * columns].unflatten(1, (full, columns)), pixels[:, None, full * columns :]
        terms, seen = self._rows(torch.cat([above.unsqueeze(1), image], 1), state, first)
        outs = []
        if full:  # all complete rows at once, because the vertical stack has read what is above them
            inputs = _left_of(image)
            out, _ = self._columns(inputs, self._edge(inputs), tuple(part[:, :-1] for part in terms), state.weights)
            outs.append(out.flatten(1, 2))
        terms, inputs = tuple(part[:, -1:] for part in terms), pad(last, (0, 0, 1, 0))
        parts = tuple(part[:, :, : cut + 1] for part in terms)
        out, left = self._columns(inputs, self._edge(inputs), parts, state.weights)
        state = state._replace(row=(last.squeeze(1),) if cut else (), left=left, terms=terms, above=seen)
        return torch.cat([*outs, out.squeeze(1)], 1), state

    def _rows(self, x: Tensor, state: PixelCNNState, first: int) -> tuple[Tensors, Tensors]:
        """Runs the vertical stack on R rows from ``first`` on, given the encoded rows x (B, R, W, F) one above each.

        Returns for each layer the terms (B, R, W, 2 D) of the gates, and the last rows that it read.
        """
        rows = x.shape[1]
        x = torch.cat([state.above[0], x], 1)
        terms: list[Tensor] = []
        v, seen = convolved(x, self.above), [x[:, rows:]]
        v = v + (self.of_row[first : first + rows] + self.of_column)
        for k, layer in enumerate(self.layers):
            x = torch.cat([state.above[k + 1], v], 1)
            v, term = layer.vertical(x, v, None if state.context is None else state.context[:, k])
            terms.append(term)
            seen.append(x[:, rows:])
        return tuple(terms), tuple(seen)

    def _columns(self, x: Tensor, left: Tensors, terms: Tensors, weights: list[Tensors]) -> tuple[Tensor, Tensors]:
        """Runs the horizontal stack on m pixels of R rows, given the pixels x (B, R, m, F) one to the left of each.

        Returns the outputs (B, R, m, D), and the last pixels that each layer read.
        """
        sites = x.shape[2]
        x = torch.cat([left[0], x], 2)
        if x.shape[1] == sites == 1:
            h = torch.addmm(weights[0][1], x.flatten(1), weights[0][0])[:, None, None]
        else:
            h = convolved(x, self.left)
        seen = [x[:, :, sites:]]
        for k, layer in enumerate(self.layers):
            x = torch.cat([left[k + 1], h], 2)
            h = layer.horizontal(x, h, terms[k], weights[k + 1])
            seen.append(x[:, :, sites:])
        return self.norm(h), tuple(seen)

    def _edge(self, x: Tensor) -> Tensors:
        """Returns what the horizontal stack has read before the first column: zeros, for R rows x (B, R, m, F)."""
        first = x.new_zeros(*x.shape[:2], self.first_kernel // 2 - 1, x.shape[3])
        return first, *[x.new_zeros(*x.shape[:2], self.kernel // 2, self.width)] * self.depth

    def _phi(self, outs: Tensor, pixels: Tensor, begin: int, end: int) -> Tensor:
        """Returns phi (B, S, P) of sites begin ... end - 1, from the outputs (B, N, D) and channels (B, N, C, E) of N pixels."""
        channels = self.image_shape[0]
        if end - begin == 1:
            p, c = divmod(begin, channels)
            return self._channel(c, outs[:, p : p + 1], pixels[:, p : p + 1])
        phi = torch.stack([self._channel(c, outs, pixels) for c in range(channels)], 2)
        return phi.flatten(1, 2)[:, begin:end]

    def _channel(self, c: int, out: Tensor, pixels: Tensor) -> Tensor:
        """Returns the parameters (B, n, P) of channel c, which reads the output and the channels before it."""
        inputs = torch.cat([out, pixels[:, :, :c].flatten(2)], -1) if c else out
        return self.last[c](silu(self.hidden[c](inputs)))


def _check_options(image_shape: Any, kernel: Any, first_kernel: Any) -> None:
    check_widths(1, image_shape=image_shape)
    if len(image_shape) != 3:
        raise ValueError(f"Expected image_shape of three sizes (channels, height, width); got {image_shape!r}.")
    check_sizes(1, kernel=kernel)
    check_sizes(3, first_kernel=first_kernel)
    for name, size in (("kernel", kernel), ("first_kernel", first_kernel)):
        if size % 2 == 0:
            raise ValueError(f"Expected {name} to be odd; got {size}.")


def _inside(pixels: Tensor) -> Tensor:
    """Returns encoded pixels (B, n, C, E) as features (B, n, C * E + 1), of which the last is 1."""
    return pad(pixels.flatten(2), (0, 1), value=1.0)


def _left_of(image: Tensor) -> Tensor:
    """Returns the pixels to the left of those of rows (B, R, W, F), zero at the first column."""
    return pad(image[:, :, :-1], (0, 0, 1, 0))
