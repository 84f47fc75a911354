"""What torch and Pyro ask of distributions: each quantity, or a NotImplementedError."""

import pyro.distributions as dist
import pytest
from registry import sized

from pyro_genexact import distributions, testing
from pyro_genexact.distributions.guard import guarded
from pyro_genexact.heads import table

FAMILIES = {row.name: row.head for row in table.families() if row.head is not None}


def phi(head):
    return 0.5 * sized(2, 4, head.num_params)


def of_family(name):
    """As `Conditional` returns it."""
    head = FAMILIES[name].double()
    return guarded(head(phi(head)), head.support)


def test_quantities(distribution):
    testing.quantities(*distribution)


def test_quantities_of_heads(distribution_head, device):
    testing.quantities(distribution_head(phi(distribution_head).to(device)))


@pytest.mark.parametrize("name", FAMILIES)
def test_quantities_of_families(name):
    testing.quantities(of_family(name))


Z = sized(2, 3)
OTHERS = {
    "PerSite without a cdf": lambda: distributions.PerSite(
        [dist.Poisson(Z.exp()), dist.VonMises(Z, Z.exp())], [[0, 2, 4], [1, 3, 5]]
    ),
    "PerSite of supports of several sizes": lambda: distributions.PerSite(
        [dist.Bernoulli(logits=Z), dist.Categorical(logits=sized(2, 3, 4))], [[0, 2, 4], [1, 3, 5]]
    ),
    "Stopped without moments": lambda: distributions.Stopped(distributions.Stable(Z.exp() / 9, 0 * Z), Z),
    "Mixture without a cdf": lambda: distributions.Mixture(
        sized(2, 3, 2), [dist.VonMises(Z, Z.exp()), dist.Normal(Z, 1.0)]
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_quantities_of_others(name):
    testing.quantities(OTHERS[name]())


class RaisesValueError(dist.Normal):
    @property
    def mode(self):
        raise ValueError("no mode")


class OfEvent(dist.Normal):
    def entropy(self):
        return super().entropy()[0]


class NoRsample(dist.Normal):
    def rsample(self, sample_shape=()):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("double", "message"),
    [
        (RaisesValueError, r"quantities broken \[mode\]: ValueError: no mode"),
        (OfEvent, r"quantities broken \[entropy\]: \(3,\), not \(2, 3\)"),
        (NoRsample, r"quantities broken \[rsample\]: not implemented, though has_rsample is True"),
    ],
)
def test_quantities_have_power(double, message):
    testing.quantities(dist.Normal(Z, 1.0))
    with pytest.raises(AssertionError, match=message):
        testing.quantities(double(Z, 1.0))
