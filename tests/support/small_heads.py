"""Small heads written out."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch.distributions import constraints

from pyro_genexact.base import Head


def bounded(raw):
    return (10 * torch.tanh(raw / 10)).exp()


class Normal(Head):
    num_params = 2

    def forward(self, phi, first=0):
        loc, raw = phi.unbind(-1)
        return dist.Normal(loc, bounded(raw), validate_args=False)


class Gamma(Head):
    num_params = 2
    support = constraints.positive

    def forward(self, phi, first=0):
        a, b = bounded(phi).unbind(-1)
        return dist.Gamma(a, b, validate_args=False)


class Poisson(Head):
    num_params = 1
    support = constraints.nonnegative_integer

    def forward(self, phi, first=0):
        return dist.Poisson(bounded(phi.squeeze(-1)), validate_args=False)


class Categorical(Head):
    num_params = 3
    support = constraints.integer_interval(0, 2)

    def forward(self, phi, first=0):
        return dist.Categorical(logits=phi, validate_args=False)


class Angle(Head):
    """Whose family's own support, all reals, is wider than its mass."""

    num_params = 2
    support = constraints.interval(-torch.pi, torch.pi)

    def forward(self, phi, first=0):
        return dist.VonMises(phi[..., 0], bounded(phi[..., 1]), validate_args=False)


class Vector(Head):
    num_params = 4
    site_shape = (2,)
    support = constraints.real_vector

    def forward(self, phi, first=0):
        return dist.Normal(phi[..., :2], bounded(phi[..., 2:]), validate_args=False).to_event(1)


class Shares(Head):
    num_params = 2
    site_shape = (2,)
    support = constraints.simplex

    def forward(self, phi, first=0):
        return dist.Dirichlet(bounded(phi), validate_args=False)
