"""Block autoregressive networks as bijections: against Pyro's, numbers by hand, and the inverse where it is hard."""

import copy

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact.testing import redraw
from pyro_genexact.transforms import BlockAutoregressive, ConditionedBlockAutoregressive
from support.values import built, sized

FORMS = ["gated", "normal", None]


def module(sites=4, scale=1.0, **options):
    net = built(BlockAutoregressive(sites, **options))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return net


@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("context", [0, 2])
def test_starts_near_the_identity(residual, context):
    torch.manual_seed(0)
    net = BlockAutoregressive(5, context=context, residual=residual)
    x = 2 * torch.randn(500, 5)
    t = net(torch.randn(500, 2)) if context else net()
    assert (t(x) - x).abs().max() < 0.5
    y = t(x)
    (-t.log_abs_det_jacobian(x, y).sum() + y.square().sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("residual", ["gated", "normal"])
def test_equals_pyro_with_its_weights(residual):
    peer = dist.transforms.BlockAutoregressive(4, hidden_factors=[3, 2], residual=residual).double()
    net = module(4, hidden=(3, 2), residual=residual)
    own = nn.ParameterDict()
    with torch.no_grad():
        for layer, theirs in zip(net.layers, peer.layers, strict=True):  # whose logarithms are not bounded
            own = 5 * torch.tanh(layer.log_diagonal / 5)
            theirs._weight.copy_(torch.where(theirs.mask_d.bool(), torch.block_diag(*own), layer.weight))
            theirs._diag_weight.copy_(5 * torch.tanh(layer.log_scale / 5).unsqueeze(-1))
            theirs.bias.copy_(layer.bias)
        if residual == "gated":
            peer.gate.copy_(5 * torch.tanh(net.gate / 5))
    x = sized(6, 4)
    y, expected = net()(x), peer(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # Pyro adds 1e-8 to norms
    ladj = net().log_abs_det_jacobian(x, y)
    torch.testing.assert_close(ladj, peer.log_abs_det_jacobian(x, expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_inverse_of_any_value(residual, scale):
    y = sized(200, 4) * torch.tensor([1.0, 1e2, 1e4, 1e4], dtype=torch.float64)
    net = module(context=2, residual=residual, scale=scale)
    context = sized(200, 2, seed=1)
    x = net(context).inv(y)
    torch.testing.assert_close(net(context)(x), y, rtol=1e-9, atol=1e-9)
    if scale == 1.0:
        y = y.float()
        x = net.float()(context.float()).inv(y)
        torch.testing.assert_close(net(context.float())(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", FORMS)
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_derivative_is_finite_and_sites_increase(residual, scale, dtype):
    net = module(1, scale=scale, residual=residual, hidden=(8, 8, 8, 8)).to(dtype)
    x = torch.cat([10.0 ** torch.arange(8.0, -8.0, -0.05), torch.zeros(1)]).to(dtype)
    x = torch.cat([-x, x.flip(0)[1:]]).unsqueeze(-1)
    t = net()
    y = t(x)
    assert (y.diff(dim=0) >= -8 * torch.finfo(dtype).eps * y[1:].abs()).all() and t.log_abs_det_jacobian(
        x, y
    ).isfinite().all()
    assert y[0] < -1e3 or residual is None
    gradient = torch.autograd.grad(t.log_abs_det_jacobian(x, y).sum() + y.sum(), list(net.parameters()))
    assert all(g.isfinite().all() for g in gradient)


def test_gated_far_away_is_the_gate_alone():
    net = module(3)
    x = torch.full((1, 3), 1e8, dtype=torch.float64)
    gate = torch.sigmoid(5 * torch.tanh(net.gate / 5))
    torch.testing.assert_close(net()(x), gate * x, rtol=1e-6, atol=0)
    torch.testing.assert_close(net().log_abs_det_jacobian(x, net()(x)), 3 * gate.log().expand(1))


@pytest.mark.parametrize("residual", FORMS)
def test_triangular_for_all_weights(residual):
    net = module(5, residual=residual)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(3 * torch.randn_like(p))
    jacobian = torch.autograd.functional.jacobian(lambda x: net()(x), sized(5))
    assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian)) and (jacobian.diagonal() > 0).all()
    assert (jacobian.tril(-1).abs().sum(1)[1:] > 0).all()


def test_first_site_is_a_nonlinear_function_of_the_context():
    net = module(3, context=1)
    y = net(torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(-1))(sized(3))[:, 0]
    assert y.diff().abs().min() > 1e-6 and y.diff().diff().abs().max() > 1e-3


def test_shapes_broadcast_with_the_context():
    net = module(3, context=2)
    t = net(sized(4, 1, 2))
    x = sized(5, 3)
    assert t.forward_shape(x.shape) == t(x).shape == (4, 5, 3)
    torch.testing.assert_close(t(x)[2, 3], net(t.context[2, 0])(x[3]))
    torch.testing.assert_close(t.inv(x)[2, 3], net(t.context[2, 0]).inv(x[3]))
    assert t.log_abs_det_jacobian(x, t(x)).shape == t.inv.log_abs_det_jacobian(x, t.inv(x)).shape == (4, 5)
    assert module(3)().inv(sized(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("residual", FORMS)
def test_mass_is_one(residual):
    net = module(2, residual=residual)
    flow = gx.Flow([net.inv], dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    nodes = torch.linspace(-9, 9, 801, dtype=torch.float64)
    places, weights = nodes.sinh(), nodes.cosh() * (nodes[1] - nodes[0])
    with torch.no_grad():
        density = flow().log_prob(torch.cartesian_prod(places, places)).exp().reshape(801, 801)
    mass = weights @ density @ weights
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-6, atol=0)


@pytest.mark.parametrize("residual", FORMS)
def test_inverse_gradients_without_the_argument(residual):
    net = module(3, context=2, hidden=(4, 3), residual=residual)
    y, context = sized(5, 3), sized(5, 2, seed=1)
    x = net(context).inv(y)
    got = torch.autograd.grad(x.sin().sum(), list(net.parameters()), retain_graph=True)
    again = torch.autograd.grad(x.sin().sum(), list(net.parameters()), create_graph=True)
    torch.testing.assert_close(again, got)
    second = torch.autograd.grad(sum(g.square().sum() for g in again), list(net.parameters()))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in second)
    x = x.detach()
    t = net(context).with_cache(0)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda r, c=c: net(c)(r), r) for r, c in zip(x, context, strict=True)]
    )
    pull = torch.linalg.solve(jacobian.mT, x.cos().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got, torch.autograd.grad(t(x), list(net.parameters()), -pull))


def test_under_functorch():
    net = module(2, hidden=(3,))
    weights = dict(net.named_parameters())
    y = sized(3, 2)

    def total(weights, way):
        return torch.func.functional_call(net, weights, ()).inv(y).sin().sum() if way else net()(y).sum()

    got = torch.func.grad(total)(weights, True)
    expected = torch.autograd.grad(total(weights, True), list(weights.values()))
    torch.testing.assert_close(list(got.values()), list(expected))


def test_weights_put_in_place_stay():
    net = module(3)
    other = {name: p + 0.3 for name, p in net.named_parameters()}
    t = torch.func.functional_call(net, other, ())
    moved = copy.deepcopy(net)
    moved.load_state_dict(other, strict=False)
    x = sized(4, 3)
    torch.testing.assert_close(t(x), moved()(x))
    torch.testing.assert_close(t.inv(x), moved().inv(x))


def test_state_dict_holds_parameters_alone():
    assert set(module(3).state_dict()) == {name for name, _ in module(3).named_parameters()}


def test_errors_of_the_value():
    t = module(2)()
    with pytest.raises(ValueError, match=r"Expected value.shape\[-1\] == 2 .*; got \(3, 3\)"):
        t(sized(3, 3))
    with pytest.raises(ValueError, match=r"Expected value.dtype == torch.float64"):
        t.inv(sized(3, 2).float())
    assert t.inv(torch.full((1, 2), torch.nan, dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sites": 0}, r"Expected num_sites to be an integer >= 1; got 0"),
        ({"num_sites": 2, "hidden": (3, 0)}, r"Expected hidden to be a sequence of integers >= 1; got \(3, 0\)"),
        ({"num_sites": 2, "hidden": ()}, r"Expected hidden to hold at least one layer; got \(\)"),
        ({"num_sites": 2, "context": -1}, r"Expected context to be an integer >= 0; got -1"),
        ({"num_sites": 2, "residual": "tanh"}, r'Expected residual to be "gated", "normal" or None; got \'tanh\''),
    ],
)
def test_errors_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        BlockAutoregressive(**options)


def test_errors_of_the_context():
    with pytest.raises(ValueError, match=r"Expected a context \(\*batch, 2\) .*; got none"):
        module(3, context=2)()
    with pytest.raises(ValueError, match=r"Expected context.shape\[-1\] == 2 .*; got \(3, 1\)"):
        ConditionedBlockAutoregressive(module(3, context=2), sized(3, 1))


def test_a_flow_that_learns():
    """Two crescents: as good as their entropy, closely."""
    torch.manual_seed(0)
    z = torch.randn(600, 2)
    data = torch.stack([z[:, 0] * 1.5, 0.4 * z[:, 1] + z[:, 0] ** 2 - 1], -1)
    parts = [BlockAutoregressive(2).inv]
    flow = gx.Flow(parts, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    entropy = float(torch.log(torch.tensor(2 * torch.pi * torch.e)) + torch.log(torch.tensor(1.5 * 0.4)))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = -flow().log_prob(data).mean()
        loss.backward()
        optimizer.step()
    assert entropy - 0.15 < loss < entropy + 0.1
    sample = flow().sample((1000,))
    assert abs(float(sample[:, 0].std()) - 1.5) < 0.2 and redraw(flow) is flow
