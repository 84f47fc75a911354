"""StateSpace: state space models over sites, diagonal and time-invariant (S4D) or selective (Mamba)."""

from __future__ import annotations

from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, rms_norm, silu, softplus

from ..base import Site
from ..contexts import Covariates, Source
from ..core.checks import check_sizes
from .encoding import dropped, share
from .scans import diagonal_scan, selective_scan
from .steps import Memory, StepNetwork


class StateSpace(StepNetwork):
    def __init__(
        self,
        site: Site,
        num_params: int,
        *,
        kind: str = "diagonal",
        width: int = 64,
        depth: int = 4,
        state: int = 64,
        dropout: float = 0.0,
        context: int | Covariates | Source = 0,
    ) -> None:
        check_sizes(1, depth=depth, state=state)
        if kind not in _KINDS:
            raise ValueError(f"Expected kind in {[*_KINDS]}; got {kind!r}.")
        super().__init__(site, num_params, width, width, context, dropout)
        self.kind, self.width, self.depth, self.state = kind, width, depth, state
        self.read = nn.Linear(self.inputs, width)
        self.layers: Any = nn.ModuleList(_KINDS[kind](width, state, depth, self.dropout) for _ in range(depth))
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
        x, new = dropped(self.read(inputs), self), list[Tensor]()
        each = len(memory) // self.depth
        for i, (layer, prepared) in enumerate(zip(self.layers, weights, strict=True)):
            x, *parts = layer(x, *memory[i * each : (i + 1) * each], prepared)
            new += parts
        return self.norm(x), tuple(new)


class Diagonal(nn.Module):
    """A layer of a diagonal :class:`StateSpace`: a linear recurrence per channel, then a gated linear layer."""

    def __init__(self, width: int, state: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.width, self.state, self.dropout = width, -(-state // 2), dropout
        self.norm = nn.LayerNorm(width)
        self.log_step = nn.Parameter(_log_steps(width))
        n = torch.arange(self.state, dtype=torch.get_default_dtype())
        self.log_decay = nn.Parameter(torch.full((width, self.state), 0.5).log())
        self.frequency = nn.Parameter((pi * n).repeat(width, 1))
        self.readout = nn.Parameter(torch.randn(width, self.state, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(width))
        self.mix = share(width, 2 * width, depth)

    def initial(self, rows: int) -> Memory:
        kind = torch.promote_types(self.skip.dtype, torch.float32).to_complex()
        return (self.skip.new_zeros(rows, self.width, self.state, dtype=kind),)

    def prepared(self) -> tuple[Tensor, Tensor]:
        """Returns the rates, step * A, and the readout, 2 C (exp(step * A) - 1) / A, both (W, N)."""
        wide = torch.promote_types(self.skip.dtype, torch.float32)
        log_step, log_decay, frequency, readout = (
            p.to(wide) for p in (self.log_step, self.log_decay, self.frequency, self.readout)
        )
        poles = torch.complex(-log_decay.exp(), frequency)
        rate = poles * log_step.exp().unsqueeze(1)
        return rate, 2 * torch.view_as_complex(readout) * rate.expm1() / poles

    def forward(self, x: Tensor, state: Tensor, prepared: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        y, state = diagonal_scan(h.to(state.real.dtype), state, *prepared)
        y = gelu(y.to(h.dtype) + self.skip * h)
        return x + dropped(glu(self.mix(y)), self), state


class Selective(nn.Module):
    """A layer of a selective :class:`StateSpace`: a short convolution, then a recurrence whose weights depend on the input."""

    def __init__(self, width: int, state: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.inner, self.state, self.dropout = 2 * width, state, dropout
        self.heads = max(self.inner // HEAD, 1)
        self.kernel = 4
        self.norm = nn.LayerNorm(width)
        self.parts = self.inner, self.inner + 2 * state, self.heads
        self.read = nn.Linear(width, sum(self.parts), bias=False)
        self.taps = nn.Parameter((2 * torch.rand(self.kernel, self.parts[1]) - 1) * self.kernel**-0.5)
        self.bias = nn.Parameter(torch.zeros(self.parts[1]))
        step = _log_steps(self.heads).exp()
        self.step_bias = nn.Parameter(step + (-(-step).expm1()).log())  # softplus(step_bias) = step
        self.log_rate = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.scale = nn.Parameter(torch.ones(self.inner))
        self.mix = share(self.inner, width, depth, bias=False)

    def initial(self, rows: int) -> Memory:
        wide = torch.promote_types(self.skip.dtype, torch.float32)
        shape = rows, self.heads, self.inner // self.heads, self.state
        return self.skip.new_zeros(rows, self.kernel - 1, self.parts[1]), self.skip.new_zeros(shape, dtype=wide)

    def prepared(self) -> None:
        return None

    def forward(self, x: Tensor, recent: Tensor, state: Tensor, prepared: None) -> tuple[Tensor, Tensor, Tensor]:
        gate, mixed, step = self.read(self.norm(x)).split(self.parts, -1)
        sites, wide = x.shape[1], state.dtype
        both = torch.cat([recent.to(mixed.dtype), mixed], 1)
        recent = both[:, sites:].clone()
        mixed = silu(sum((tap * both[:, j : j + sites] for j, tap in enumerate(self.taps)), self.bias))
        u, write, read = mixed.to(wide).split((self.inner, self.state, self.state), -1)
        u = u.unflatten(2, (self.heads, -1))
        step = softplus((step + self.step_bias).to(wide))
        y, state = selective_scan(u * step.unsqueeze(3), -step * self.log_rate.to(wide).exp(), write, read, state)
        y = (y + u * self.skip.to(wide).unsqueeze(1)).flatten(2).to(x.dtype)
        y = rms_norm(y * silu(gate), (self.inner,), self.scale)
        return x + dropped(self.mix(y), self), recent, state


HEAD = 16
_KINDS = {"diagonal": Diagonal, "selective": Selective}


def _log_steps(count: int) -> Tensor:
    """Returns log step sizes, uniform between log 0.001 and log 0.1."""
    return torch.empty(count).uniform_(-6.907755, -2.302585)
