"""Modules emptied of their numbers, and loaded."""

import pyro.distributions as dist
import pytest
import torch
from registry import built, sized
from torch import nn

from pyro_genexact import testing
from pyro_genexact.base import Constant
from pyro_genexact.conditioners import MADE
from pyro_genexact.testing import conditioner_inputs, made


def test_conditioner(conditioner):
    inputs = conditioner_inputs(conditioner)
    testing.reloading(conditioner, lambda net: net(*inputs))


def test_head(head, device):
    phi = torch.ones(2, 3, head.num_params, dtype=torch.float64, device=device)
    testing.reloading(head, lambda h: h(phi)(phi.new_ones(2, 3, *head.site_shape)))


def test_distribution_head(distribution_head, device):
    like = next((t for t in distribution_head.parameters()), torch.empty(0, dtype=torch.float64, device=device))
    phi = like.new_zeros(2, getattr(distribution_head, "num_sites", 3), distribution_head.num_params)
    y = distribution_head(phi).sample()
    testing.reloading(distribution_head, lambda h: h(phi).log_prob(y))


def test_transform(transform):
    subject, x, context = transform
    if isinstance(subject, nn.Module):
        testing.reloading(subject, lambda t: made(t, context)(x))


def test_distribution(distribution):
    module, context = distribution
    y = made(module, context).sample((2,))
    testing.reloading(module, lambda m: made(m, context).log_prob(y))


def test_a_module_made_on_meta_is_whole_once_loaded():
    net = MADE(4, 2, hidden=(8,))
    with torch.device("meta"):
        other = MADE(4, 2, hidden=(8,))
    other.to_empty(device="cpu").load_state_dict(net.state_dict())
    y = torch.randn(3, 4)
    assert torch.equal(net(y), other(y))


def test_states_hold_no_masks_and_what_users_gave():
    assert all("mask" not in name for name in MADE(4, 2).state_dict())
    one, other = (Constant(dist.Normal(torch.full((2,), loc), 1.0)) for loc in (1.0, 2.0))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other().loc, one().loc)


class MaskNotRestored(MADE):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        for layer in self.layers:
            layer._derived.clear()


def test_reloading_has_power():
    y = sized(3, 4)
    with pytest.raises(AssertionError, match=r"reloading broken \[to_empty and load_state_dict\]: nan"):
        testing.reloading(built(MaskNotRestored(4, 2, hidden=(8,))), lambda net: net(y))
