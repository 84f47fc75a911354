"""The sequential direction beyond the laws: tied, computed and shared weights, other heads, torch.func, no rows."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.transforms.sequential import solve_in_turn
from support.values import F64

T = 5


class Additive(gx.Head):
    num_params = 2

    def forward(self, phi, first=0):
        return gx.transforms.Affine(phi[..., 0], torch.zeros_like(phi[..., 0]))


class Sharing(gx.Head):
    """Has a parameter of the conditioner too."""

    num_params = 2

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, phi, first=0):
        return gx.transforms.Affine(phi[..., 0] * self.weight[0], phi[..., 1].tanh() + self.weight[1])


def network():
    torch.manual_seed(0)
    net = gx.conditioners.MADE(T, 2, hidden=(8, 8), activation=torch.tanh).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return net


def tied():
    net = network()
    net.layers[1].bias = net.layers[0].bias
    return gx.transforms.AutoregressiveTransform(net, gx.heads.Affine())


def parametrised():
    net = network()
    torch.nn.utils.parametrizations.weight_norm(net.layers[1], "weight")
    return gx.transforms.AutoregressiveTransform(net, gx.heads.Affine())


def additive():
    return gx.transforms.AutoregressiveTransform(network(), Additive())


def sharing():
    net = network()
    return gx.transforms.AutoregressiveTransform(net, Sharing(net.layers[0].bias))


@pytest.mark.parametrize("make", [tied, parametrised, additive, sharing])
def test_sweep_agrees_with_autograd_through_all_sites(make):
    module, y = make(), torch.randn(4, T, dtype=F64)
    parameters = list(module.parameters())

    def gradients(x, ladj):
        return torch.autograd.grad(x.sin().sum() + ladj.sum(), parameters, materialize_grads=True, allow_unused=True)

    t = module()
    x, ladj, _, _ = solve_in_turn(t.conditioner, t.head, y, None)
    expected = gradients(x, ladj)
    assert max(g.abs().max() for g in expected) > 0.1
    for got, want in zip(gradients(*module().inv.call_and_ladj(y)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_hooks_that_a_sweep_would_miss_are_refused():
    net = network()
    net.layers[1].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(RuntimeError, match="without forward pre-hooks"):
        net.start(None, 2)


def test_torch_func_through_the_sequential_direction(monkeypatch):
    # validation reads values, which older versions of vmap refuse
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    flow, y = gx.flows.iaf(3, hidden=(8,)).double(), torch.randn(4, 3, dtype=F64)

    def density(row):
        return flow().log_prob(row)

    leaf = y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(density(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(density))(y), expected)
    torch.testing.assert_close(torch.func.jacfwd(density)(y[0]), expected[0])


@pytest.mark.parametrize("recipe", [gx.flows.maf, gx.flows.iaf])
def test_no_samples(recipe):
    assert recipe(3)().sample((0,)).shape == (0, 3)
    assert recipe(3, context=2)(torch.zeros(4, 2)).rsample((0,)).shape == (0, 4, 3)


@pytest.mark.parametrize(
    "support",
    [
        constraints.independent(constraints.unit_interval, 1),
        constraints.cat([constraints.unit_interval, constraints.real], -1, [1, 1]),
        [constraints.unit_interval, constraints.real],
    ],
)
def test_boundaries_of_wrapped_supports(support):
    d = gx.flows.maf(2, support=support)()
    edge = torch.tensor([1.0, 0.5])
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(edge)
    d._validate_args = False
    assert d.log_prob(edge) == -torch.inf and d.log_prob(torch.tensor([0.5, 0.5])).isfinite()


def test_a_chain_sees_its_parts_change():
    shift = torch.zeros(2)
    chain, x = gx.transforms.Chain([gx.transforms.Affine(shift, torch.zeros(2), 1)]), torch.ones(3, 2)
    assert (chain(x) == 1).all()
    shift.add_(5)
    assert (chain(x) == 6).all()


def test_narrow_layers_reach_the_last_site():
    net = gx.conditioners.MADE(100, 1, hidden=(10, 10))
    y = torch.zeros(1, 100, requires_grad=True)
    for p in net.parameters():
        torch.nn.init.uniform_(p, 0.1, 1.0)
    (read,) = torch.autograd.grad((net(y + 1)[0, -1]).sum(), y)
    assert read[0, 98] > 0 and read[0, 99] == 0


@pytest.mark.parametrize("rows", [torch.full((5000, 1), 3.3), torch.full((7, 2), 0.1)])
def test_constant_columns_are_found_despite_rounding(rows):
    with pytest.raises(ValueError, match="constant values at features"):
        gx.transforms.Standardize.from_data(rows)


@pytest.mark.parametrize("recipe", [gx.flows.maf, gx.flows.iaf])
def test_overflow_is_density_zero_but_nan_stays_nan(recipe, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    flow, y = recipe(2, context=1, hidden=(8,), transforms=1), torch.tensor([[1.0, 2.0], [3e38, -3e38]])
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(30)
    context = torch.zeros(2, 1)
    good, over = flow(context).log_prob(y)
    assert good.isfinite() and over == -torch.inf
    assert flow(context * torch.nan).log_prob(y).isnan().all()
    with torch.no_grad():
        next(flow.parameters()).fill_(torch.nan)
    assert flow(context).log_prob(y)[0].isnan()


def test_an_inverse_under_grad_goes_over_the_sites_once(monkeypatch):
    net, starts = network(), []
    start = gx.conditioners.MADE.start
    monkeypatch.setattr(gx.conditioners.MADE, "start", lambda *given: starts.append(1) or start(*given))
    gx.transforms.AutoregressiveTransform(net, gx.heads.Affine())().inv(torch.randn(3, T, dtype=F64)).sum().backward()
    assert len(starts) == 1
