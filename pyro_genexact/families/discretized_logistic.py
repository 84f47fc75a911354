"""The logistic distribution discretised to the integers 0 ... levels - 1."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from ..core.checks import check_sizes
from ..core.values import checked_value
from .enumeration import ByEnumeration, in_batch
from .in_support import contains
from .parametrised import Parametrised


class DiscretizedLogistic(ByEnumeration, Parametrised, TorchDistribution):
    """A logistic variable rounded to the nearest of the integers 0 ... L - 1, which represent L points from -1 to 1.

    With sigma the logistic function, c = (loc + 1) (L - 1) / 2 and r = scale (L - 1) / 2,

        P(y) = sigma((y + 1/2 - c) / r) - sigma((y - 1/2 - c) / r).

    The first cell extends to minus infinity and the last one to plus infinity, so the total mass is 1. The logarithm is
    computed as log sigma(b) + log sigma(-a) + log(1 - exp(a - b)) for a cell (a, b), which is also accurate in the far
    tails.

    Args:
        loc: (*batch) locations, on the scale where the levels span -1 ... 1.
        scale: (*batch) positive scales, in the same units.
        levels: L, at least 2.

    Raises:
        ValueError: if ``levels`` is below 2.

    Reference: Salimans, Karpathy, Chen, Kingma, "PixelCNN++", ICLR 2017.

    Example:
        >>> import torch
        >>> d = DiscretizedLogistic(torch.tensor(0.0), torch.tensor(0.5), levels=4)
        >>> d.log_prob(d.enumerate_support()).exp()
        tensor([0.2086, 0.2914, 0.2914, 0.2086])
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    has_enumerate_support = True

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, levels: int, validate_args: bool | None = None
    ) -> None:
        check_sizes(2, levels=levels)
        self.levels = levels
        if not (isinstance(loc, Tensor) and isinstance(scale, Tensor) and loc.shape == scale.shape):  # saves time
            loc, scale = broadcast_all(loc, scale)
        self.loc, self.scale = loc, scale
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.integer_interval(0, self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log-probability of the value in nats, (*sample, *batch)."""
        value = checked_value(self, value)
        inside = contains(self.support, value)
        value = torch.where(inside, value, 0)
        center, spread = self._in_levels()
        first, last = value == 0, value == self.levels - 1
        above = logsigmoid((value + 0.5 - center) / spread).masked_fill(last, 0.0)
        below = logsigmoid((center - value + 0.5) / spread).masked_fill(first, 0.0)
        width = (-torch.expm1(-1 / spread)).log().masked_fill(first | last, 0.0)
        return (above + below + width).masked_fill(~inside, -torch.inf)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws exact samples (*sample, *batch), in the dtype of ``loc``."""
        with torch.no_grad():
            center, spread = self._in_levels()
            noise = torch.rand((*sample_shape, *self.batch_shape), dtype=center.dtype, device=center.device).logit()
            return (center + spread * noise).round().clamp(0, self.levels - 1)

    def cdf(self, value: Tensor) -> Tensor:
        """Returns P(y <= value) for any real value, also between and beyond the levels."""
        center, spread = self._in_levels()
        level = value.floor()
        cdf = torch.sigmoid((level + 0.5 - center) / spread)
        return cdf.masked_fill(level < 0, 0.0).masked_fill(level >= self.levels - 1, 1.0)

    def icdf(self, value: Tensor) -> Tensor:
        """Returns the smallest level whose cdf is at least ``value``, a probability."""
        center, spread = self._in_levels()
        return (center + spread * torch.logit(value) - 0.5).ceil().clamp(0, self.levels - 1)

    @property
    def variance(self) -> Tensor:
        values = self.enumerate_support()
        return (self.log_prob(values).exp() * (values - self.mean).square()).sum(0)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Returns the levels 0 ... L - 1, of shape (L, *batch), or (L, 1, ...) without ``expand``."""
        values = torch.arange(self.levels, dtype=self.loc.dtype, device=self.loc.device)
        return in_batch(values, self, expand)

    def _in_levels(self) -> tuple[Tensor, Tensor]:
        """Returns location and scale in units of one level, in which the ends y ± 1/2 of the cells are exact."""
        half = (self.levels - 1) / 2
        return (self.loc + 1) * half, self.scale * half
