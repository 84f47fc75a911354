"""Transforms and distributions that several threads share."""

import pytest
import torch

from pyro_genexact import heads, testing
from pyro_genexact.conditioners import MADE
from pyro_genexact.testing import made
from pyro_genexact.transforms import AutoregressiveTransform, ConditionedAutoregressive
from support.values import built, sized


def both_ways(x):
    """Calls of a transform in both directions at x, each with its log-determinant."""

    def run(t):
        y = t(x)
        back = t.inv(z := y.clone())
        return y, t.log_abs_det_jacobian(x, y), back, t.log_abs_det_jacobian(back, z)

    return run


def test_transform(transform):
    subject, x, context = transform
    with torch.no_grad():
        testing.threads(made(subject, context), both_ways(x), both_ways(0.5 * x))


def test_distribution(distribution):
    module, context = distribution
    with torch.no_grad():
        d = made(module, context)
        y, other = d.sample(), d.sample()
        for part in (d, *getattr(d, "transforms", ())):
            testing.threads(part, lambda _: (d.log_prob(y),), lambda _: (d.log_prob(other),))


class ReadsTwice(ConditionedAutoregressive):
    def __call__(self, x):
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        return super().__call__(x)


def test_threads_have_power():
    class Module(AutoregressiveTransform):
        def forward(self, context=None):
            return ReadsTwice(self.conditioner, self.head, context)

    t = built(Module(MADE(3, 2, hidden=(8,)), heads.Affine()))()
    x = sized(3, 3)
    with torch.no_grad(), pytest.raises(AssertionError, match=r"threads broken \[another call before __call__, line"):
        testing.threads(t, lambda t: (t(x), t(x)), lambda t: (t(0.5 * x),))
