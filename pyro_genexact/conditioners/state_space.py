"""StateSpace: linear recurrences over sites, time-invariant (S4D) or with weights that depend on the input (Mamba)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, rms_norm, silu, softplus

from ..base import Site
from ..contexts import Covariates, Source
from ..core.checks import check_numbers, check_sizes
from .encoding import dropped, share
from .scans import diagonal_scan, selective_scan
from .steps import Memory, StepNetwork

_HEAD = 32  # channels per head of a selective layer, about
_KERNEL = 4  # of the convolution of a selective layer
_EPS = 1e-5  # of its norm, in any dtype, as torch's LayerNorm has it


class StateSpace(StepNetwork):
    """State space model over sites, of any length: a linear recurrence per layer, which has a parallel form.

    Each layer normalises its inputs, runs a recurrence, and adds the result to its inputs. The recurrence of
    ``kind="diagonal"`` (S4D) has the same weights at every step. For channel c with step size D,

        s_t = exp(D a) s_{t-1} + u_t,      y_t = 2 Re sum_n r_n s_tn + d u_t,      r_n = c_n (exp(D a_n) - 1) / a_n,

    where s, a, c and r are complex and Re a < 0. A gated linear layer glu(linear(gelu(y_t))) mixes the channels. In
    ``kind="selective"`` (Mamba-2), the weights of each head depend on the input h_t of the layer. A linear map of h_t,
    followed by a convolution over four steps and silu, gives u_t, b_t and c_t:

        s_t = exp(-D_t r) s_{t-1} + D_t u_t b_t',      y_t = s_t c_t + d u_t,      D_t = softplus(w . h_t + v),

    and the output is linear(rmsnorm(y_t * silu(G h_t))). Time-invariant layers suit signals that are sampled regularly;
    selective layers can ignore some inputs and keep others, as text requires.

    A learned start vector replaces y_0, so that the parameters of the first site are also a non-linear function of the
    context x. With ``context=Covariates(C)``, step t reads the covariates x_t in place of x. With
    ``context=Source(C)``, the last layer attends to the steps of the source, as in :class:`Recurrent`.

    Cost per layer of width W: ``forward`` takes O(B T W (W + Q + N)) operations, in chunks of up to Q steps (64 for the
    diagonal kind, 32 for the selective one). The work within chunks is a product of matrices, and a recurrence joins
    the T / Q chunks. Unlike a convolution by FFT, this is causal to the last digit, supports every dtype, and starts
    from any state. Each step of ``extend`` takes O(B W (W + N)) operations at any length. Per layer and row, the state
    holds N W numbers (diagonal) or (2 N + 6) W + 6 N numbers (selective).

    Args:
        site: kind of a site: ``()`` for a real number and ``(k,)`` for a real vector, which a linear layer reads, or an
            integer V for categories 0 ... V-1, which are embedded.
        num_params: P, the number of parameters per site.
        kind: ``"diagonal"`` or ``"selective"``.
        width: W, the width of the residual stream. A selective layer has 2 W channels, in heads of about 32.
        depth: number of layers.
        state: N, the size of the state of each channel. The diagonal kind uses N / 2 complex numbers, rounded up.
        step_sizes: the smallest and the largest initial step size D. A layer initially remembers up to about 2 / D
            steps (diagonal) or 1 / D (selective).
        frequencies: initial imaginary parts of a in the diagonal kind: ``"linear"`` for pi n (S4D-Lin), or
            ``"inverse"`` for N / pi (N / (2 n + 1) - 1) (S4D-Inv), with n = 0 ... N / 2 - 1.
        dropout: dropout rate in training mode, after the inputs and after each layer.
        context: C, the number of features of a context vector that every step reads; ``Covariates(C)`` for covariates,
            where site t reads those of the sites up to t; or ``Source(C)`` for a source sequence that all sites attend
            to, passed as a :class:`~pyro_genexact.PaddedSequence` if its rows have different lengths.

    Raises:
        TypeError: if ``dropout`` or a step size is not a number.
        ValueError: if a size is not a positive integer, ``kind`` or ``frequencies`` is unknown, ``step_sizes`` are not
            two positive numbers in order, or ``dropout`` is outside [0, 1). In calls, for categories out of range, a
            context of another width, a number of rows other than the state's, and more sites than covariates.

    References: Gu, Gupta, Goel, Ré, "On the parameterization and initialization of diagonal state space models",
    NeurIPS 2022; Gu, Dao, "Mamba: linear-time sequence modeling with selective state spaces", 2023; Dao, Gu,
    "Transformers are SSMs: generalized models and efficient algorithms through structured state space duality", ICML
    2024.

    Example:
        >>> import torch
        >>> net = StateSpace((), 2, kind="selective", width=16, depth=2)
        >>> net(torch.zeros(7, 9)).shape
        torch.Size([7, 9, 2])
        >>> phi, state = net.start(None, batch_size=7)
        >>> phi, state = net.extend(torch.zeros(7, 1), state)
        >>> phi.shape
        torch.Size([7, 1, 2])
    """

    def __init__(
        self,
        site: Site,
        num_params: int,
        *,
        kind: str = "diagonal",
        width: int = 64,
        depth: int = 4,
        state: int = 32,
        step_sizes: Sequence[float] = (0.001, 0.1),
        frequencies: str = "linear",
        dropout: float = 0.0,
        context: int | Covariates | Source = 0,
    ) -> None:
        check_sizes(1, depth=depth, state=state)
        if kind not in _KINDS:
            raise ValueError(f"Expected kind in {[*_KINDS]}; got {kind!r}.")
        if frequencies not in _FREQUENCIES:
            raise ValueError(f"Expected frequencies in {[*_FREQUENCIES]}; got {frequencies!r}.")
        sizes = step_sizes if isinstance(step_sizes, Sequence) else [step_sizes]
        check_numbers(**{f"step_sizes[{i}]": size for i, size in enumerate(sizes)})
        if len(sizes) != 2 or not 0 < sizes[0] <= sizes[1] < inf:
            raise ValueError(f"Expected step_sizes to be two positive numbers in order; got {step_sizes}.")
        super().__init__(site, num_params, width, context, dropout)
        self.add_readout(width)
        self.kind, self.width, self.depth, self.state = kind, width, depth, state
        self.step_sizes, self.frequencies = tuple(sizes), frequencies
        self.read = nn.Linear(self.inputs, width)
        self.layers: Any = nn.ModuleList(_KINDS[kind](self) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def extra_repr(self) -> str:
        return (
            f"{self.site}, {self.num_params}, kind={self.kind!r}, width={self.width}, depth={self.depth}, "
            f"state={self.state}, dropout={self.dropout}, context={self.context}"
        )

    def initial(self, rows: int) -> Memory:
        return tuple(part for layer in self.layers for part in layer.initial(rows))

    def prepared(self) -> list[Any]:
        return [layer.prepared() for layer in self.layers]

    def steps(self, inputs: Tensor, memory: Memory, weights: list[Any], first: int) -> tuple[Tensor, Memory]:
        new: list[Tensor] = []
        x = dropped(self.read(inputs), self)
        each = len(memory) // self.depth
        for i, (layer, prepared) in enumerate(zip(self.layers, weights, strict=True)):
            out, *parts = layer(self.norms[i](x), *memory[i * each : (i + 1) * each], *prepared)
            x = x + dropped(out, self)
            new += parts
        return self.norm(x), tuple(new)


class DiagonalLayer(nn.Module):
    """A layer of a diagonal :class:`StateSpace`: a linear recurrence per channel, then a gated linear layer."""

    def __init__(self, net: StateSpace) -> None:
        super().__init__()
        self.width, self.count = net.width, -(-net.state // 2)
        self.log_step = nn.Parameter(_log_steps(net.width, net.step_sizes))
        self.log_decay = nn.Parameter(torch.full((net.width, self.count), 0.5).log())
        self.frequency = nn.Parameter(_FREQUENCIES[net.frequencies](self.count).repeat(net.width, 1))
        self.readout = nn.Parameter(torch.randn(net.width, self.count, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(net.width))
        self.mix = share(net.width, 2 * net.width, net.depth)

    def initial(self, rows: int) -> Memory:
        """Returns the state (B, W, N / 2) before the first step, complex zeros of single precision at least."""
        kind = torch.complex128 if self.skip.dtype == torch.float64 else torch.complex64
        return (self.skip.new_zeros(rows, self.width, self.count, dtype=kind),)

    def prepared(self) -> tuple[Tensor, Tensor]:
        """Returns the rates D a and the readout 2 r, complex, (W, N / 2)."""
        wide = torch.promote_types(self.skip.dtype, torch.float32)
        decay = self.log_decay.to(wide).exp() + 1e-20  # a pole of 0 would give 0 / 0
        poles = torch.complex(-decay, self.frequency.to(wide))
        rate = poles * self.log_step.to(wide).exp().unsqueeze(1)
        return rate, 2 * torch.view_as_complex(self.readout.to(wide)) * rate.expm1() / poles

    def forward(self, x: Tensor, state: Tensor, rate: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Maps steps (B, S, W) to outputs (B, S, W), and returns the state after them."""
        y, state = diagonal_scan(x.to(state.real.dtype), state, rate, read)
        return glu(self.mix(gelu(y.to(x.dtype) + self.skip * x))), state


class SelectiveLayer(nn.Module):
    """A layer of a selective :class:`StateSpace`: a convolution over four steps, then an input-dependent recurrence."""

    def __init__(self, net: StateSpace) -> None:
        super().__init__()
        self.inner, self.state = 2 * net.width, net.state
        most = max(self.inner // _HEAD, 1)
        self.heads = next(n for n in range(most, 0, -1) if self.inner % n == 0)
        self.parts = self.inner, self.inner + 2 * net.state, self.heads
        self.read = nn.Linear(net.width, sum(self.parts), bias=False)
        self.taps = nn.Parameter((2 * torch.rand(_KERNEL, self.parts[1]) - 1) * _KERNEL**-0.5)
        self.bias = nn.Parameter(torch.zeros(self.parts[1]))
        step = _log_steps(self.heads, net.step_sizes).exp()
        self.step_bias = nn.Parameter(step + (-(-step).expm1()).log())  # softplus(step_bias) is the step size
        self.log_rate = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.scale = nn.Parameter(torch.ones(self.inner))
        self.mix = share(self.inner, net.width, net.depth, bias=False)

    def initial(self, rows: int) -> Memory:
        """Returns zeros for the last inputs (B, 3, .) of the convolution and the states (B, heads, 2 W / heads, N)."""
        wide = torch.promote_types(self.skip.dtype, torch.float32)
        shape = rows, self.heads, self.inner // self.heads, self.state
        return self.skip.new_zeros(rows, _KERNEL - 1, self.parts[1]), self.skip.new_zeros(shape, dtype=wide)

    def prepared(self) -> tuple[Tensor]:
        """Returns the rates r of the heads."""
        return (self.log_rate.to(torch.promote_types(self.skip.dtype, torch.float32)).exp(),)

    def forward(self, x: Tensor, recent: Tensor, state: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps steps (B, S, W) to outputs (B, S, W), and returns the last inputs and the states after them."""
        gate, mixed, step = self.read(x).split(self.parts, -1)
        both = torch.cat([recent.to(mixed.dtype), mixed], 1)
        sites, wide = x.shape[1], state.dtype
        mixed = silu(sum((tap * both[:, j : j + sites] for j, tap in enumerate(self.taps)), self.bias))
        u, write, read = mixed.to(wide).split((self.inner, self.state, self.state), -1)
        u, step = u.unflatten(2, (self.heads, -1)), softplus((step + self.step_bias).to(wide))
        y, state = selective_scan(u * step.unsqueeze(3), -step * rate, write, read, state)
        y = (y + u * self.skip.unsqueeze(1)).flatten(2).to(x.dtype)
        y = rms_norm(y * silu(gate), (self.inner,), eps=_EPS) * self.scale
        return self.mix(y), both[:, sites:].clone(), state


def _log_steps(count: int, step_sizes: Sequence[float]) -> Tensor:
    low, high = map(log, step_sizes)
    return torch.empty(count).uniform_(low, high)


def _linear(count: int) -> Tensor:
    return pi * torch.arange(float(count))


def _inverse(count: int) -> Tensor:
    size = 2 * count
    return size / pi * (size / (2 * torch.arange(float(count)) + 1) - 1)


_KINDS: dict[str, Any] = {"diagonal": DiagonalLayer, "selective": SelectiveLayer}
_FREQUENCIES = {"linear": _linear, "inverse": _inverse}
