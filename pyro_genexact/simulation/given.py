"""The inputs of a learned likelihood as one vector, and the support of its items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from ..core.functional import at_hand, checkable
from ..core.leaves import map_leaves, tensors_in
from ..families.supports import innermost
from .columns import CATEGORIES
from .latent_space import Group, Latent
from .simulations import is_deterministic

ROWS = 100_000  # that set the standardisation of the inputs


class Given(nn.Module):
    """Encodes latents as one standardised vector.

    Discrete latents become one-hot vectors. Continuous ones are mapped to real numbers; those on an interval are also kept as they
    are. Shift and scale come from quantiles, since priors may have heavy tails.

    Args:
        latents: the latents.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, latents: Sequence[Latent]) -> None:
        super().__init__()
        self.latents = list(latents)
        self.features: int = sum(_width(x) for x in self.latents)
        self.register_buffer("shift", torch.zeros(self.features))
        self.register_buffer("scale", torch.ones(self.features))

    def forward(self, values: Mapping[str, Any]) -> Tensor:
        """Returns the features (*batch, F) of values (*batch, ...) by name, whose batch shapes are broadcast.

        Raises:
            ValueError: if a value is outside the support, NaN or infinite, and Pyro validates. Otherwise, its features are NaN.
        """
        return (self._raw(values) - self.shift) / self.scale

    def _raw(self, values: Mapping[str, Any]) -> Tensor:
        parts = []
        for x in self.latents:
            value = x.flat(torch.as_tensor(values[x.name], device=self.shift.device), 1, self.shift.dtype).squeeze(-2)
            if x.values is not None:
                parts.append(Group([x]).encoded(value))
                continue
            real, value = _in_reals(x, value)
            parts.append(real)
            if _is_bounded(x):
                parts.append(value)
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch, -1) for part in parts], -1)

    @torch.no_grad()
    def standardise(self, values: Mapping[str, Tensor]) -> None:
        """Sets shift and scale by N rows (N, ...) of each latent."""
        raw = self._raw({name: value[:: -(-len(value) // ROWS)] for name, value in values.items()}).double()
        low, middle, high = raw.quantile(torch.tensor([0.16, 0.5, 0.84]).to(raw), 0)
        scale = torch.where(high > low, (high - low) / 2, raw.std(0, correction=0))
        self.shift.copy_(middle)
        self.scale.copy_(torch.where(scale > 1e-6 * raw.abs().amax(0), scale, 1.0))


def _in_reals(latent: Latent, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values (*batch, size) as real numbers, and the values; NaN for both outside the support.

    Values on the boundary, to which those in the interior may round, are moved inwards by eps.
    """
    group, support = Group([latent]), latent.onto.support
    real, ladj = group.to_real(value)
    inside = ladj.isfinite()
    if at_hand(value) and torch._C._get_tracing_state() is None and inside.all():
        return real, value
    inner = group.from_real(torch.zeros_like(real))[0]
    moved = torch.where(inside.unsqueeze(-1), value, value.lerp(inner, torch.finfo(value.dtype).eps))
    real, ladj = group.to_real(moved)
    inside = ladj.isfinite()
    if checkable(value) and Distribution._validate_args and not inside.all():
        raise ValueError(
            f"Expected values of {latent.name} in the support {innermost(support)}; got {value[~inside][0].tolist()}."
        )
    return torch.where(inside.unsqueeze(-1), real, torch.nan), torch.where(inside.unsqueeze(-1), moved, torch.nan)


def _width(latent: Latent) -> int:
    if latent.values is not None:
        return latent.size * len(latent.values)
    return latent.real_size + (latent.size if _is_bounded(latent) else 0)


def _is_bounded(latent: Latent) -> bool:
    return isinstance(innermost(latent.onto.support), type(constraints.unit_interval))


def input_of(site: Any, again: Any, item: Size) -> Latent:
    """Returns an input as a latent with items of this shape; a real one if its support is not the same in all runs."""
    support = constraints.real if is_deterministic(site) else site["fn"].support
    frame = {"name": site["name"], "value": torch.empty(item), "cond_indep_stack": ()}
    if innermost(support).is_discrete:
        with suppress(ValueError):  # infinite
            found = Latent.of({**frame, "fn": site["fn"]}, None)
            if found.values is not None and len(found.values) <= CATEGORIES:
                return found
        support = constraints.real
    bounds = tensors_in(support)
    if bounds and not _same(bounds, tensors_in(again["fn"].support), item):
        support = constraints.real
    return Latent.of({**frame, "fn": SimpleNamespace(support=support, event_dim=len(item))}, None)


def support_of(site: Any, again: Any, item: Size) -> Any:
    """Returns the support of one item."""
    if is_deterministic(site):
        return constraints.real
    support = site["fn"].support
    bounds = tensors_in(support)
    if bounds and all((t == t.flatten()[0]).all() for t in bounds):
        support, bounds = map_leaves(lambda t: t.flatten()[0], support), [t.flatten()[0] for t in bounds]
        others = [t.flatten()[0] for t in tensors_in(again["fn"].support)]
    else:
        others = tensors_in(again["fn"].support)
    if not _same(bounds, others, item):
        raise ValueError(
            f"Expected support= for {site['name']!r}, since its own differs between runs or rows; got {support}."
        )
    return support


def _same(bounds: Sequence[Tensor], others: Sequence[Tensor], item: Size) -> bool:
    return all(
        a.shape == b.shape and a.dim() <= len(item) and bool((a == b).all())
        for a, b in zip(bounds, others, strict=True)
    )
