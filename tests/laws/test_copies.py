"""Deep copies, pickles and state_dicts, before and after use."""

import pyro.distributions as dist
import pytest
import torch

from pyro_genexact import testing
from pyro_genexact.conditioners import MADE
from pyro_genexact.testing import conditioner_inputs, made
from support.values import Built, built, sized


def test_conditioner(conditioner):
    inputs = conditioner_inputs(conditioner)
    testing.copies(conditioner, lambda net: net(*inputs))


def test_head(head, device):
    phi = torch.ones(2, 3, head.num_params, dtype=torch.float64, device=device)
    testing.copies(head, lambda h: h(phi)(phi.new_ones(2, 3, *head.site_shape)))


def test_transform(transform):
    subject, x, context = transform
    testing.copies(subject, lambda t: made(t, context)(x))
    testing.copies(made(subject, context), lambda t: t(x))


def test_distribution(distribution):
    testing.persistence(*distribution)


class LosesWeights(MADE):
    def __getstate__(self):
        return testing.redraw(MADE(4, 2, hidden=(8,)).double(), 5).__dict__


def test_copies_has_power():
    y = sized(3, 4)
    with pytest.raises(AssertionError, match=r"copies broken \[deepcopy before use\]"):
        testing.copies(built(LosesWeights(4, 2, hidden=(8,))), lambda net: net(y))


class NotSaved(Built):
    """The scale is no parameter."""

    def __init__(self):
        super().__init__(dist.Normal, loc=sized(1))
        self.scale = torch.ones(1, dtype=torch.float64)

    def forward(self):
        return self.make(self.values["loc"], self.scale).to_event(1)

    def __deepcopy__(self, memo):
        new = NotSaved()
        new.scale = 2 * self.scale
        return new


def test_persistence_has_power():
    with pytest.raises(AssertionError, match=r"persistence broken \[state_dict\]"):
        testing.persistence(NotSaved())
