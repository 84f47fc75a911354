"""What a chain of labels is made of: its support, its potentials and the checks of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from ..base import Conditioner, Steps, broadcast_shapes, check_like
from ..semirings import Chain
from .checks import check_kind


class LabelStrings(constraints.Constraint):
    """Integers 0 ... V - 1 up to a row's length, anything after it.

    Example:
        >>> LabelStrings(3, torch.tensor([2, 1])).check(torch.tensor([[0, 5], [2, -100]]))
        tensor([False,  True])
    """

    is_discrete, event_dim = True, 1

    def __init__(self, num_labels: int, lengths: Tensor) -> None:
        self.num_labels, self.lengths = num_labels, lengths

    def check(self, value: Tensor) -> Tensor:
        gone = torch.arange(value.shape[-1], device=value.device) >= self.lengths.unsqueeze(-1)
        return ((value % 1 == 0) & (value >= 0) & (value < self.num_labels) | gone).all(-1)

    def anchor(self, like: Tensor) -> Tensor:
        """Some value inside, that broadcasts with ``like``."""
        return like.new_zeros(())


class Lookup(Conditioner):
    """Parameters of a label by the label before it, from tables (B, N, V * V) that are the context; the first from row 0."""

    class State(NamedTuple):
        position: int
        clock: list[int]
        tables: Tensor

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.site = self.num_params = num_labels
        self.context = Steps(num_labels**2)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, State]:
        assert context is not None
        tables = context.unflatten(-1, (self.num_params, self.num_params))
        return tables[:, 0, 0], self.State(0, self.clock(), tables)

    def extend(self, y: Tensor, state: State) -> tuple[Tensor, State]:
        tables = state.tables[:, state.position + 1 : state.position + 1 + y.shape[1]]
        return tables.take_along_dim(y.long()[..., None, None], -2).squeeze(-2), self.advance(state, y.shape[1])


def pick(potentials: Tensor, labels: Tensor) -> Tensor:
    """potentials (*, M, K) at labels (*, M), of shapes that broadcast; without copies of the potentials."""
    own = potentials.shape[:-1]
    start = torch.arange(0, potentials.numel(), potentials.shape[-1], device=labels.device).reshape(own)
    index = start + labels
    return potentials.reshape(-1).index_select(0, index.flatten()).reshape(index.shape)


def check_possible(log_partition: Tensor, shape: Size) -> None:
    """Raises a ValueError that names a row where no label string is possible."""
    if log_partition.is_meta or not (impossible := log_partition == -torch.inf).any():
        return
    row = torch.unravel_index(impossible.nonzero()[0, 0], shape) if shape else ()
    name = f"row {tuple(int(i) for i in row)}" if shape else "the only row"
    raise ValueError(f"Expected potentials that allow a label string; got none for {name} (all scores are -inf).")


def check_numbers(chain: Chain) -> None:
    """Raises a ValueError for potentials that are NaN or +inf."""
    for name, potentials in zip(Chain._fields, chain[:4], strict=False):
        if not potentials.is_meta and not (fine := potentials < torch.inf).all():
            raise ValueError(f"Expected {name} of finite numbers or -inf; got {float(potentials[~fine][0])}.")


def check_potentials(unary: Tensor, transition: Tensor, initial: Tensor | None, final: Tensor | None) -> None:
    """Raises a TypeError or ValueError for potentials that do not fit each other."""
    check_kind("unary", unary, Tensor)
    if not unary.is_floating_point():
        raise TypeError(f"Expected unary of floating-point numbers; got {unary.dtype}.")
    if unary.dim() < 2 or 0 in unary.shape[-2:]:
        raise ValueError(f"Expected unary.shape == (*batch, N, V) with N, V >= 1; got {tuple(unary.shape)}.")
    sites, labels = unary.shape[-2:]
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


def batch_shape_of(
    unary: Tensor, transition: Tensor, initial: Tensor | None, final: Tensor | None, lengths: Tensor | None
) -> Size:
    """That of all, broadcast; ValueError where they do not fit."""
    shapes = {
        "unary": unary.shape[:-2],
        "transition": transition.shape[:-3],
        "initial": () if initial is None else initial.shape[:-1],
        "final": () if final is None else final.shape[:-1],
        "lengths": () if lengths is None else lengths.shape,
    }
    try:
        return broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items() if shape)
        raise ValueError(f"Expected batch shapes that broadcast; got {got}.") from error
