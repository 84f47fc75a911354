"""The flow of a hierarchical guide: global numbers, and the rows of a plate given the globals by networks with shared weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.binding import Held, held_tensors
from ..core.devices import zeros_for
from ..core.independent import REAL_VECTOR
from ..core.shapes import sum_rightmost
from ..flows.base import Flow, over_reals
from ..flows.recipes import iaf
from ..transforms.base import Chain, RememberingTransform
from .arrow import Layout

EMBEDDING = 4  # learned numbers of each row
HIDDEN = (
    32,
)  # layers of the networks of iaf: larger ones were slower and not better, as each row has its own affine map


class RowsGivenAll(RememberingTransform):
    """The bijection of globals x0 and rows x_g: y0 = f(x0), and y_g = h(x_g; y0, e_g) with the same h for all rows.

    Cost: the flow of the globals once, and that of the rows for all rows at once, in both directions.
    """

    domain = codomain = REAL_VECTOR
    flow = Held()

    def __init__(self, flow: BlockFlow, cache_size: int = 1) -> None:
        super().__init__(cache_size)
        self.flow = flow  # type: ignore[assignment]

    def watched(self) -> Sequence[Tensor]:
        return held_tensors(self)

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        every, rows = self.flow.layout.split(x)
        of_all, total = self.flow.transform_of_all(), x.new_zeros(x.shape[:-1])
        if of_all is not None:
            every, total = of_all.call_and_ladj(every)
        rows, ladj = self.flow.transform_of_rows(every).call_and_ladj(rows)
        return self.flow.layout.joined(every, rows), total + sum_rightmost(ladj, 1)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        every, rows = self.flow.layout.split(y)
        of_all, total = self.flow.transform_of_all(), y.new_zeros(y.shape[:-1])
        rows, ladj = self.flow.transform_of_rows(every).inverse_and_ladj(rows)
        if of_all is not None:
            every, total = of_all.inverse_and_ladj(every)
        return self.flow.layout.joined(every, rows), total + sum_rightmost(ladj, 1)


class BlockFlow(nn.Module):
    """A module whose call returns a :class:`RowsGivenAll` transform, made of the transforms of two flows.

    Each row has a learned embedding e_g, which is 0 at first.

    Args:
        layout: the order of the D numbers.
        recipe: called as ``recipe(G0, **options)`` and ``recipe(d, context=C, **options)`` for flows over the reals from
            standard normal bases.
        options: keyword arguments of the recipe.

    Raises:
        TypeError: if the recipe does not return a flow.
        ValueError: if it returns a flow of another kind.
    """

    context = 0

    def __init__(self, layout: Layout, recipe: Callable[..., Flow], options: dict[str, Any]) -> None:
        super().__init__()
        self.layout = layout
        recipe = partial(iaf, hidden=HIDDEN) if recipe is iaf else recipe
        context = layout.of_all + EMBEDDING
        self.of_all = recipe(layout.of_all, **options) if layout.of_all else None
        self.of_rows = recipe(layout.of_row, context=context, **options)
        self.embedding = nn.Parameter(torch.zeros(layout.rows, EMBEDDING))
        if self.of_all is not None:
            _check(self.of_all, layout.of_all, 0)
        _check(self.of_rows, layout.of_row, context)

    def transform_of_all(self) -> Chain | None:
        """Returns the transform of the globals."""
        return None if self.of_all is None else Chain(self.of_all.parts(None, None)[1])

    def transform_of_rows(self, every: Tensor) -> Chain:
        """Returns the transform of the rows (..., G, d), given the globals (..., G0)."""
        batch = *every.shape[:-1], self.layout.rows
        given = every.unsqueeze(-2).expand(*batch, -1), self.embedding.expand(*batch, -1)
        return Chain(self.of_rows.parts(torch.cat(given, -1), None)[1])

    def forward(self) -> RowsGivenAll:
        return RowsGivenAll(self)


def _check(flow: Any, size: int, context: int) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(f"Expected recipe to return a Flow; got {type(flow).__name__}.")
    if flow.context != context:
        raise ValueError(f"Expected recipe to return a flow with context={context}; got context={flow.context}.")
    one: Any = flow(zeros_for(flow, context)) if context else flow()
    if one.event_shape != (size,) or one.batch_shape or not over_reals(one):
        raise ValueError(
            f"Expected recipe to return a flow over {size} real numbers; got event_shape {tuple(one.event_shape)}, "
            f"batch_shape {tuple(one.batch_shape)} and support {one.support}."
        )
    base: Any = one.base_dist
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if not (isinstance(base, torch.distributions.Normal) and not base.loc.any() and (base.scale == 1).all()):
        raise ValueError(f"Expected a recipe with a standard normal base (blocks require it); got {base}.")
