"""Prefixes: transforms of padded sequences, which act on the first sites of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import AffineTransform, ComposeTransform, IndependentTransform, Transform, constraints
from torch.distributions.transforms import _InverseTransform

from ..core.compiling import dispatched
from ..core.independent import REAL_VECTOR, independent
from ..core.lengths import checked_integers, checked_lengths, filled_constraint, present, zero_padding
from ..core.shapes import broadcast_shapes, sum_rightmost
from .affine import Affine
from .base import Bijection, Chain, RememberingTransform, adapted
from .linear import Standardize
from .support import ToSupport


class Prefixes(Chain):
    """Composition of transforms that acts on the first n sites of each row, as if T were n.

    Sites from a row's length on are padding in both directions: their values are ignored, their gradients are zero,
    their images are 0, and log|det dy/dx| is that of the first n sites.

    The first n outputs of each part must depend only on the first n inputs. This holds for autoregressive and
    elementwise transforms and for supports of scalars. :class:`Reverse` is also supported; here it reverses the first n
    sites of each row. A transform of your own can define a method ``on_prefixes(lengths)`` that returns the transform
    of prefixes.

    Args:
        parts: one or more transforms of vectors (*batch, T), applied first to last.
        lengths: integers (*batch) in 0 ... T; values broadcast with them.
        cache_size: 1 to cache the last call, 0 for no cache.

    Raises:
        TypeError: if ``lengths`` is not a tensor of integers.
        ValueError: if a part mixes all sites, as linear maps, couplings, permutations and a simplex do. In calls, for
            lengths outside 0 ... T.

    Example:
        >>> import torch
        >>> from pyro_genexact.transforms import Reverse
        >>> Prefixes([Reverse()], torch.tensor([3, 2]))(torch.tensor([10.0, 11.0, 12.0]))
        tensor([[12., 11., 10.],
                [11., 10.,  0.]])
    """

    def __init__(self, parts: Sequence[Transform], lengths: Tensor, cache_size: int = 1) -> None:
        lengths = checked_integers("lengths", lengths)
        super().__init__([on_prefixes(part, lengths) for part in parts], cache_size=cache_size)
        self.lengths = lengths

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super()._call_and_ladj(self._zeroed(x))

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return super()._inverse_and_ladj(self._zeroed(y))

    def _zeroed(self, value: Tensor) -> Tensor:
        return zero_padding(value, checked_lengths(self.lengths, value.shape[-1]))


def on_prefixes(transform: Transform, lengths: Tensor) -> Transform:
    """Returns the transform of the first sites of each row; raises a ValueError if it mixes all sites."""
    if isinstance(transform, _InverseTransform):
        return on_prefixes(transform.inv, lengths).inv
    if isinstance(transform, (Chain, ComposeTransform)) and transform.parts:
        return Prefixes(transform.parts, lengths)
    if hasattr(transform, "on_prefixes"):
        made: Transform = transform.on_prefixes(lengths)
        return made
    of_numbers = of_sites(transform)
    if not _is_elementwise(transform, of_numbers):
        raise ValueError(
            "Expected autoregressive or elementwise transforms, Reverse, or ToSupport of scalars (lengths require it); "
            f"got {type(getattr(transform, 'bijection', transform)).__name__}."
        )
    return Elementwise(adapted(transform), of_numbers, lengths)


class Elementwise(RememberingTransform):
    """Applies an elementwise transform to the first sites of each row.

    Args:
        transform: the transform of vectors or scalars.
        of_numbers: the same transform with scalar events, which gives the log-derivative of each site.
        lengths: integers (*batch).
        cache_size: 1 to cache the last call, 0 for no cache.
    """

    def __init__(self, transform: Bijection, of_numbers: Transform, lengths: Tensor, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.transform, self.of_numbers, self.lengths = transform, of_numbers, lengths

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return filled_constraint(self._zeroed, REAL_VECTOR)  # type: ignore[no-any-return]

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        codomain: Any = self.transform.codomain
        return filled_constraint(self._filled, independent(codomain, 0 if codomain.event_dim else 1))  # type: ignore[no-any-return]

    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._zeroed(x)
        y, total = self.transform.call_and_ladj(x)
        return self._zeroed(y), self._ladj(x, y, total)

    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self._filled(y)
        x, total = self.transform.inverse_and_ladj(y)
        return self._zeroed(x), -self._ladj(x, y, -total)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        shape = self.transform.forward_shape(shape)
        return broadcast_shapes(shape[:-1], self.lengths.shape) + shape[-1:]

    def _zeroed(self, value: Tensor) -> Tensor:
        return zero_padding(value, self.lengths)

    def _filled(self, y: Tensor) -> Tensor:
        """Fills the padding with the image of 0."""
        with torch.no_grad():
            filler = self.transform.call_and_ladj(y.new_zeros(y.shape[-1:]))[0]
        return torch.where(present(self.lengths, y), y, filler)

    def _ladj(self, x: Tensor, y: Tensor, total: Tensor) -> Tensor:
        """Sums the log-derivatives of the sites; returns ``total`` where it is not finite (values outside the support)."""
        ladj = self._zeroed(self.of_numbers.log_abs_det_jacobian(x, y)).sum(-1)
        total = sum_rightmost(total, 1 - self.transform.domain.event_dim)
        return torch.where(total.isfinite(), ladj, total)


@dispatched
def of_sites(transform: Any) -> Any:
    """Returns the scalar version of an elementwise transform; by default the transform itself."""
    return transform


of_sites.register(ToSupport, lambda t: t.bijection)
of_sites.register(IndependentTransform, lambda t: t.base_transform)
of_sites.register(Affine, lambda t: Affine(t.shift, t.log_scale))
of_sites.register(AffineTransform, lambda t: AffineTransform(t.loc, t.scale))
of_sites.register(Standardize, lambda t: Affine(-t.shift / t.scale, -t.scale.log()))


def _is_elementwise(transform: Any, of_numbers: Any) -> bool:
    """Returns whether a transform of real vectors applies ``of_numbers`` to each element."""
    dims = transform.domain.event_dim, of_numbers.domain.event_dim, of_numbers.codomain.event_dim
    return dims in ((0, 0, 0), (1, 0, 0)) and _is_real(of_numbers.domain)


def _is_real(domain: Any) -> bool:
    """Returns whether a domain of scalars, or each part of a ``cat`` domain, is the reals."""
    return all(part is constraints.real for part in getattr(domain, "cseq", [domain]))
