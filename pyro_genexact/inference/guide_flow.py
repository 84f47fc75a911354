"""The flow of ``AutoFlow``: that of a recipe, tails, and an affine map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..flows.base import Flow, over_reals, standard_normal
from .arrow import Arrow, layout_of
from .blocks import BlockFlow
from .gaussian import Gaussian, Tails
from .low_rank import LowRank


def guide_flow(
    recipe: Callable[..., Flow],
    options: dict[str, Any],
    sites: Sequence[Any],
    loc: Tensor,
    scale: float,
    blocks: str | None,
    rank: int | None,
) -> Flow:
    """Returns the flow over the unconstrained latents.

    Args:
        recipe: as in ``AutoFlow``.
        options: keyword arguments of the recipe.
        sites: the latent sites of a trace.
        loc: the initial location (D,).
        scale: the initial standard deviation.
        blocks: as in ``AutoFlow``.
        rank: as in ``AutoFlow``.
    """
    if blocks is not None:
        layout, order = layout_of(sites, blocks)
        block_flow = BlockFlow(layout, recipe, options)
        return Flow([block_flow, Tails(loc), Arrow(layout, order, loc, scale)], standard_normal(len(loc))).to(loc)
    flow = recipe(len(loc), **options)
    _check(flow, loc)
    last = Gaussian(loc, scale) if rank is None else LowRank(loc, scale, rank)
    return Flow([*flow.transforms, Tails(loc), last], flow.base).to(loc)


def _check(flow: Any, loc: Tensor) -> None:
    if not isinstance(flow, Flow):
        raise TypeError(f"Expected recipe to return a Flow; got {type(flow).__name__}.")
    if flow.context:
        raise ValueError(f"Expected recipe to return a flow without context; got context={flow.context}.")
    one = flow.to(loc)()
    if one.event_shape != loc.shape or one.batch_shape or not over_reals(one):
        raise ValueError(
            f"Expected recipe to return a flow over {len(loc)} real numbers (the model's latents); got event_shape "
            f"{tuple(one.event_shape)}, batch_shape {tuple(one.batch_shape)} and support {one.support}."
        )


def check_plates(site: Any) -> None:
    """Raises a ValueError if a latent is in a plate without size, or in a subsampled one."""
    for frame in site["cond_indep_stack"]:
        if frame.size < 0:
            raise ValueError(
                f"Expected plates of latents to have a size; got {site['name']!r} in plate {frame.name!r}, which has none."
            )
        if frame.full_size not in (None, frame.size):
            raise ValueError(
                f"Expected no latents in subsampled plates; got {site['name']!r} in plate {frame.name!r} with a subsample "
                f"of {frame.size} of {frame.full_size}. guides.Amortized is a guide for such latents."
            )
