"""The loop over the sites of MADE in one call of the native operator."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..base import Head
from ..core.functional import transformed
from .masked import MaskedLinear
from .sweeps import MADEState, Sweeps

_ACTIVATIONS: dict[Any, int] = {torch.relu: 0, torch.tanh: 1, torch.sigmoid: 2, silu: 3}
_ROOTS = ("sum_of_squares", "bernstein", "deep_sigmoid")
_BIJECTIONS = ("affine", "spline", *_ROOTS)
_DTYPES = (torch.float32, torch.float64)
_ROW = 16  # rows of units begin at multiples of this number
_compared: WeakKeyDictionary[Sweeps, dict[int, Any]] = WeakKeyDictionary()  # masks, their versions, and the results


class NativeLoop(NamedTuple):
    """What the native loop returns.

    Attributes:
        values: (B, T, *site_shape).
        totals: (B,), log|dx/dy| of a bijection, or a number that is NaN if a parameter of a distribution is.
        phi: (B, T, P), the parameters of all sites, if they are kept.
        state: the last state, if it is kept.
    """

    values: Tensor
    totals: Tensor
    phi: Tensor
    state: MADEState


def applies(activation: Any, head: Head, given: Tensor) -> bool:
    """Returns whether :func:`solve` has the activation and the head, for these values and in the current mode."""
    mode = torch.is_grad_enabled() or transformed()
    if mode or not _is_plain(given) or not len(given) or activation not in _ACTIVATIONS:
        return False
    changed = "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks
    return not changed and head.native is not None


def solve(
    conditioner: Any,
    sweeps: Sweeps,
    head: Head,
    given: Tensor,
    weights: list[Tensor],
    offsets: list[Tensor],
    keep: bool,
) -> NativeLoop | None:
    """Computes the value of each site from the given number of the site and the values of the earlier sites.

    Args:
        conditioner: the MADE.
        sweeps: its units.
        head: the head of the sites.
        given: (B, T, *site_shape), the image y of a bijection, whose solution x is computed; or numbers u in float64
            whose quantiles are computed.
        weights: the weight of each link, masked if ``keep``, else :func:`weights_of`.
        offsets: (units, B), the offsets of each layer.
        keep: whether the parameters of all sites and the last state are needed.

    Returns:
        The values, or None if the weights are not ordinary tensors in float32 or float64, if the given numbers have
        another dtype or shape, if the head does not fit the conditioner, or if a root is not found.
    """
    name, settings = head.native  # type: ignore[misc]
    site, dtype = conditioner.site, weights[0].dtype
    shape = () if isinstance(site, int) else tuple(site)
    if (head.num_params, tuple(head.site_shape)) != (conditioner.num_params, shape):
        return None
    if given.shape[1:] != (conditioner.num_sites, *shape):
        return None
    if isinstance(site, int) and {"bernoulli": 2, "categorical": head.num_params}.get(name, inf) > site:
        return None
    if dtype not in _DTYPES or not all(map(_is_plain, weights)):
        return None
    if given.dtype is not (dtype if name in _BIJECTIONS else torch.float64):
        return None
    values, totals, phi, units = torch.ops.pyro_genexact.loop(
        given.flatten(2) if given.dim() > 2 else given.unsqueeze(2),
        weights := [weight.contiguous() for weight in weights],
        offsets,
        sweeps.ends,
        len(weights) > len(offsets),
        _ACTIVATIONS[conditioner.activation],
        site if isinstance(site, int) else 0,
        name,
        settings,
        keep,
    )
    if name in _ROOTS and not totals.isfinite().all():  # the loop in Python searches longer, or raises an error
        return None
    read = conditioner.num_sites - 1
    state = MADEState(read, [read], tuple(weights), tuple(offsets), tuple(units), None, True)
    return NativeLoop(values.view(given.shape), totals, phi, state)


def weights_of(sweeps: Sweeps, layers: Sequence[Any]) -> list[Tensor]:
    """Returns the weight of each link for the loop; it is masked if the mask excludes an entry that the loop reads.

    A mask is compared when it is new or has been changed.
    """
    known = _compared.setdefault(sweeps, {})
    found = []
    for index, layer in enumerate(layers):
        dense = False
        if type(layer) is MaskedLinear and "masked" not in vars(layer) and not (mask := layer.mask).is_inference():
            seen, version, dense = known.get(index, (None, 0, False))
            if seen is None or seen() is not mask or version != mask._version:
                dense = sweeps.is_dense(index, mask)
                known[index] = ref(mask), mask._version, dense
        found.append(layer.weight if dense else layer.masked())
    return found


def can_step(activation: Any, weights: Sequence[Tensor]) -> bool:
    """Returns whether :func:`step` applies to states with these weights, evaluated in place."""
    dtype = weights[0].dtype
    return activation in _ACTIVATIONS and dtype in _DTYPES and all(map(_is_plain, weights))


def step(activation: Any, sweeps: Sweeps, low: int, high: int, state: MADEState, inputs: Tensor) -> Tensor | None:
    """Returns the outputs (B, high - low, P) of degrees low ... high - 1, as :meth:`Sweeps.finish_in_place` does.

    Returns None if the units have been copied to rows without padding, or the activation has been replaced.
    """
    if activation not in _ACTIVATIONS or state.units[-1].stride(0) % _ROW:
        return None
    direct = len(state.weights) > len(state.offsets)
    phi: Tensor = torch.ops.pyro_genexact.step(
        inputs, state.units, state.weights, sweeps.ends, direct, _ACTIVATIONS[activation], low, high
    )
    return phi


def reverse(
    conditioner: Any, sweeps: Sweeps, state: MADEState, g: Tensor, gain: Tensor, drive: Tensor, slope: Any
) -> tuple[Tensor, list[Tensor]] | None:
    """Computes :meth:`Sweeps.reverse`, or returns None if the operator does not apply.

    Args:
        conditioner: the MADE.
        sweeps: its units.
        state: the last state of an evaluation without grad.
        g: (B, T, k), the cotangent of the sites.
        gain: (B, T, k, P).
        drive: (B, T, P).
        slope: maps the index of a hidden layer and the state to the derivatives (units, B) of its activations.
    """
    tensors, activation = (g, gain, drive, *state.weights), _ACTIVATIONS.get(conditioner.activation)
    if activation is None or not len(g) or torch.is_grad_enabled() or transformed():
        return None
    if not all(_is_plain(t) and t.dtype is g.dtype for t in tensors) or g.dtype not in _DTYPES:
        return None
    layers = range(1, len(state.offsets))
    known = conditioner.activation is not silu  # whose derivative does not follow from its value
    hidden = [state.units[level] if known else slope(level, state) for level in layers]
    of_inputs, of_pre = torch.ops.pyro_genexact.reverse(
        g.contiguous(),
        gain.contiguous(),
        drive.contiguous(),
        hidden,
        [weight.contiguous() for weight in state.weights],
        sweeps.ends,
        len(state.weights) > len(state.offsets),
        activation,
    )
    return of_inputs, [g, *of_pre]


def padded(x: Tensor) -> Tensor:
    """Returns a copy of x (units, B) whose rows begin at multiples of 16 numbers, as the native step expects."""
    columns = -(-x.shape[1] // _ROW) * _ROW
    columns += _ROW * (columns % 128 == 0)  # rows at multiples of a large power of two share few lines of the cache
    return x.new_zeros(len(x), columns)[:, : x.shape[1]].copy_(x)


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is an ordinary one on the CPU, neither distributed nor of another subclass."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
