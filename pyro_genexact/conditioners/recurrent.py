"""Recurrent: an Elman network, GRU or LSTM over sites, in fused calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base import Site
from ..contexts import Covariates, Source
from ..core.checks import check_sizes
from ..core.functional import transformed
from .encoding import dropped
from .steps import Memory, StepNetwork

# The functions behind torch's modules: they take weights as arguments, whereas the modules store a list of them.
_CELLS: dict[str, tuple[Any, Any]] = {
    "elman": (nn.RNN, torch.rnn_tanh),
    "gru": (nn.GRU, torch.gru),
    "lstm": (nn.LSTM, torch.lstm),
}


class Recurrent(StepNetwork):
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

    rows_dim = 1

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
        check_sizes(1, hidden=hidden, layers=layers)
        if cell not in _CELLS:
            raise ValueError(f"Expected cell in {[*_CELLS]}; got {cell!r}.")
        super().__init__(site, num_params, hidden if width is None else width, context, dropout)
        self.hidden, self.cell, self.depth = hidden, cell, layers
        module, _ = _CELLS[cell]
        # the module initialises the weights and, on CUDA, stores them contiguously
        self.rnn = module(self.inputs, hidden, layers, batch_first=True)
        self.add_readout(hidden)

    def extra_repr(self) -> str:
        return (
            f"{self.site}, {self.num_params}, hidden={self.hidden}, cell={self.cell!r}, layers={self.depth}, "
            f"dropout={self.dropout}, context={self.context}"
        )

    def initial(self, rows: int) -> Memory:
        zeros = self.begin.new_zeros(self.depth, rows, self.hidden)
        return (zeros,) * (2 if self.cell == "lstm" else 1)

    def prepared(self) -> list[Tensor]:
        return [weight for layer in self.rnn.all_weights for weight in layer]

    def steps(self, inputs: Tensor, memory: Memory, weights: list[Tensor], first: int) -> tuple[Tensor, Memory]:
        _, call = _CELLS[self.cell]
        if transformed():  # the cell adds in place to a function of the state, which needs the batch dims of vmap
            memory = tuple(h + inputs.new_zeros(h.shape) for h in memory)
        hidden = memory if self.cell == "lstm" else memory[0]
        rate = self.dropout if self.training else 0.0
        # cudnn has gradients in training mode only; the mode affects nothing else but the dropout between layers
        training = self.training or torch.is_grad_enabled()
        out, *hidden = call(inputs, hidden, weights, True, self.depth, rate, training, False, True)
        return dropped(out, self), tuple(hidden)
