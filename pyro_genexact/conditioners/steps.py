"""StepNetwork: the base class of conditioners whose memory of earlier sites has a fixed size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention

from ..base import Conditioner, Site
from ..contexts import Covariates, PaddedSequence, Source, check_context, kind_of
from ..core.checks import check_sizes
from ..core.rows import take_rows
from .checks import check_chunk, check_rate, check_rows, check_sites
from .encoding import SiteEncoder, joined, resumed, small_linear, source_steps

Memory = tuple[Tensor, ...]


class StepState(NamedTuple):
    """State of a :class:`Recurrent`, :class:`CausalConv` or :class:`StateSpace` network.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        memory: what the layers keep of earlier steps, of fixed size.
        context: (B, C), (B, T, C) or None.
        weights: what the layers computed from their weights at the start.
        grad: whether ``weights`` were computed with grad.
        source: (B, S, H), the encoded source, or None.
        allowed: (B, 1, S), Boolean, the source steps that a row attends to; None for all.
    """

    position: int
    version: list[int]
    memory: Memory
    context: Tensor | None
    weights: list[Any]
    grad: bool
    source: Tensor | None = None
    allowed: Tensor | None = None


class ReadsSource(Conditioner):
    """Base class of networks whose outputs h_t, of width H, attend to the steps x_s of a source, if there is one.

        h'_t = tanh(V [h_t, sum_s a_ts U x_s] + c),      a_t = softmax_s(h_t . U x_s / sqrt(H)).

    A subclass calls :meth:`add_source` when it is constructed.
    """

    def add_source(self, outputs: int) -> None:
        """Adds the attention of outputs of this width to a source, if there is one. Constructors call it once."""
        if attended := kind_of(self.context).attended:  # no bias, so that a source of zeros contributes zero
            self.read_source = nn.Linear(attended, outputs, bias=False)
            self.join = nn.Linear(2 * outputs, outputs)

    def encoded_source(self, context: Tensor | PaddedSequence, rows: int) -> tuple[Tensor, Tensor | None]:
        """Returns the encoded source (B, S, H), and the steps (B, 1, S) that a row attends to or None for all."""
        steps, allowed = source_steps(context, rows)
        return self.read_source(steps), allowed

    def attending(self, out: Tensor, state: Any) -> Tensor:
        """Returns the outputs (B, S, H) after they attended to the source of a state, if there is one."""
        if state.source is None:
            return out
        found = attention(out, state.source, state.source, state.allowed)
        return torch.tanh(self.join(torch.cat([out, found], -1)))


class StepNetwork(ReadsSource):
    """Base class of networks that read one input per site, and remember the steps before in a state of fixed size.

    The input of step t is y_{t-1}, encoded, together with the context or the covariates of site t; a learned start
    vector replaces y_0. The layers map these inputs to outputs h_t, and phi_t = W h_t + b. With a source, phi_t is
    computed from the outputs h'_t of :class:`ReadsSource`.

    A subclass calls :meth:`add_readout` when it is constructed. It defines :meth:`initial` and :meth:`steps`, and
    :meth:`prepared` if all steps share a computation.

    Args:
        site: kind of a site.
        num_params: P, the number of parameters per site.
        width: width of the embedding of categories.
        context: C, ``Covariates(C)`` or ``Source(C)``.
        dropout: dropout rate in training mode.

    Raises:
        TypeError: if ``dropout`` is not a number.
        ValueError: if a size is not a positive integer, or ``dropout`` is outside [0, 1).
    """

    rows_dim = 0  # the dim of a memory that indexes the batch

    def __init__(
        self,
        site: Site,
        num_params: int,
        width: int,
        context: int | Covariates | Source,
        dropout: float,
    ) -> None:
        super().__init__()
        check_sizes(1, num_params=num_params, width=width)
        check_rate(dropout)
        kind = kind_of(context)
        self.site, self.num_params, self.context, self.dropout = site, num_params, context, float(dropout)
        self.encoder = SiteEncoder(site, width)
        self.begin = nn.Parameter(torch.randn(self.encoder.features))
        self.inputs = self.encoder.features + kind.joined

    def add_readout(self, outputs: int) -> None:
        """Adds the attention to a source, if there is one, and the output layer. Constructors call it once."""
        self.add_source(outputs)
        self.last = small_linear(outputs, self.num_params)

    def initial(self, rows: int) -> Memory:
        """Returns the memory before the first step."""
        raise NotImplementedError

    def prepared(self) -> list[Any]:
        """Returns what :meth:`steps` computes from the weights alone, once for all steps."""
        return []

    def steps(self, inputs: Tensor, memory: Memory, weights: list[Any], first: int) -> tuple[Tensor, Memory]:
        """Maps the inputs (B, S, F) of S steps, the first at ``first``, to outputs (B, S, H); returns the new memory.

        Tensors of the given memory may be overwritten if grad is off.
        """
        raise NotImplementedError

    def forward(self, y: Tensor, context: Tensor | PaddedSequence | None = None) -> Tensor:
        """Maps y (B, T, *site_shape) and the context to phi (B, T, P), in parallel over the sites where possible.

        The context has shape (B, C), or (B, T or more, C) for covariates, or (B, S, C) for a source.
        """
        check_sites(self, y)
        state = self._before(context, y.shape[0])
        begin = self.begin.expand(y.shape[0], 1, -1)
        inputs = torch.cat([begin, self.encoder(y[:, :-1], begin)], 1)
        return self._run(joined(inputs, state.context, 0), state, 0)[0]

    def start(self, context: Tensor | PaddedSequence | None, batch_size: int) -> tuple[Tensor, StepState]:
        """Returns the parameters (B, P) of the first site and the state after the start vector."""
        state = self._before(context, batch_size)
        phi, state = self._run(joined(self.begin.expand(batch_size, 1, -1), state.context, 0), state, 0)
        return phi.squeeze(1), state

    def extend(self, y: Tensor, state: StepState) -> tuple[Tensor, StepState]:
        """Reads y (B, S, *site_shape); returns the parameters (B, S, P) of the sites that follow."""
        check_chunk(self, y, state.position, state.memory[0].shape[self.rows_dim])
        state = resumed(state)
        if torch.is_grad_enabled() and not state.grad:
            state = state._replace(weights=self.prepared(), grad=True)
        first = state.position + 1
        inputs = joined(self.encoder(y, self.begin), state.context, first)
        return self._run(inputs, self.advance(state, y.shape[1]), first)

    def reorder(self, state: StepState, index: Tensor) -> StepState:
        """Returns a copy of the batch rows ``index`` (B',) of a state."""
        self.advance(state, 0)
        memory = tuple(part.index_select(self.rows_dim, index) for part in state.memory)
        parts = {name: take_rows(getattr(state, name), index) for name in ("context", "source", "allowed")}
        return state._replace(version=list(state.version), memory=memory, **parts)

    def _before(self, context: Any, batch_size: int) -> StepState:
        check_context(self, context)
        state = StepState(
            0, self.new_version(), self.initial(batch_size), context, self.prepared(), torch.is_grad_enabled()
        )
        if not kind_of(self.context).attended:
            if context is not None:
                check_rows("context", context, batch_size, "the batch")
            return state
        source, allowed = self.encoded_source(context, batch_size)
        return state._replace(context=None, source=source, allowed=allowed)

    def _run(self, inputs: Tensor, state: StepState, first: int) -> tuple[Tensor, StepState]:
        """Returns phi (B, S, P) of S steps with inputs (B, S, F), the first at ``first``, and the state after them."""
        out, memory = self.steps(inputs, state.memory, state.weights, first)
        return self.last(self.attending(out, state)), state._replace(memory=memory)
