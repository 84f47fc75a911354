"""A head of every distribution that Pyro exports, parameters for it, and its mass by quadrature."""

from __future__ import annotations

import math

import torch
from torch.distributions import constraints

from pyro_genexact.heads.catalogue import families

ROWS = families()
HEADS = {row.name: row.head for row in ROWS if row.head is not None}
SCALARS = [n for n, h in HEADS.items() if h.site_shape == ()]
DISCRETE = [n for n, h in HEADS.items() if h.support.is_discrete]


def noise(head, *batch, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*batch, head.num_params, generator=generator, dtype=torch.float64)


def ends(support):
    support = support if not isinstance(support, constraints.independent) else support.base_constraint
    low, high = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    return float(low), float(high)


def from_0(n=3001):
    """Nodes and weights for (0, inf), double exponential."""
    t = torch.linspace(-4.6, 4.6, n, dtype=torch.float64)
    x = torch.exp(math.pi / 2 * torch.sinh(t))
    return x, x * math.pi / 2 * torch.cosh(t) * (t[1] - t[0])


def unit(n=3001):
    """Nodes x, their 1 - x, and weights for (0, 1), double exponential."""
    t = torch.linspace(-3.9, 3.9, n, dtype=torch.float64)
    u = math.pi * torch.sinh(t)
    x, rest = torch.sigmoid(u), torch.sigmoid(-u)
    return x, rest, x * rest * math.pi * torch.cosh(t) * (t[1] - t[0])


def mass_above(d, low, high, sign=1):
    """Mass of a scalar distribution of batch (1, 1) between low and high, or from low on to +inf or -inf."""
    if math.isfinite(high):
        x, _, w = unit()
        x, w = low + (high - low) * x, (high - low) * w
        inner = (x > low) & (high - x > 1e-15 * (1 + abs(high)))  # below that the end is a rounding away
        x, w = x[inner], w[inner]
    else:
        x, w = from_0()
        x = low + sign * x
        x, w = x[x != low], w[x != low]
    return float((d.log_prob(x[:, None, None]).exp()[:, 0, 0] * w).nansum())
