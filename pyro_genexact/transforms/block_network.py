"""Layers of the block autoregressive network, its parallel pass and its site-by-site inverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import atanh, exp, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..core.buffers import WithDerived, register_derived
from ..core.precision import full_precision
from ..numerics.derivatives import implicit
from ..numerics.roots import find

_BOUND = 5.0  # soft bound of the logarithms of weights and scales
_LEAK = 0.1  # slope of the leaky activation at infinity


def bounded(x: Tensor) -> Tensor:
    """Bounds x softly by ±5."""
    return torch.tanh(x / _BOUND) * _BOUND


def _positive(x: Tensor) -> Tensor:
    """Returns exp of the softly bounded x."""
    return exp(_BOUND) ** torch.tanh(x / _BOUND)


class Start(NamedTuple):
    """Initialisation of a layer: the norm of its rows, the size of its random part, and the spread of its biases."""

    scale: float
    noise: float
    spread: float


class BlockLinear(WithDerived):
    """Linear layer with T blocks of units: block t reads earlier blocks freely and its own block by positive weights.

    Row by row, W = exp(log_scale) V / |V|, where V is ``weight`` below the diagonal blocks and exp(``log_diagonal``) on
    them. Both logarithms are softly bounded.
    """

    mask: Tensor
    context_weight: Tensor | None

    def __init__(self, num_sites: int, below: int, above: int, context: int, start: Start) -> None:
        super().__init__()
        mask = torch.ones(num_sites, num_sites, dtype=torch.bool, device="cpu").tril(-1)
        mask = mask.repeat_interleave(above, 0).repeat_interleave(below, 1)
        register_derived(self, "mask", mask, torch.get_default_dtype())
        self.weight = nn.Parameter(start.noise * torch.randn(mask.shape) * self.mask / num_sites**0.5)
        self.log_diagonal = nn.Parameter(0.1 * torch.randn(num_sites, above, below))
        self.log_scale = nn.Parameter(torch.full((num_sites * above,), _BOUND * atanh(log(start.scale) / _BOUND)))
        # the units of a site bend at different values, symmetric around 0
        places = torch.linspace(-1, 1, above) if above > 1 else torch.zeros(1)
        self.bias = nn.Parameter(start.spread * places.repeat(num_sites))
        random = start.spread * start.noise * torch.randn(num_sites * above, context) / max(context, 1) ** 0.5
        self.context_weight = nn.Parameter(random) if context else None

    def weights(self) -> tuple[Tensor, Tensor]:
        """Returns W (T above, T below) and its diagonal blocks (T, above, below)."""
        blocks = _positive(self.log_diagonal)
        sites, above, below = blocks.shape
        grid = (self.weight * self.mask).view(sites, above, sites, below)
        full = torch.diagonal_scatter(grid, blocks.movedim(0, -1), dim1=0, dim2=2).view(self.mask.shape)
        scale = (_positive(self.log_scale) / torch.linalg.vector_norm(full, dim=1)).unsqueeze(-1)
        return full * scale, blocks * scale.view(sites, above, 1)

    def offset(self, context: Tensor | None) -> Tensor:
        """Returns the contribution of bias and context, (T above, B), or (T above, 1) without context."""
        bias = self.bias.unsqueeze(-1)
        return bias if context is None else torch.addmm(bias, self.context_weight, context.mT)  # type: ignore[arg-type]


class _Form(NamedTuple):
    """A residual form; j is the derivative of units or outputs with respect to their own site."""

    activate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (pre-activations, j) to (units, j times slopes)
    rescale: Callable[[Tensor, Any, int], tuple[Tensor, Any]]  # moves a factor of j to its logarithm ``taken``
    finish: Callable[..., tuple[Tensor, Tensor]]  # (x, net(x), j, taken, gate) to (y, log|dy/dx|)


def _tanh(x: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(x)
    return h, torch.ops.aten.tanh_backward(j.expand_as(h), h)  # j (1 - h^2) in one operation


def _leaky(x: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    h, slopes = _tanh(x, j)
    return torch.lerp(h, x, _LEAK), torch.lerp(slopes, j, _LEAK)


def _kept(j: Tensor, taken: Any, dim: int) -> tuple[Tensor, Any]:
    """No rescaling: j is added to a number that is not small, so its underflow does no harm."""
    return j, taken


def _largest_one(j: Tensor, taken: Any, dim: int) -> tuple[Tensor, Any]:
    largest = j.detach().amax(dim, keepdim=True)
    return j / largest, taken + largest.log()


def _gated(x: Tensor, net: Tensor, j: Tensor, taken: Any, gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.lerp(net, x, gate), torch.lerp(j, torch.ones_like(j), gate).log()


def _normal(x: Tensor, net: Tensor, j: Tensor, taken: Any) -> tuple[Tensor, Tensor]:
    return x + net, j.log1p()


def _alone(x: Tensor, net: Tensor, j: Tensor, taken: Any) -> tuple[Tensor, Tensor]:
    return net, j.log() + taken


FORMS = {
    "gated": _Form(_tanh, _kept, _gated),
    "normal": _Form(_tanh, _kept, _normal),
    None: _Form(_leaky, _largest_one, _alone),
}


def _through(form: _Form, count: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Evaluates the network at one site x (B,).

    Args:
        form: the residual form.
        count: the number of layers.
        x: the site.
        tensors: for each layer the contribution (B, n) of context and earlier sites, then for each layer its diagonal
            block, then the gate if there is one.

    Returns:
        y and log dy/dx (B,), and the units (B, n) of each hidden layer at this site.
    """
    offsets, blocks, gate = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    first = blocks[0].squeeze(-1)
    units, j = form.activate(torch.addcmul(offsets[0], x.unsqueeze(-1), first), first)
    j, taken = form.rescale(j, 0.0, -1)
    all_units = [units]
    for offset, block in zip(offsets[1:-1], blocks[1:-1], strict=True):
        units, j = form.activate(torch.addmm(offset, units, block.mT), j @ block.mT)
        j, taken = form.rescale(j, taken, -1)
        all_units.append(units)
    net, j = torch.addmm(offsets[-1], units, blocks[-1].mT), j @ blocks[-1].mT
    y, ladj = form.finish(x.unsqueeze(-1), net, j, taken, *gate)
    return y.squeeze(-1), ladj.squeeze(-1), all_units


def _at_site(form: _Form, count: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return _through(form, count, x, *tensors)[:2]


@full_precision
def parallel(module: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns y (T, B) and log|det dy/dx| (B,) given x (T, B) and the context (B, C)."""
    form, layers = FORMS[module.residual], module.layers
    units, j, taken = x.unsqueeze(1), None, 0.0  # (T, units of a site, B)
    for i, layer in enumerate(layers):
        weight, blocks = layer.weights()
        read = torch.addmm(layer.offset(context if i == 0 else None), weight, units.flatten(0, 1))
        units, j = read.unflatten(0, blocks.shape[:2]), blocks if j is None else torch.bmm(blocks, j)
        if i + 1 < len(layers):
            units, j = form.activate(units, j)
            j, taken = form.rescale(j, taken, 1)
    y, ladj = form.finish(x.unsqueeze(1), units, j, taken, *module.gates())
    return y.squeeze(1), ladj.sum((0, 1))


@full_precision
def site_by_site(module: Any, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns x (T, B) and log|det dy/dx| (B,) given y (T, B) and the context (B, C)."""
    form, gates, count = FORMS[module.residual], module.gates(), len(module.layers)
    at_site = partial(_at_site, form, count)
    layers: Any = [_by_site(layer, context if i == 0 else None) for i, layer in enumerate(module.layers)]
    below = [y[:0]] * count  # input of each layer, (T' n, B) for the T' finished sites
    total: Any = 0.0
    for y_t, *of_site in zip(y.unbind(0), *layers, strict=True):
        offsets = [
            torch.addmm(offset, weight[:, : len(read)], read).mT
            for (weight, _, offset), read in zip(of_site, below, strict=True)
        ]
        rest = [*(block for _, block, _ in of_site), *gates]
        with torch.no_grad():
            x = find(at_site, y_t, offsets, rest)
        x = implicit(at_site, x, y_t, *offsets, *rest)
        _, ladj, units = _through(form, count, x, *offsets, *rest)
        below = [torch.cat([b, u.mT]) for b, u in zip(below, [x.unsqueeze(-1), *units], strict=True)]
        total = total + ladj
    return below[0], total


def _by_site(layer: BlockLinear, context: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Returns for each site its rows of the weights, its diagonal block, and the contribution of bias and context."""
    weight, blocks = layer.weights()
    above = blocks.shape[1]
    return zip(weight.split(above), blocks.unbind(0), layer.offset(context).split(above), strict=True)


class Solve(Function):
    """:func:`site_by_site` without an autograd graph of T steps: backward is one reverse sweep and one parallel pass.

    With ``create_graph``, backward recomputes a differentiable graph.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, transform: Any, y: Tensor, context: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, ladj = site_by_site(transform.module, y, context)
        ctx.transform = transform  # holds the weights of this call, even if the module gets other weights later
        ctx.save_for_backward(x, y, context, *tensors)
        return x, ladj

    @staticmethod
    @full_precision
    def backward(ctx: Any, gx: Tensor, gl: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y, context, *tensors = ctx.saved_tensors
        module, needed = ctx.transform.module, ctx.needs_input_grad[1:]
        wanted = [t for t, need in zip((y, context, *tensors), needed, strict=True) if need]
        if torch.is_grad_enabled():
            outputs = site_by_site(module, y, context)
            found = torch.autograd.grad(outputs, wanted, (gx, gl), create_graph=True, allow_unused=True)
        else:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                value, ladj = parallel(module, x, context)
            (share,) = torch.autograd.grad(ladj, x, gl, retain_graph=True)
            of_y = _over_jacobian(module, x.detach(), context, gx + share)
            own = [of_y] if needed[0] else []
            others = wanted[len(own) :]
            found = torch.autograd.grad((value, ladj), others, (-of_y, gl), allow_unused=True) if others else ()
            found = (*own, *found)
        rest = iter(found)
        return None, *(next(rest) if need else None for need in needed)


def _over_jacobian(module: Any, x: Tensor, context: Tensor | None, g: Tensor) -> Tensor:
    """Returns v (T, B) with J^T v = g for J = dy/dx, solved from the last site to the first."""
    form, layers = FORMS[module.residual], [*module.layers]
    weights, blocks = zip(*(layer.weights() for layer in layers), strict=True)
    one, gates = x.new_ones(()), module.gates()
    of_x, of_net = (form.finish(a, 1 - a, one, 0.0, *gates)[0] for a in (one, 1 - one))  # y is linear in x and net(x)
    units: Tensor = x
    slopes: list[Tensor] = []
    for i, layer in enumerate(layers[:-1]):
        read = torch.addmm(layer.offset(context if i == 0 else None), weights[i], units)
        units, slope = form.activate(read, torch.ones_like(read))
        slopes.append(slope)
    own = [of_net.expand(x.shape[0], 1, x.shape[1])]  # dy / d(pre-activations) of the same site, last layer first
    for block, slope in zip(blocks[:0:-1], reversed(slopes), strict=True):
        own.append(torch.bmm(block.mT, own[-1]) * slope.view(*block.shape[::2], -1))
    diagonal = of_x + torch.bmm(blocks[0].mT, own[-1]).squeeze(1)
    own.reverse()
    adjoints = [torch.zeros_like(slope) for slope in (*slopes, x)]  # with respect to pre-activations
    v = torch.empty_like(x)
    for t in reversed(range(len(x))):
        for i in reversed(range(len(layers))):
            above, below = blocks[i].shape[1:]
            later, here = slice(t * above, None), slice(t * below, (t + 1) * below)
            by_later = weights[i][later, here].mT @ adjoints[i][later]
            if i:
                torch.mul(by_later, slopes[i - 1][here], out=adjoints[i - 1][here])
        torch.div(g[t] - by_later[0], diagonal[t], out=v[t])
        for adjoint, block in zip(adjoints, own, strict=True):
            n = block.shape[1]
            adjoint[t * n : (t + 1) * n].addcmul_(block[t], v[t])
    return v
