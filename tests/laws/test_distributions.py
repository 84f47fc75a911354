"""Distributions: shapes, support, mass, samples, gradients, extreme values and changes of parameters."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import ExpTransform, constraints

from pyro_genexact import Constant, DistributionModule, flows, testing
from pyro_genexact.testing import made
from pyro_genexact.transforms import ToSupport
from support import registry
from support.values import sized


def test_shapes(distribution):
    testing.shapes(*distribution)


def test_support(distribution, distribution_name):
    outside = registry.OUTSIDE.get(distribution_name)
    testing.support(*distribution, None if outside is None else torch.tensor(outside, dtype=torch.float64))


@pytest.mark.parametrize(
    "distribution_name", [n for n in registry.DISTRIBUTIONS if n not in registry.LARGE + registry.UNLISTED]
)
def test_mass(distribution):
    testing.mass(*distribution)


@pytest.mark.parametrize("distribution_name", [n for n in registry.DISTRIBUTIONS if n not in registry.UNLISTED])
def test_agreement(distribution):
    testing.agreement(*distribution)


def test_gradients(distribution, distribution_name):
    testing.gradients(*distribution, registry.INERT.get(distribution_name, ()))


def test_extremes(distribution):
    testing.extremes(*distribution)


FLOWS = [name for name in registry.DISTRIBUTIONS if name.split()[0] in dir(flows)]
SUPPORTS = [constraints.real, constraints.positive, constraints.less_than(1.0), constraints.unit_interval]


@pytest.mark.parametrize("distribution_name", FLOWS)
def test_saturation(distribution):
    module, context = distribution
    testing.saturation(*distribution)
    shape = made(module, context).base_dist.event_shape
    size = shape.numel() if len(shape) < 2 else tuple(shape)
    for support in SUPPORTS:
        module.transforms[-1] = Constant(ToSupport(support, size))
        testing.saturation(*distribution)


def test_freshness(distribution):
    testing.freshness(*distribution)


class Normal(dist.Normal):
    """Right, until a subclass breaks something."""

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class WrongScale(Normal):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape) * 1.1

    sample = rsample


class WrongMass(Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 0.01


class ExpandMutates(Normal):
    def expand(self, batch_shape, _instance=None):
        new = super().expand(batch_shape)
        self._batch_shape = new._batch_shape
        return new


class SharedNoise(Normal):
    def sample(self, sample_shape=()):
        return super().sample(sample_shape)[..., :1].expand(self._extended_shape(sample_shape))


class Leaks(Normal):
    support = constraints.positive


class NaN(Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 0 * value


class Underflows(Normal):
    def log_prob(self, value):
        return super().log_prob(value).exp().log()


class Model(DistributionModule):
    """A module of one scalar distribution a row."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.loc, self.log_scale = nn.Parameter(sized(3)), nn.Parameter(0.3 * sized(3, seed=1))

    def forward(self, context=None):
        one = self.kind(self.loc[:, None], self.log_scale.exp()[:, None])
        return dist.Independent(one, 1)


def test_right_double_is_lawful():
    model = Model(Normal)
    for law in (testing.shapes, testing.support, testing.mass, testing.agreement, testing.gradients, testing.extremes):
        law(model)
    testing.freshness(model)


@pytest.mark.parametrize(
    ("law", "double", "message"),
    [
        (testing.agreement, WrongScale, r"agreement broken \[(samples|Kolmogorov)"),
        (testing.agreement, WrongMass, r"agreement broken \["),
        (testing.mass, WrongMass, r"mass broken \[total\]: 1.01005.*, not 1"),
        (testing.support, Leaks, r"support broken \[samples inside\]"),
        (testing.support, NaN, r"support broken \[log_prob of .*\]: nan, not -inf"),
        (testing.extremes, Underflows, r"extremes broken \[log_prob at 10000, torch.float64\]: -inf, not finite"),
    ],
)
def test_laws_have_power(law, double, message):
    with pytest.raises(AssertionError, match=message):
        law(Model(double))


def test_shapes_has_power():
    with pytest.raises(AssertionError, match=r"shapes broken \[expand leaves the original\]: \(4, 3\), not \(3,\)"):
        testing.shapes(ExpandMutates(torch.zeros(3), torch.ones(3)))
    with pytest.raises(AssertionError, match=r"shapes broken \[independent rows\]"):
        testing.shapes(SharedNoise(torch.zeros(3), 1.0))


class DropsGradient(Model):
    def forward(self, context=None):
        scale = self.log_scale if self.training else self.log_scale.detach()
        return dist.Independent(self.kind(self.loc[:, None], scale.exp()[:, None]), 1)


class Stale(Model):
    def forward(self, context=None):
        if not hasattr(self, "old"):
            self.old = self.loc.detach().clone()
        return dist.Independent(
            self.kind((self.loc - self.loc.detach() + self.old)[:, None], self.log_scale.exp()[:, None]), 1
        )


def test_gradients_and_freshness_have_power():
    with pytest.raises(
        AssertionError, match=r"gradients broken \[log_prob of log_scale, eval\]: 0, which must not be 0"
    ):
        testing.gradients(DropsGradient(Normal))
    with pytest.raises(AssertionError, match=r"freshness broken \[parameters changed, "):
        testing.freshness(Stale(Normal))


class Overflowing(ExpTransform):
    """Whose values are finite, but not their gradients."""

    def _call(self, x):
        return x.exp().clamp(torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).max)


def test_saturation_has_power():
    module, _ = registry.DISTRIBUTIONS["maf"]()
    module.transforms[-1] = Constant(Overflowing())
    with pytest.raises(AssertionError, match=r"saturation broken \[gradient 0 of draws, base of deviation 60\]"):
        testing.saturation(module)
