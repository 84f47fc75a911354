"""Transforms as torch and Pyro know them."""

import pytest
import torch
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform, constraints

from pyro_genexact import testing, transforms
from pyro_genexact.transforms import Affine
from support.broken import OntoPositive, WrongInverse
from support.values import sized


def test_conventions(transform):
    testing.conventions(*transform)


def test_as_distribution(transform):
    testing.as_distribution(*transform)


@pytest.mark.parametrize("law", [testing.conventions, testing.as_distribution])
def test_of_heads(head, law, device):
    like = next(head.parameters(), torch.empty(0, dtype=torch.float64, device=device))
    phi = 0.7 * sized(2, 2, head.num_params).to(like)
    with torch.no_grad():  # torch copies no tensors of a graph
        t = head(phi)
    x = sized(2, 2, *head.site_shape, seed=1).to(like)
    law(t, x if t.domain is constraints.real or head.site_shape else 0.9 * t.domain.upper_bound * x.tanh())


def of_torch():
    return AffineTransform(sized(4), -sized(4).exp())


@pytest.mark.parametrize("law", [testing.conventions, testing.as_distribution])
@pytest.mark.parametrize("kind", [of_torch, ExpTransform, SigmoidTransform])
def test_those_of_torch_are_lawful(law, kind):
    law(kind(), sized(3, 4))


def halves():
    return Affine(sized(4), -0.5 * sized(4).exp())


class NoDomain(Affine):
    @property
    def domain(self):
        return constraints.real


class WrongEventDim(Affine):
    domain = constraints.real
    codomain = constraints.real_vector


class NotBijective(Affine):
    bijective = False


class OnlyCalled(Affine):
    def __call__(self, x):
        return super()._call(x)

    def _call(self, x):
        raise NotImplementedError


class OtherInverseMethod(Affine):
    def _inv_call(self, y):
        return super()._inverse(y)

    def _inverse(self, y):
        return super()._inverse(y) + 1e-3


class NoSign(Affine):
    @property
    def sign(self):
        raise NotImplementedError


class WrongSign(Affine):
    sign = -1


class SignOfRotation(Affine):
    """Of the circle."""

    def _call(self, x):
        return (super()._call(x) + torch.pi) % (2 * torch.pi) - torch.pi


class OtherWithCache(Affine):
    def with_cache(self, cache_size=1):
        return (
            Affine(self.shift, self.log_scale)(self.shift) if cache_size > 1 else Affine(self.shift + 1, self.log_scale)
        )


class NewInverse(Affine):
    @property
    def inv(self):
        return Affine(-self.shift * (-self.log_scale).exp(), -self.log_scale)


class KeepsShape(Affine):
    def forward_shape(self, shape):
        return shape


class EqualToAll(Affine):
    def __eq__(self, other):
        return isinstance(other, Affine)


class NeverEqual(Affine):
    def __eq__(self, other):
        return False


class WrongDensity(Affine):
    def with_cache(self, cache_size=1):
        return Affine(self.shift, self.log_scale)

    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 1e-3


class RaisesWithCache(Affine):
    def with_cache(self, cache_size=1):
        raise NotImplementedError("no cache")


class Dependent(Affine):
    domain = constraints.dependent


class OfBlocks(Affine):
    domain = codomain = constraints.independent(constraints.real, 3)


class OtherInverse(Affine):
    @property
    def inv(self):
        return Affine(-self.shift * (-self.log_scale).exp(), -self.log_scale, event_dim=1)


class Sloppy(constraints.Constraint):
    """Of numbers, and checks rows."""

    def check(self, value):
        return (value == value).all(-1)


class ChecksRows(Affine):
    domain = codomain = Sloppy()


class EqualOneWay(Affine):
    def __eq__(self, other):
        return self is other or (isinstance(other, Affine) and id(self) < id(other))


class ClaimsMore(Affine):
    """As if it made two rows of one."""

    def forward_shape(self, shape):
        return torch.Size((2, *shape))

    def inverse_shape(self, shape):
        return shape[1:]


class SharedNoise(Affine):
    def _call(self, x):
        return super()._call(x[:1].expand_as(x) if x.dim() > 2 else x)


@pytest.mark.parametrize(
    ("law", "kind", "message"),
    [
        (testing.conventions, NoDomain, r"domain of the class\]: property, not a constraint"),
        (testing.conventions, WrongEventDim, r"t.inverse_shape, values of its batch\]"),
        (testing.conventions, NotBijective, r"bijective, of t\]: False"),
        (testing.conventions, OnlyCalled, r"_call\]: not implemented"),
        (testing.conventions, OtherInverseMethod, r"_inverse\]: "),
        (testing.conventions, NoSign, r"sign of t\]: not defined"),
        (testing.conventions, WrongSign, r"sign of t\]: -1, not 1"),
        (testing.conventions, SignOfRotation, r"sign of t\]: 1, though it is not monotone"),
        (testing.conventions, OtherWithCache, r"t.with_cache\(0\)\]"),
        (testing.conventions, NewInverse, r"t.with_cache\(0\)\]: inv.inv is another object"),
        (testing.conventions, KeepsShape, r"t.forward_shape, values of one batch dim less\]: \(4,\), not \(3, 4\)"),
        (testing.conventions, NeverEqual, r"t == t\]"),
        (testing.conventions, RaisesWithCache, r"t.with_cache\(0\)\]: no cache"),
        (testing.conventions, Dependent, r"domain of the transform\]: a dependent constraint"),
        (testing.conventions, OfBlocks, r"event dims of the domain\]: 3, of 2 dims"),
        (testing.conventions, OtherInverse, r"domain as that of t.inv\]"),
        (testing.conventions, ChecksRows, r"shape of domain.check\]: \(3,\), not \(3, 4\)"),
        (testing.conventions, OntoPositive, r"codomain\]: value outside"),
        (testing.conventions, EqualOneWay, r"t == u as u == t\]"),
        (testing.as_distribution, ClaimsMore, r"t, .*: shape of sample\]"),
        (testing.as_distribution, SharedNoise, r"t, .*: noise of each row\]: .* twice"),
        (testing.as_distribution, OntoPositive, r"t, .*: support\]: samples outside"),
        (testing.as_distribution, WrongInverse, r"t, .*: icdf\]"),
        (testing.as_distribution, WrongSign, r".*: cdf\]"),
        (testing.as_distribution, WrongDensity, r".*: log_prob\]"),
    ],
)
def test_laws_have_power(law, kind, message):
    with pytest.raises(AssertionError, match=f"{law.__name__.replace('_', ' ')} broken .{message}"):
        law(kind(sized(3, 4), 0.5 * sized(3, 4, seed=1)), sized(3, 4, seed=2))


def test_equal_transforms_have_equal_values():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(sized(4))

        def forward(self):
            return EqualToAll(self.shift, torch.zeros_like(self.shift))

    with pytest.raises(AssertionError, match=r"conventions broken \[values of equal transforms\]"):
        testing.conventions(Module(), sized(3, 4))


def test_equality_is_identity():
    t = Affine(sized(4), sized(4))
    assert t == t and t.inv == t.inv and t != Affine(t.shift, t.log_scale) and t != t.inv
    assert transforms.Chain([t]) != transforms.Chain([t])
    reverse = transforms.Reverse()
    assert reverse == reverse and reverse != transforms.Reverse() and len({reverse, reverse}) == 1
