"""Modules emptied of their numbers, and loaded."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import heads, testing
from pyro_genexact.base import Constant
from pyro_genexact.conditioners import MADE
from pyro_genexact.testing import conditioner_inputs, made
from pyro_genexact.transforms import Standardize
from support.values import built, sized


def test_conditioner(conditioner):
    inputs = conditioner_inputs(conditioner)
    testing.reloading(conditioner, lambda net: net(*inputs))


def test_head(head, device):
    phi = torch.ones(2, 3, head.num_params, dtype=torch.float64, device=device)
    testing.reloading(head, lambda h: h(phi)(phi.new_ones(2, 3, *head.site_shape)))


def test_distribution_head(distribution_head, device):
    like = next((t for t in distribution_head.parameters()), torch.empty(0, dtype=torch.float64, device=device))
    phi = like.new_zeros(2, distribution_head.num_sites or 3, distribution_head.num_params)
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


def by_base(tensor):
    return gx.flows.maf(2, base=dist.Normal(tensor, 1.0).to_event(1))


def by_support(tensor):
    return gx.flows.maf(2, support=constraints.greater_than(tensor))


GIVEN = {
    "base": by_base,
    "support": by_support,
    "fixed parameter": lambda t: heads.Parametric(dist.Normal, (2,), loc=t),
    "standardize": lambda t: Standardize(t, torch.ones(2)),
}


@pytest.mark.parametrize("make", GIVEN.values(), ids=GIVEN)
def test_loading_changes_neither_arguments_nor_other_modules(make):
    given = torch.zeros(2)
    one, same, other = make(given), make(given), make(torch.full((2,), 9.0))
    before = {name: t.clone() for name, t in same.state_dict().items()}
    one.load_state_dict(other.state_dict())
    assert torch.equal(given, torch.zeros(2))
    assert all(torch.equal(t, before[name]) for name, t in same.state_dict().items())
    assert any((t == 9).any() for t in one.state_dict().values())


class MaskNotRestored(MADE):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        for layer in self.layers:
            layer._derived.clear()


def test_reloading_has_power():
    y = sized(3, 4)
    with pytest.raises(AssertionError, match=r"reloading broken \[to_empty and load_state_dict\]: nan"):
        testing.reloading(built(MaskNotRestored(4, 2, hidden=(8,))), lambda net: net(y))
