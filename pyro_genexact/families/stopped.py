"""The distribution of a value and a flag that marks the last site of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid

from ..core.functional import checkable
from ..core.shapes import broadcast_shapes
from ..core.values import checked_value
from .in_support import contains, feasible_point, log_prob_everywhere
from .parametrised import Parametrised


class Stopped(Parametrised, TorchDistribution):
    """Vectors (k + 1,) of a value and an independent flag, 1 with probability sigmoid(stop_logits) and else 0.

    A flag of 1 marks the last site of a sequence.

    Args:
        inner: the distribution (*batch) of values, which are scalars (k = 1) or vectors (k,).
        stop_logits: (*batch) logits of the flag; -inf for a flag that is always 0.
        inner_support: a replacement for the support of ``inner``, if that is wider than the set with positive mass
            (``VonMises``).

    Raises:
        TypeError: if ``inner`` is not a distribution.
        ValueError: if the values of ``inner`` are neither scalars nor vectors, or integers that the dtype of the flag
            cannot represent; with validation, if a value is outside the support.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> d = Stopped(dist.Normal(torch.zeros(5), 1.0), torch.zeros(5))
        >>> d.sample().shape, d.support.check(torch.tensor([[-1.3, 1.0], [2.0, 0.5]]))
        (torch.Size([5, 2]), tensor([ True, False]))
    """

    arg_constraints = {"stop_logits": constraints.real}
    has_rsample = False  # the flag is discrete

    def __init__(
        self, inner: Any, stop_logits: Tensor, inner_support: Any = None, validate_args: bool | None = None
    ) -> None:
        if not isinstance(inner, Distribution):
            raise TypeError(f"Expected inner to be a distribution; got {type(inner).__name__}.")
        if len(inner.event_shape) > 1:
            raise ValueError(f"Expected inner.event_shape to be () or (k,); got {tuple(inner.event_shape)}.")
        _check_range(inner.support if inner_support is None else inner_support, stop_logits.dtype)
        batch = broadcast_shapes(inner.batch_shape, stop_logits.shape)
        self.inner = inner if inner.batch_shape == batch else inner.expand(batch)
        self.stop_logits, self.inner_support = stop_logits.expand(batch), inner_support
        event = (inner.event_shape[0] if inner.event_shape else 1) + 1
        super().__init__(batch, Size([event]), validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return StoppedConstraint(self._support)

    @property
    def _support(self) -> Any:
        return self.inner.support if self.inner_support is None else self.inner_support

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.inner.has_enumerate_support

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of value and flag in nats, (*sample, *batch), -inf outside the support."""
        value = checked_value(self, value)
        inner, flag = _parts(value, len(self.inner.event_shape))
        log_prob = log_prob_everywhere(self.inner, inner, self._support)
        of_flag = logsigmoid(torch.where(flag == 1, self.stop_logits, -self.stop_logits))
        inside = ((flag == 0) | (flag == 1)) & (log_prob > -torch.inf)
        return torch.where(inside, log_prob + of_flag, -torch.inf)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            stop = torch.sigmoid(self.stop_logits).expand(Size(sample_shape) + self.batch_shape)
            return self._joined(self.inner.sample(Size(sample_shape)), torch.bernoulli(stop))

    def continuing(self) -> tuple[Stopped, Tensor]:
        """Returns the distribution given a flag of 0, and the log-probability (*batch) of this flag."""
        never = torch.full_like(self.stop_logits, -torch.inf)
        return Stopped(self.inner, never, self.inner_support, self._validate_args), logsigmoid(-self.stop_logits)

    @property
    def mean(self) -> Tensor:
        return self._joined(self.inner.mean, torch.sigmoid(self.stop_logits))

    @property
    def variance(self) -> Tensor:
        return self._joined(self.inner.variance, torch.sigmoid(self.stop_logits) * torch.sigmoid(-self.stop_logits))

    @property
    def mode(self) -> Tensor:
        return self._joined(self.inner.mode, (self.stop_logits > 0).to(self.stop_logits))

    def entropy(self) -> Tensor:
        """Returns the entropy of value and flag in nats, (*batch)."""
        info = torch.finfo(self.stop_logits.dtype)
        logits = self.stop_logits.clamp(info.min, info.max)  # 0 log 0 = 0
        of_flag = sum(torch.sigmoid(z) * logsigmoid(z) for z in (logits, -logits))
        return self.inner.entropy() - of_flag

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns the 2N pairs of values and flags, (2N, *batch, k + 1), with batch dims of 1 without ``expand``.

        The flag varies fastest.
        """
        values = self.inner.enumerate_support(expand).repeat_interleave(2, 0)
        flag = torch.arange(len(values), device=values.device) % 2
        return self._joined(values, flag.reshape(-1, *[1] * len(self.batch_shape)))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Stopped:
        new: Stopped = super().expand(batch_shape, _instance)
        new.inner = self.inner.expand(new.batch_shape)
        return new

    def _joined(self, value: Tensor, flag: Tensor) -> Tensor:
        value = value if self.inner.event_shape else value.unsqueeze(-1)
        flag = flag.expand(value.shape[:-1]).unsqueeze(-1)
        return torch.cat([value.to(self.stop_logits.dtype), flag.to(self.stop_logits.dtype)], -1)


class StoppedConstraint(constraints.Constraint):
    """The constraint of vectors (k + 1,) of a finite value that satisfies ``inner`` and a flag 0 or 1.

    Args:
        inner: the constraint of the value.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> y = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [torch.inf, 0.0]])
        >>> StoppedConstraint(constraints.positive).check(y)
        tensor([ True, False, False])
    """

    event_dim = 1

    def __init__(self, inner: Any) -> None:
        self.inner, self.is_discrete = inner, inner.is_discrete

    def check(self, value: Tensor) -> Tensor:
        inner, flag = _parts(value, self.inner.event_dim)
        return contains(self.inner, inner) & ((flag == 0) | (flag == 1))

    def feasible_point(self, like: Tensor) -> Tensor:
        """Returns a value inside with flag 0, of the shape of ``like`` (*batch, k + 1)."""
        inner, flag = _parts(like, self.inner.event_dim)
        value = feasible_point(self.inner, inner).expand_as(inner)
        value = value if self.inner.event_dim else value.unsqueeze(-1)
        return torch.cat([value, torch.zeros_like(flag).unsqueeze(-1)], -1)

    def __repr__(self) -> str:
        return f"StoppedConstraint({self.inner})"


def _check_range(support: Any, dtype: torch.dtype) -> None:
    """Raises a ValueError unless the dtype represents all integers of a bounded support."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    most = int(2 / torch.finfo(dtype).eps)
    for name in ("lower_bound", "upper_bound") if support.is_discrete else ():
        beyond = abs(getattr(support, name, 0)) > most
        if (checkable(beyond) and beyond.any()) if isinstance(beyond, Tensor) else beyond:
            raise ValueError(
                f"Expected integers between -{most} and {most}, which {dtype} (of the flag) represents; got {support}."
            )


def _parts(value: Tensor, event_dim: int) -> tuple[Tensor, Tensor]:
    """Returns the values, (*batch) or (*batch, k), and the flags (*batch)."""
    return value[..., :-1] if event_dim else value[..., 0], value[..., -1]
