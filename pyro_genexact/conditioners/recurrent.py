"""Recurrent: an Elman network, GRU or LSTM over the sites, in fused calls."""

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

# The functions behind torch's modules: these take the weights of the call, where the modules keep a list of their own.
_CELLS: dict[str, tuple[Any, Any]] = {
    "elman": (nn.RNN, torch.rnn_tanh),
    "gru": (nn.GRU, torch.gru),
    "lstm": (nn.LSTM, torch.lstm),
}


class RecurrentState(NamedTuple):
    """A :class:`Recurrent` network after some site.

    Attributes:
        position: sites read so far.
        version: sites read by any successor of this state.
        hidden: h, and the cell of an LSTM, each (layers, B, H).
        context: (B, C), (B, T, C) or None.
        weights: of all layers, as they were at the start.
        source: (B, S, H), the source as it is attended to, or None.
        allowed: (B, 1, S), which of its steps a row attends to, or None for all.
    """

    position: int
    version: list[int]
    hidden: tuple[Tensor, ...]
    context: Tensor | None
    weights: list[Tensor]
    source: Tensor | None = None
    allowed: Tensor | None = None


class Recurrent(Conditioner):
    r"""A recurrent network over sites: any length, cost linear in it, one fused call of torch's kernels a chunk.

        h_t = cell([y_{t-1}, x], h_{t-1}),      phi_t = W h_t + b

    The first step reads a learned start vector in place of y_0, so that its parameters too are a non-linear function
    of the context x. With ``context=Covariates(C)`` step t reads the covariates x_t in place of x. With ``context=Source(C)``
    step t attends to all steps x_s of the source, and phi_t is read from

        h'_t = tanh(V [h_t, sum_s a_ts U x_s] + c),      a_t = softmax_s(h_t . U x_s / sqrt(H)),

    whose sum is zero for a source of length 0.

    Cost: ``forward`` is one fused call over T steps; extending by S sites one over S. A state holds h alone (and the
    context), so that sampling is linear in T and a step costs the same at every site. As with torch's own modules,
    ``torch.func.vmap`` has no rule for the fused calls, and a double backward on CUDA needs
    ``torch.backends.cudnn.flags(enabled=False)``.

    Args:
        site: what one site looks like: ``()`` a real number, ``(k,)`` a real vector, both read linearly by the first
            layer, or an integer V, one of the categories 0 ... V-1, embedded.
        num_params: P, parameters a site.
        hidden: H, the width of every layer.
        cell: ``"gru"``, ``"lstm"`` or ``"elman"`` (tanh).
        layers: how many recurrent layers.
        dropout: in training mode, the rate of dropout after every layer, the last one too.
        context: C, features of a context vector joined to every step's input; ``Covariates(C)`` for covariates: the
            parameters of site t read those of the sites up to t; ``Source(C)`` for a sequence that all sites attend to,
            :class:`~pyro_genexact.PaddedSequence` where rows have lengths.
        width: of the embedding of categories; by default H.

    Raises:
        ValueError: for sizes that are no positive integers, another cell, a dropout outside [0, 1); in calls for
            categories that there are not, a context of another width, other rows than those of the state, and more sites
            than covariates.

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
        # its weights, in its initial values and, on CUDA, in one piece of memory
        self.rnn = module(self.encoder.features + kind.joined, hidden, layers, batch_first=True)
        if kind.attended:  # without a bias, so that zeros add zero
            self.read_source = nn.Linear(kind.attended, hidden, bias=False)
            self.join = nn.Linear(2 * hidden, hidden)
        self.last = small_linear(hidden, num_params)

    def extra_repr(self) -> str:
        return (
            f"{self.site}, {self.num_params}, hidden={self.hidden}, cell={self.cell!r}, layers={self.depth}, "
            f"dropout={self.dropout}, context={self.context}"
        )

    def forward(self, y: Tensor, context: Tensor | PaddedSequence | None = None) -> Tensor:
        """(B, T, *site_shape), and (B, C), (B, at least T, C) or a source, to (B, T, P) in one fused call."""
        check_sites(self, y)
        state = self._before(context, len(y))
        begin = self.begin.expand(len(y), 1, -1)
        inputs = torch.cat([begin, self.encoder(y[:, :-1], begin)], 1)
        return self._run(joined(inputs, state.context, 0), state)[0]

    def start(self, context: Tensor | PaddedSequence | None, batch_size: int) -> tuple[Tensor, RecurrentState]:
        """The first site's parameters (B, P), and the state after the start vector."""
        state = self._before(context, batch_size)
        phi, state = self._run(joined(self.begin.expand(batch_size, 1, -1), state.context, 0), state)
        return phi.squeeze(1), state

    def extend(self, y: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Reads y (B, S, *site_shape) in one fused call: the parameters (B, S, P) of the sites after them."""
        check_chunk(self, y, state.position, state.hidden[0].shape[1])
        state = resumed(state)
        inputs = joined(self.encoder(y, self.begin), state.context, state.position + 1)
        return self._run(inputs, self.advance(state, y.shape[1]))

    def reorder(self, state: RecurrentState, index: Tensor) -> RecurrentState:
        """A copy of the batch rows ``index`` (B',) of a state, to branch from it."""
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
        """phi (B, S, P) of S steps, which read the inputs (B, S, features + C)."""
        _, call = _CELLS[self.cell]
        before = state.hidden
        if transformed():  # a cell adds in place to what it makes of the state, which needs the inputs' dims of vmap
            before = tuple(h + inputs.new_zeros(h.shape) for h in before)
        hidden = before if self.cell == "lstm" else before[0]
        rate = self.dropout if self.training else 0.0
        # cudnn differentiates in training mode only, whose sole other effect is the dropout between layers
        training = self.training or torch.is_grad_enabled()
        out, *hidden = call(inputs, hidden, state.weights, True, self.depth, rate, training, False, True)
        if rate:
            out = drop(out, rate)
        if state.source is not None:
            found = attention(out, state.source, state.source, state.allowed)
            out = torch.tanh(self.join(torch.cat([out, found], -1)))
        return self.last(out), state._replace(hidden=tuple(hidden))
