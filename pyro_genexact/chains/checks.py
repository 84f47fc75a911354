"""Checks of the arguments of chains; the errors name the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Size, Tensor

from ..core.checks import check_kind, check_like
from ..core.functional import visible
from ..core.lengths import checked_lengths
from ..core.shapes import broadcast_batches, broadcast_shapes
from .semirings import ChainPotentials


def lengths_like(unary: Tensor, lengths: Tensor | None, name: str = "unary") -> Tensor | None:
    """Returns the lengths (*batch) as integers, checked against unary potentials (*batch, N, V).

    Raises:
        TypeError: if the lengths are not a tensor of integers.
        ValueError: if they are outside 0 ... N or on another device than ``unary``, which the message calls ``name``.
    """
    if lengths is None:
        return None
    if isinstance(lengths, Tensor) and lengths.device != unary.device:
        raise ValueError(f"Expected lengths.device == {unary.device} (device of {name}); got {lengths.device}.")
    return checked_lengths(lengths, unary.shape[-2])


def fits(name: str, values: Tensor, like: Tensor, batch: Sequence[int], event: Sequence[int], exact: int = 1) -> None:
    """Raises a TypeError or ValueError unless values broadcast with (*batch, *event) without changing ``event``.

    Args:
        name: name of the values in messages.
        values: the values to check.
        like: a tensor on the expected device.
        batch: dims that may broadcast to larger ones.
        event: dims that may not.
        exact: number of last dims that the values must have exactly.
    """
    check_kind(name, values, Tensor)
    if values.device != like.device:
        raise ValueError(f"Expected {name}.device == {like.device} (device of the potentials); got {values.device}.")
    shape = Size((*batch, *event))
    if exact and values.shape[-exact:] != shape[-exact:]:
        raise ValueError(f"Expected {name}.shape[-{exact}:] == {tuple(shape[-exact:])}; got {tuple(values.shape)}.")
    try:
        fits = broadcast_shapes(values.shape, shape)[-len(event) :] == shape[-len(event) :]
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"Expected {name} of a shape that broadcasts with {tuple(shape)}; got {tuple(values.shape)}.")


def labels(name: str, labels: Tensor, num_labels: int, free: Tensor | None) -> None:
    """Raises a ValueError unless labels (*, N) are integers 0 ... V - 1 wherever ``free`` (*, N) is False."""
    inside = (labels % 1 == 0) & (labels >= 0) & (labels < num_labels)
    if (at := first_outside(inside, free)) is not None:
        got = torch.broadcast_tensors(labels, inside if free is None else free)[0][at].item()
        raise ValueError(f"Expected {name} to be integers 0 ... {num_labels - 1}; got {got} at {at}.")


def sets(name: str, allowed: Tensor, free: Tensor | None) -> None:
    """Raises a ValueError unless ``allowed`` (*, N, V) allows a label at each site where ``free`` (*, N) is False."""
    if (at := first_outside(allowed.any(-1), free)) is not None:
        raise ValueError(f"Expected {name} to allow a label at every observed site; got none at {at}.")


def first_outside(inside: Tensor, free: Tensor | None) -> tuple[int, ...] | None:
    """Returns the index of the first site that is neither inside nor free; None if there is none or values are hidden."""
    inside = inside if free is None else inside | free
    if not visible(inside) or inside.all():
        return None
    return tuple((~inside).nonzero()[0].tolist())


def costs(cost: Tensor, unary: Tensor) -> None:
    """Raises a TypeError or ValueError unless the cost is a matrix (V, V)."""
    fits("cost", cost, unary, (), (unary.shape[-1],) * 2, 2)
    if cost.dim() != 2:
        raise ValueError(f"Expected cost.dim() == 2 (one matrix for all rows); got {tuple(cost.shape)}.")


def finite(**values: Tensor | None) -> None:
    """Raises a ValueError for values that are not finite."""
    for name, value in values.items():
        if value is not None and visible(value) and not (fine := value.isfinite()).all():
            raise ValueError(f"Expected {name} to be finite; got {value[~fine][0].item()}.")


def possible(log_partition: Tensor, shape: Size) -> None:
    """Raises a ValueError if a row has no possible label sequence."""
    if not visible(log_partition) or not (impossible := log_partition == -torch.inf).any():
        return
    row = torch.unravel_index(impossible.nonzero()[0, 0], shape) if shape else ()
    name = f"row {tuple(int(i) for i in row)}" if shape else "the only row"
    raise ValueError(f"Expected potentials that allow a label sequence; got none for {name} (all scores are -inf).")


def log_weights(**values: Tensor) -> None:
    """Raises a ValueError for values that are NaN or +inf."""
    for name, value in values.items():
        if visible(value) and not (fine := value < torch.inf).all():
            raise ValueError(f"Expected {name} to be finite or -inf; got {value[~fine][0].item()}.")


def potentials_in_range(given: Iterable[Tensor | None], chain: Callable[[], ChainPotentials]) -> None:
    """Raises a ValueError for potentials that are NaN or +inf outside padding; ``chain`` removes the padding."""
    if any(p is not None and visible(p) and not (p < torch.inf).all() for p in given):
        log_weights(**dict(zip(ChainPotentials._fields, chain()[:4], strict=False)))


def potentials(unary: Tensor, transition: Tensor, initial: Tensor | None, final: Tensor | None) -> None:
    """Raises a TypeError or ValueError for potentials whose types or shapes do not match."""
    check_kind("unary", unary, Tensor)
    if not unary.is_floating_point():
        raise TypeError(f"Expected unary to be a floating-point tensor; got {unary.dtype}.")
    if unary.dim() < 2 or 0 in unary.shape[-2:]:
        raise ValueError(f"Expected unary.shape == (*batch, N, V) with N, V >= 1; got {tuple(unary.shape)}.")
    sites, labels = unary.shape[-2:]
    check_kind("transition", transition, Tensor)
    given = {"transition": transition, "initial": initial, "final": final}
    for name, potentials in given.items():
        if potentials is not None:
            check_kind(name, potentials, Tensor)
            check_like(name, potentials, unary)
    if transition.shape[-2:] != (labels, labels):
        raise ValueError(
            f"Expected transition.shape[-2:] == ({labels}, {labels}) (labels of unary); got {tuple(transition.shape)}."
        )
    if transition.dim() > 2 and transition.shape[-3] not in (1, sites - 1):
        raise ValueError(
            f"Expected transition.shape == (*batch, {sites - 1}, {labels}, {labels}) (steps between the sites of unary); "
            f"got {tuple(transition.shape)}."
        )
    for name, potentials in (("initial", initial), ("final", final)):
        if potentials is not None and (potentials.dim() < 1 or potentials.shape[-1] != labels):
            raise ValueError(f"Expected {name}.shape[-1] == {labels} (labels of unary); got {tuple(potentials.shape)}.")


def batch_shape_of(**shapes: Sequence[int]) -> Size:
    """Returns the broadcast batch shape; raises a ValueError that names the shapes if they do not broadcast."""
    return broadcast_batches(**{name: shape for name, shape in shapes.items() if shape})
