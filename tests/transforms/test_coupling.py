"""Coupling layers: against Pyro's, one call of the network each way, masks, contexts and other networks."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import TransformedDistribution

import pyro_genexact as gx
from pyro_genexact import conditioners, heads, transforms
from pyro_genexact.transforms import Coupling
from pyro_genexact.transforms.sequential import solve_in_turn
from support.registry.transforms import cubic
from support.values import built, sized, with_ladj


class Cubic(gx.Head):
    """y = x^3 + x exp(phi), inverted by a root."""

    num_params = 1

    def forward(self, phi, first=0):
        return transforms.Monotone(cubic, [phi])


class BySite(heads.Affine):
    """Site t is shifted by t more."""

    def __init__(self, shifts):
        super().__init__()
        self.shifts = shifts

    def permuted(self, order):
        return BySite(self.shifts[order])

    def forward(self, phi, first=0):
        shift = torch.stack([self.shifts[first : first + phi.shape[-2]], torch.zeros(phi.shape[-2])], -1)
        return super().forward(phi + shift, first)


def test_affine_coupling_is_that_of_pyro():
    module = built(Coupling(5, heads.Affine(), hidden=(7,)))

    def hypernet(x):
        t = module.head(module.parameters_of(x))
        return t.shift, t.log_scale

    other = dist.transforms.AffineCoupling(2, hypernet, log_scale_min_clip=-7.0, log_scale_max_clip=7.0)
    x = sized(6, 5)
    for got, expected in zip(with_ladj(module(), x), with_ladj(other, x), strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(module().inv(other(x).clone()), x)


@pytest.mark.parametrize("head", [heads.Affine, heads.Shift, Cubic])
def test_one_call_of_the_network_each_way(head):
    module, calls = built(Coupling(6, head(), context=2)), []
    module.network.register_forward_hook(lambda *_: calls.append(1))
    flow = gx.Flow([module], dist.Normal(torch.zeros(6, dtype=torch.float64), 1.0).to_event(1))
    d = flow(sized(3, 2))
    y = d.rsample()
    d.log_prob(y)
    assert len(calls) == 1
    flow(sized(3, 2)).log_prob(y.detach())
    assert len(calls) == 2


def test_any_mask_by_hand():
    mask = torch.tensor([False, True, False, False, True])
    module = built(Coupling(5, heads.Affine(), mask=mask, context=3))
    x, context = sized(4, 5), sized(4, 3, seed=1)
    phi = module.network(torch.cat([x[:, mask], context], -1)).unflatten(-1, (3, 2))
    expected = x.clone()
    scale = 7 * torch.tanh(phi[..., 1] / 7)
    expected[:, ~mask] = x[:, ~mask] * scale.exp() + phi[..., 0]
    y, ladj = with_ladj(module(context), x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ladj, scale.sum(-1))
    assert torch.equal(y[:, mask], x[:, mask])


@pytest.mark.parametrize("mask", [[True, True, False, False], [False, True, False, True]])
def test_heads_that_treat_sites_differently(mask):
    mask, shifts = torch.tensor(mask), torch.tensor([0.0, 10.0, 20.0, 30.0])
    module = Coupling(4, BySite(shifts), mask=mask)
    nn.init.zeros_(module.network.last.weight)
    x = torch.randn(3, 4)
    torch.testing.assert_close(module()(x), torch.where(mask, x, x + shifts))
    torch.testing.assert_close(module().inv(module()(x).clone()), x, atol=1e-5, rtol=0)


def test_with_reverse_between_layers_every_site_is_transformed():
    for sites in (1, 2, 5):
        parts = [
            built(Coupling(sites, heads.Affine()))(),
            transforms.Reverse(),
            built(Coupling(sites, heads.Affine()))(),
        ]
        jacobian = torch.autograd.functional.jacobian(transforms.Chain(parts), sized(sites)).flip(0)
        assert (jacobian.diagonal() - 1).abs().min() > 1e-3


@pytest.mark.parametrize("context", [0, 2])
def test_near_the_identity_at_the_start(context):
    x = 2 * sized(50, 6)
    for head in (heads.Affine(), heads.Shift()):
        module = Coupling(6, head, context=context).double()
        t = module(sized(50, 2, seed=1)) if context else module()
        assert 0 < (t(x) - x).abs().max() < 0.5


def test_shift_keeps_volumes():
    module = built(Coupling(4, heads.Shift()))
    x = sized(3, 4)
    y, ladj = with_ladj(module(), x)
    assert (ladj == 0).all() and (y[:, 2:] - x[:, 2:]).abs().min() > 0
    torch.testing.assert_close(torch.autograd.functional.jacobian(module(), x[0]).det(), torch.tensor(1.0).double())


def test_shift_in_an_autoregressive_transform():
    net = built(conditioners.MADE(4, 1, hidden=(8,)))
    module = transforms.AutoregressiveTransform(net, heads.Shift())
    x = sized(3, 4)
    y, ladj = with_ladj(module(), x)
    torch.testing.assert_close(y, x + net(x).squeeze(-1))
    assert (ladj == 0).all()
    back = module().inv(y.detach())
    torch.testing.assert_close(back, x)
    grads = torch.autograd.grad(back.sin().sum(), list(net.parameters()))
    t = module()
    again, _ = solve_in_turn(t.conditioner, t.head, y.detach(), None)[:2]
    for got, expected in zip(grads, torch.autograd.grad(again.sin().sum(), list(net.parameters())), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("far", [1.0, 1e2, 1e4])
def test_inverse_without_a_formula(far):
    module = built(Coupling(4, Cubic()))
    y = sized(20, 4)
    y[:, 2:] *= far
    x = module().inv(y)
    torch.testing.assert_close(module()(x.clone()), y, rtol=1e-9, atol=1e-9)


def test_another_network():
    seen = []

    def make(num_params, context):
        seen.append((num_params, context))
        return conditioners.MADE(1, num_params, context=context, hidden=(9,), activation=torch.tanh)

    module = built(Coupling(5, heads.Affine(), context=3, conditioner=make))
    assert seen == [(6, 5)]
    x, context = sized(4, 5), sized(4, 3, seed=1)
    phi, _ = module.network.conditioner.start(torch.cat([x[:, :2], context], -1), 4)
    expected = module.head(phi.unflatten(-1, (3, 2)))(x[:, 2:])
    torch.testing.assert_close(module(context)(x)[:, 2:], expected)
    torch.testing.assert_close(module(context).inv(module(context)(x).clone()), x)


def test_one_site_without_context_has_free_parameters():
    module = built(Coupling(1, heads.Affine()))
    y = module()(sized(5, 1))
    torch.testing.assert_close(with_ladj(module(), sized(5, 1))[1], with_ladj(module(), sized(5, 1))[1][:1].expand(5))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(y.sum(), list(module.parameters())))


def test_each_context_row_has_noise_of_its_own():
    module = built(Coupling(3, heads.Affine(), context=2))
    base = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    d = TransformedDistribution(base, [module(sized(4, 1, 2))])
    assert d.batch_shape == (4, 1) and d.sample((5,)).shape == (5, 4, 1, 3)
    assert len(d.sample()[..., 0].unique()) == 4
    value = sized(6, 3)
    torch.testing.assert_close(d.log_prob(value)[2, 3], d.log_prob(value[3])[2, 0])


def test_errors():
    head = heads.Affine()
    for match, options in {
        r"Expected mask to be Boolean of shape \(3,\); got torch.bool of \(2,\)": {"mask": torch.tensor([True, False])},
        r"Expected mask to be Boolean of shape \(3,\); got torch.float32 of \(3,\)": {"mask": torch.zeros(3)},
        r"Expected mask to be False somewhere \(for sites to transform\); got True everywhere\.": {
            "mask": torch.ones(3, dtype=torch.bool)
        },
        "Expected context to be an integer >= 0; got -1": {"context": -1},
        "Expected hidden to be a sequence of integers >= 1; got 5": {"hidden": 5},
        r"Expected a conditioner of \(num_params, context\) == \(4, 1\); got \(4, 0\)": {
            "conditioner": lambda P, C: conditioners.MADE(1, P)
        },
    }.items():
        with pytest.raises(ValueError, match=match):
            Coupling(3, head, **options)
    with pytest.raises(ValueError, match="Expected num_sites to be an integer >= 1; got 0"):
        Coupling(0, head)
    with pytest.raises(ValueError, match=r"Expected value.shape\[-1:\] == \(3,\) .*; got \(2, 4\)"):
        Coupling(3, head)()(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"Expected value.dtype == torch.float32 .*; got torch.float64"):
        Coupling(3, head)().inv(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"Expected a context \(\*batch, 2\)"):
        Coupling(3, head, context=2)()
    with pytest.raises(ValueError, match="Expected shape to be a sequence of integers >= 1"):
        heads.Shift((0,))
