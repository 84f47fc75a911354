"""Recurrent: an Elman network, GRU or LSTM over sites, in fused calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention as attention

from ..base import Conditioner, Site
from ..contexts import Covariates, PaddedSequence, Source, check_context, kind_of
from ..core.checks import check_sizes
from ..core.functional import transformed
from ..core.rows import take_rows
from .checks import check_chunk, check_rate, check_sites
from .encoding import SiteEncoder, joined, resumed, small_linear, source_steps

# The functions behind torch's modules: they take weights as arguments, whereas the modules store a list of them.
_CELLS: dict[str, tuple[Any, Any]] = {
    "elman": (nn.RNN, torch.rnn_tanh),
    "gru": (nn.GRU, torch.gru),
    "lstm": (nn.LSTM, torch.lstm),
}


class RecurrentState(NamedTuple):
    """State of a :class:`Recurrent` network.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        hidden: h, and the cell state of an LSTM, each (layers, B, H).
        context: (B, C), (B, T, C) or None.
        weights: the weights of all layers at the start.
        source: (B, S, H), the encoded source, or None.
        allowed: (B, 1, S), Boolean, the source steps that a row attends to; None for all.
    """

    position: int
    version: list[int]
    hidden: tuple[Tensor, ...]
    context: Tensor | None
    weights: list[Tensor]
    source: Tensor | None = None
    allowed: Tensor | None = None


class Recurrent(Conditioner):
    """Recurrent network over sites, of any length, with one fused kernel call per chunk.

        h_t = cell([y_{t-1}, x], h_{t-1}),      phi_t = W h_t + b

    A learned start vector replaces y_0, so that the parameters of the first site are also a non-linear function of the
    context x. With ``context=Covariates(C)``, step t reads the covariates x_t in place of x. With
    ``context=Source(C)``, step t attends to all steps x_s of the source, and phi_t is computed from

        h'_t = tanh(V [h_t, sum_s a_ts U x_s] + c),      a_t = softmax_s(h_t . U x_s / sqrt(H)),

    where the sum is zero for a source of length 0.

    Cost: ``forward`` is one fused call over T steps, and ``extend`` one over S steps. The state holds only h and the
    context, so sampling is linear in T and each step has the same cost. As with torch's modules, ``torch.func.vmap``
    does not support the fused calls, and double backward on CUDA requires
    ``torch.backends.cudnn.flags(enabled=False)``.

    Args:
        site: kind of a site: ``()`` for a real number and ``(k,)`` for a real vector, which the first layer reads
            linearly, or an integer V for categories 0 ... V-1, which are embedded.
        num_params: P, the number of parameters per site.
        hidden: H, the width of each layer.
        cell: ``"gru"``, ``"lstm"`` or ``"elman"`` (tanh).
        layers: number of recurrent layers.
        dropout: dropout rate in training mode, after each layer including the last.
        context: C, the number of features of a context vector that every step reads; ``Covariates(C)`` for covariates,
            where site t reads those of the sites up to t; or ``Source(C)`` for a source sequence that all sites attend
            to, passed as a :class:`~pyro_genexact.PaddedSequence` if its rows have different lengths.
        width: width of the embedding of categories; by default H.

    Raises:
        TypeError: if ``dropout`` is not a number.
        ValueError: if a size is not a positive integer, ``cell`` is unknown, or ``dropout`` is outside [0, 1). In
            calls, for categories out of range, a context of another width, a number of rows other than the state's, and
            more sites than covariates.

    References: Elman, "Finding structure in time", 1990; Hochreiter, Schmidhuber, "Long short-term memory", 1997;
    Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014; Bahdanau, Cho, Bengio, "Neural
    machine translation by jointly learning to align and translate", ICLR 2015, and Luong, Pham, Manning, "Effective
    approaches to attention-based neural machine translation", EMNLP 2015 (attention to a source).

    Example:
        >>> import torch
        >>> from pyro_genexact import Covariates
        >>> net = Recurrent(5, 3, hidden=16, context=Covariates(2))
        >>> net(torch.zeros(7, 9, dtype=torch.long), torch.zeros(7, 9, 2)).shape
        torch.Size([7, 9, 3])
        >>> phi, state = net.start(torch.zeros(7, 9, 2), batch_size=7)
        >>> phi, state = net.extend(torch.zeros(7, 1, dtype=torch.long), state)
        >>> phi.shape
        torch.Size([7, 1, 3])
    """

    def __init__(
        self,
        site: Site,
        num_params: int,
        *,
        hidden: int = 128,
        cell: str = "gru",
        layers: int = 1,
        dropout: float = 0.0,
        context: int | Covariates | Source = 0,
        width: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, num_params=num_params, hidden=hidden, layers=layers)
        if cell not in _CELLS:
            raise ValueError(f"Expected cell in {[*_CELLS]}; got {cell!r}.")
        check_rate(dropout)
        kind = kind_of(context)
        self.site, self.num_params, self.context = site, num_params, context
        self.hidden, self.cell, self.depth, self.dropout = hidden, cell, layers, float(dropout)
        self.encoder = SiteEncoder(site, hidden if width is None else width)
        self.begin = nn.Parameter(torch.randn(self.encoder.features))
        module, _ = _CELLS[cell]
        # the module initialises the weights and, on CUDA, stores them contiguously
        self.rnn = module(self.encoder.features + kind.joined, hidden, layers, batch_first=True)
        if kind.attended:  # no bias, so that a source of zeros contributes zero
            self.read_source = nn.Linear(kind.attended, hidden, bias=False)
            self.join = nn.Linear(2 * hidden, hidden)
        self.last = small_linear(hidden, num_params)

    def extra_repr(self) -> str:
        return (
            f"{self.site}, {self.num_params}, hidden={self.hidden}, cell={self.cell!r}, layers={self.depth}, "
            f"dropout={self.dropout}, context={self.context}"
        )

    def forward(self, y: Tensor, context: Tensor | PaddedSequence | None = None) -> Tensor:
        """Maps y (B, T, *site_shape) and the context to phi (B, T, P) in one fused call.

        The context has shape (B, C), or (B, T or more, C) for covariates, or (B, S, C) for a source.
        """
        check_sites(self, y)
        state = self._before(context, len(y))
        begin = self.begin.expand(len(y), 1, -1)
        inputs = torch.cat([begin, self.encoder(y[:, :-1], begin)], 1)
        return self._run(joined(inputs, state.context, 0), state)[0]

    def start(self, context: Tensor | PaddedSequence | None, batch_size: int) -> tuple[Tensor, RecurrentState]:
        """Returns the parameters (B, P) of the first site and the state after the start vector."""
        state = self._before(context, batch_size)
        phi, state = self._run(joined(self.begin.expand(batch_size, 1, -1), state.context, 0), state)
        return phi.squeeze(1), state

    def extend(self, y: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Reads y (B, S, *site_shape) in one fused call; returns the parameters (B, S, P) of the sites that follow."""
        check_chunk(self, y, state.position, state.hidden[0].shape[1])
        state = resumed(state)
        inputs = joined(self.encoder(y, self.begin), state.context, state.position + 1)
        return self._run(inputs, self.advance(state, y.shape[1]))

    def reorder(self, state: RecurrentState, index: Tensor) -> RecurrentState:
        """Returns a copy of the batch rows ``index`` (B',) of a state."""
        self.advance(state, 0)
        hidden = tuple(h.index_select(1, index) for h in state.hidden)
        parts = {name: take_rows(getattr(state, name), index) for name in ("context", "source", "allowed")}
        return state._replace(version=list(state.version), hidden=hidden, **parts)

    def _before(self, context: Any, batch_size: int) -> RecurrentState:
        check_context(self, context)
        weights: list[Tensor] = [weight for layer in self.rnn.all_weights for weight in layer]
        zeros = weights[0].new_zeros(self.depth, batch_size, self.hidden)
        hidden = (zeros,) * (2 if self.cell == "lstm" else 1)
        if not kind_of(self.context).attended:
            return RecurrentState(0, self.new_version(), hidden, context, weights)
        steps, allowed = source_steps(context, batch_size)
        return RecurrentState(0, self.new_version(), hidden, None, weights, self.read_source(steps), allowed)

    def _run(self, inputs: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Returns phi (B, S, P) of S steps with inputs (B, S, features + C), and the state after them."""
        _, call = _CELLS[self.cell]
        before = state.hidden
        if transformed():  # the cell adds in place to a function of the state, which needs the batch dims of vmap
            before = tuple(h + inputs.new_zeros(h.shape) for h in before)
        hidden = before if self.cell == "lstm" else before[0]
        rate = self.dropout if self.training else 0.0
        # cudnn has gradients in training mode only; the mode affects nothing else but the dropout between layers
        training = self.training or torch.is_grad_enabled()
        out, *hidden = call(inputs, hidden, state.weights, True, self.depth, rate, training, False, True)
        if rate:
            out = drop(out, rate)
        if state.source is not None:
            found = attention(out, state.source, state.source, state.allowed)
            out = torch.tanh(self.join(torch.cat([out, found], -1)))
        return self.last(out), state._replace(hidden=tuple(hidden))
