"""Products with block-triangular weights, in panels of rows that leave out most of the zeros."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core.functional import transformed, visible

LARGE = 2**18
"""A weight with this many entries is multiplied in panels. With fewer, the calls cost more than the zeros."""
PANELS = 4  # the zeros that remain are an eighth of the weight; eight panels gain at most a tenth more


class Panel(NamedTuple):
    """Rows of a masked weight (out, in).

    Attributes:
        low: the first row.
        high: the row after the last.
        full: all rows of the panel read the columns before this one.
        end: no row of the panel reads this column or a later one.
    """

    low: int
    high: int
    full: int
    end: int


def panels_of(mask: Tensor) -> tuple[Panel, ...]:
    """Returns the panels of a large mask (out, in) whose products save time, else none."""
    if mask.numel() < LARGE:
        return ()
    found = []
    for rows in torch.arange(len(mask), device="cpu").chunk(PANELS):
        part = mask[rows]
        # columns before the first that a row does not read, and up to the last that a row reads
        full, end = part.all(0).long().cumprod(0).sum(), part.any(0).long().flip(0).cummax(0).values.sum()
        found.append(Panel(int(rows[0]), int(rows[-1]) + 1, int(full), int(end)))
    products = sum((panel.high - panel.low) * panel.end for panel in found)
    return tuple(found) if products <= 0.8 * mask.numel() else ()


def masked_weight(weight: Tensor, mask: Tensor, panels: tuple[Panel, ...] = ()) -> Tensor:
    """Returns mask * weight; with panels and without grad, on the CPU, only the columns that need it are multiplied."""
    if not panels or torch.is_grad_enabled() or weight.device.type != "cpu" or not visible(weight):
        return weight * mask
    found = torch.zeros_like(weight)
    for low, high, full, end in panels:
        found[low:high, :full] = weight[low:high, :full]
        torch.mul(weight[low:high, full:end], mask[low:high, full:end], out=found[low:high, full:end])
    return found


def masked_linear(
    x: Tensor, weight: Tensor, mask: Tensor, offset: Tensor | None, panels: tuple[Panel, ...] = ()
) -> Tensor:
    """Returns (mask * weight) x + offset, (B, out), of x (B, in), weight and mask (out, in).

    The offset has the shape (B, out) or (out,), or is None. With panels, on the CPU, the forward and backward pass skip
    the columns that a panel does not read, and mask only those that some of its rows read.
    """
    recorded = torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined]
    if panels and x.device.type == "cpu" and not recorded and not torch.is_autocast_enabled("cpu"):
        if not transformed():
            return _InPanels.apply(x, weight, mask, offset, panels)  # type: ignore[no-any-return]
        y = torch.cat([linear(x[:, : p.end], _rows(weight, mask, p)) for p in panels], 1)
        return y if offset is None else y + offset
    if offset is None or offset.dim() == 1:
        return linear(x, weight * mask, offset)
    return torch.addmm(offset, x, (weight * mask).t())


def _rows(weight: Tensor, mask: Tensor, panel: Panel) -> Tensor:
    """Returns the masked rows (high - low, end) of a panel."""
    low, high, full, end = panel
    return torch.cat([weight[low:high, :full], weight[low:high, full:end] * mask[low:high, full:end]], 1)


class _InPanels(torch.autograd.Function):
    """:func:`masked_linear` in panels."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, offset: Tensor | None, panels: tuple[Panel, ...]
    ) -> Tensor:
        y = x.new_empty(len(x), len(weight))
        edges = []  # of each panel, the columns that some of its rows read
        for low, high, full, end in panels:
            out = y[:, low:high]
            if offset is None:
                torch.mm(x[:, :full], weight[low:high, :full].t(), out=out)
            else:
                torch.addmm(offset[..., low:high], x[:, :full], weight[low:high, :full].t(), out=out)
            edges.append(weight[low:high, full:end] * mask[low:high, full:end])
            out.addmm_(x[:, full:end], edges[-1].t())
        ctx.panels, ctx.dims = panels, 0 if offset is None else offset.dim()
        ctx.save_for_backward(x, weight, mask, *edges)
        ctx.save_for_forward(x, weight, mask)
        return y

    @staticmethod
    def jvp(ctx: Any, dx: Any, dw: Any, _mask: None, d_offset: Any, _panels: None) -> Tensor:  # type: ignore[override]
        x, weight, mask = ctx.saved_tensors
        parts = [] if dx is None else [linear(dx, weight * mask)]
        parts += [] if dw is None else [linear(x, dw * mask)]
        parts += [] if d_offset is None else [d_offset.expand(len(x), -1)]
        return sum(parts[1:], parts[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mask, *edges = ctx.saved_tensors
        of_x, of_weight, _, of_offset, _ = ctx.needs_input_grad
        gx = gw = None
        vectorised = transformed() or torch._C._functorch.is_legacy_batchedtensor(g)  # by is_grads_batched
        if torch.is_grad_enabled() or vectorised:  # in-place writes would fail
            gx, gw = g @ (weight * mask) if of_x else None, (g.t() @ x) * mask if of_weight else None
        else:
            if of_x:
                gx = torch.zeros_like(x)
                for (low, high, full, end), edge in zip(ctx.panels, edges, strict=True):
                    gx[:, :full].addmm_(g[:, low:high], weight[low:high, :full])
                    gx[:, full:end].addmm_(g[:, low:high], edge)
            if of_weight:
                gw = torch.empty_like(weight)
                for low, high, full, end in ctx.panels:
                    torch.mm(g[:, low:high].t(), x[:, :end], out=gw[low:high, :end])
                    gw[low:high, full:end].mul_(mask[low:high, full:end])
                    gw[low:high, end:].zero_()
        return gx, gw, None, (g.sum(0) if ctx.dims == 1 else g) if of_offset else None, None
