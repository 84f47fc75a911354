"""What torch and Pyro ask of distributions: each quantity, or a NotImplementedError."""

import copy

import pyro.distributions as dist
import pytest

from pyro_genexact import distributions, testing
from pyro_genexact.families.in_support import with_support
from support.families import HEADS
from support.values import sized

FAMILIES = copy.deepcopy(HEADS)


def phi(head):
    return (0.5 * sized(2, 4, head.num_params)).requires_grad_()


def of_family(name):
    """As `Conditional` returns it."""
    head = FAMILIES[name].double()
    return with_support(head(phi(head)), head.support)


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


def test_settable(distribution):
    testing.settable(*distribution)


def test_inferred_shapes(distribution):
    testing.inferred_shapes(*distribution)


@pytest.mark.parametrize("law", [testing.settable, testing.inferred_shapes])
def test_protocol_of_heads(law, distribution_head, device):
    d = distribution_head(phi(distribution_head).to(device))
    law(d if type(d).__module__.startswith("pyro_genexact") else with_support(d, distribution_head.support))


@pytest.mark.parametrize("law", [testing.settable, testing.inferred_shapes])
@pytest.mark.parametrize("name", FAMILIES)
def test_protocol_of_families(name, law):
    law(of_family(name))


@pytest.mark.parametrize("name", ["ContinuousCategorical", "RelaxedOneHotCategorical", "VonMises3D"])
def test_inferred_shapes_of_vectors(name):
    kind = getattr(distributions, name, None) or type(of_family(name))
    parameter = "concentration" if name == "VonMises3D" else "logits"
    assert kind.infer_shapes(**{parameter: (2, 1, 3)}) == ((2, 1), (3,))
    if name == "RelaxedOneHotCategorical":
        assert kind.infer_shapes(temperature=(5,), probs=(2, 1, 3)) == ((2, 5), (3,))


class PlainProperty(dist.Normal):
    @property
    def has_rsample(self):
        return True


class Shared(dist.Normal):
    def has_rsample_(self, value):
        type(self).has_rsample = value
        return self


class ReturnsNothing(dist.Normal):
    def has_rsample_(self, value):
        self.has_rsample = value


class Ignored(dist.Normal):
    def __call__(self, sample_shape=()):
        return self.rsample(sample_shape)


class PropertyOfSupport(dist.Normal):
    @property
    def support(self):
        return dist.constraints.real


class NotOfTheClass(dist.Normal):
    @dist.constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return dist.constraints.real

    @classmethod
    def infer_shapes(cls, **arg_shapes):
        raise NotImplementedError


class WithoutBroadcasting(dist.Normal):
    @classmethod
    def infer_shapes(cls, **arg_shapes):
        return arg_shapes["loc"][1:], arg_shapes["loc"][:0]


@pytest.mark.parametrize(
    ("law", "double", "message"),
    [
        (testing.settable, PlainProperty, r"settable broken \[has_rsample_\(True\)\]: property .* has no setter"),
        (testing.settable, Shared, r"settable broken \[has_rsample of another distribution\]: False, not True"),
        (testing.settable, ReturnsNothing, r"settable broken \[has_rsample_\(True\)\]: returns another object"),
        (testing.settable, Ignored, r"settable broken \[gradient of a draw at a site, alone\]: True, not False"),
        (testing.inferred_shapes, PropertyOfSupport, r"shapes broken \[support of the class\]: property, not a con"),
        (testing.inferred_shapes, NotOfTheClass, r"shapes broken \[parameters \['loc', 'scale'\]\]: not implemented"),
        (testing.inferred_shapes, WithoutBroadcasting, r"shapes broken \[parameters .*\]: \(torch.Size\(\[3\]\), "),
    ],
)
def test_laws_of_the_protocol_have_power(law, double, message):
    loc = Z.clone().requires_grad_()
    law(dist.Normal(loc, 1.0))
    with pytest.raises(AssertionError, match=message):
        law(double(loc, 1.0))
