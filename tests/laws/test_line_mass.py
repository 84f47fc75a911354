"""The mass of flows on one axis, with parameters multiplied by ten, to seven digits."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import testing
from support import registry
from support.values import sized

ONE_FEATURE = [name for name in registry.DISTRIBUTIONS if "one feature" in name]
ONE_FEATURE.remove(
    "umnn inverse one feature"
)  # slow; tests/flows/test_recipes.py integrates it, with parameters scaled too


@pytest.mark.parametrize("name", ONE_FEATURE)
def test_flows_of_one_feature(name):
    testing.line_mass(*registry.DISTRIBUTIONS[name]())


def test_bijections_of_heads(head, device):
    """A base pushed through the inverse, whose density takes the bijection forwards."""
    if head.site_shape:
        return testing.line_mass(dist.Normal(sized(2), 1.0))
    like = next(head.parameters(), torch.empty(0, dtype=torch.float64, device=device))
    t = head(7 * sized(1, 1, head.num_params).to(like))
    base = dist.Normal(like.new_zeros(1, 1), like.new_ones(1, 1))
    if t.domain is not constraints.real:
        base = dist.Uniform(base.loc + t.domain.lower_bound, base.loc + t.domain.upper_bound)
    testing.line_mass(dist.TransformedDistribution(base, [t.inv]))


class Density(dist.Normal):
    """Normal, unless a subclass breaks it."""

    def __init__(self, scale=1.0):
        super().__init__(sized(3, 1), torch.full((3, 1), scale, dtype=torch.float64))


class TooMuch(Density):
    def log_prob(self, value):
        return super().log_prob(value) + 3e-6


class WithAGap(Density):
    """As of a bijection that jumps: the mass of the jump is missing."""

    def log_prob(self, value):
        return super().log_prob(value + 1e-5 * (value > 0.3))


class Spikes(Density):
    """Changes faster than any quadrature can follow."""

    def log_prob(self, value):
        return super().log_prob(value) + (1e9 * value).sin()


def test_line_mass_of_extreme_scales():
    for scale in (1e-6, 1.0, 1e8):
        testing.line_mass(Density(scale))
    parts = [dist.Normal(torch.tensor(m).double(), s) for m, s in ((-4e3, 1e-4), (0.0, 3.0), (2e5, 1e5))]
    testing.line_mass(gx.distributions.Mixture(sized(3), parts))


@pytest.mark.parametrize(
    ("double", "message"),
    [
        (TooMuch, r"line mass broken \[total, row 0\]: 1.000003, not 1"),
        (WithAGap, r"line mass broken \[total, row 0\]: 0.99999"),
        (Spikes, r"line mass broken \[quadrature\]: an error of "),
    ],
)
def test_line_mass_has_power(double, message):
    with pytest.raises(AssertionError, match=message):
        testing.line_mass(double())


def test_line_mass_multiplies_the_parameters():
    class Model(gx.DistributionModule):
        def __init__(self):
            super().__init__()
            self.excess = torch.nn.Parameter(torch.tensor(1e-7, dtype=torch.float64))

        def forward(self, context=None):
            return TooMuch(1.0) if self.excess > 5e-7 else Density(1.0)

    testing.line_mass(Model(), factor=2.0)
    with pytest.raises(AssertionError, match="line mass broken"):
        testing.line_mass(Model(), factor=10.0)


def test_line_mass_of_two_numbers():
    with pytest.raises(ValueError, match=r"Expected a distribution of one number; got .* \(2,\)"):
        testing.line_mass(dist.Normal(sized(2), 1.0).to_event(1))
