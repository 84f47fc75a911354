"""CausalConv and StateSpace against their definitions, step by step; their states; many chunks."""

import itertools
import math

import pytest
import torch
from torch.func import vmap
from torch.nn.functional import conv1d, gelu, glu, pad, rms_norm, silu, softplus

from pyro_genexact.conditioners import CausalConv, Recurrent, StateSpace
from pyro_genexact.conditioners.rings import shifted, written
from pyro_genexact.conditioners.scans import diagonal_scan, selective_scan
from pyro_genexact.testing import conditioner_inputs
from support.registry.conditioners import factory
from support.values import sized

LONG = {
    "CausalConv": lambda: factory(CausalConv, (), 2, width=4, kernel=3, dilations=(1, 5, 70))(),
    "diagonal": lambda: factory(StateSpace, (), 2, width=4, depth=2, state=4)(),
    "selective": lambda: factory(StateSpace, (), 2, kind="selective", width=4, depth=2, state=3)(),
}
STEPS = {**LONG, "GRU": lambda: factory(Recurrent, (), 2, hidden=4)()}


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_convolution_by_hand(kernel):
    net = factory(CausalConv, (2,), 3, width=4, kernel=kernel, dilations=(1, 3))()
    y, _ = conditioner_inputs(net, rows=3, sites=9)
    x = net.read(torch.cat([net.begin.expand(3, 1, 2), y[:, :-1]], 1))
    for layer, d in zip(net.layers, (1, 3), strict=True):
        weight = layer.conv.weight.unflatten(1, (kernel, 4)).transpose(1, 2)  # (outputs, inputs, taps)
        h = pad(layer.norm(x).transpose(1, 2), ((kernel - 1) * d, 0))
        value, gate = conv1d(h, weight, layer.conv.bias, dilation=d).transpose(1, 2).chunk(2, 2)
        x = x + layer.mix(value.tanh() * gate.sigmoid())
    torch.testing.assert_close(net(y), net.last(net.norm(x)), rtol=0, atol=1e-12)
    y.requires_grad_()
    (read,) = torch.autograd.grad(net(y)[:, 8].sum(), y)
    assert net.receptive_field == 1 + (kernel - 1) * 4
    assert read.any(2).nonzero()[:, 1].min() == max(8 - net.receptive_field, 0)


def test_diagonal_by_hand():
    """The state of each channel step by step, from the discretisation of the continuous system."""
    net = factory(StateSpace, (), 2, width=3, depth=1, state=4)()
    y, _ = conditioner_inputs(net, rows=2, sites=7)
    (layer,), x = net.layers, net.read(torch.cat([net.begin.expand(2, 1, 1), y[:, :-1, None]], 1))
    u = net.norms[0](x)
    a = torch.complex(-layer.log_decay.exp(), layer.frequency)
    step = layer.log_step.exp()[:, None]
    write = ((step * a).exp() - 1) / a  # input held constant over a step
    s, c, out = torch.zeros(2, 3, 2, dtype=torch.complex128), torch.view_as_complex(layer.readout), []
    for t in range(7):
        s = (step * a).exp() * s + write * u[:, t, :, None]
        out.append(2 * (c * s).sum(2).real)
    x = x + glu(layer.mix(gelu(torch.stack(out, 1) + layer.skip * u)), -1)
    torch.testing.assert_close(net(y), net.last(net.norm(x)), rtol=0, atol=1e-12)


def test_selective_by_hand():
    net = factory(StateSpace, (), 2, kind="selective", width=32, depth=1, state=3)()
    y, _ = conditioner_inputs(net, rows=2, sites=7)
    (layer,), x = net.layers, net.read(torch.cat([net.begin.expand(2, 1, 1), y[:, :-1, None]], 1))
    gate, mixed, step = layer.read(net.norms[0](x)).split((64, 70, 2), 2)
    mixed = silu(conv1d(pad(mixed.transpose(1, 2), (3, 0)), layer.taps.T[:, None], layer.bias, groups=70)).transpose(
        1, 2
    )
    u, b, c = mixed.split((64, 3, 3), 2)
    s, out = torch.zeros(2, 2, 32, 3, dtype=y.dtype), []
    for t in range(7):
        d, v = softplus(step[:, t] + layer.step_bias), u[:, t].unflatten(1, (2, 32))
        s = (-d * layer.log_rate.exp()).exp()[..., None, None] * s + (d[..., None] * v)[..., None] * b[:, t, None, None]
        out.append(((s * c[:, t, None, None]).sum(3) + layer.skip[:, None] * v).flatten(1))
    x = x + layer.mix(rms_norm(torch.stack(out, 1) * silu(gate), (64,), eps=1e-5) * layer.scale)
    torch.testing.assert_close(net(y), net.last(net.norm(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sites", [66, 150])
@pytest.mark.parametrize("name", LONG)
def test_many_chunks(name, sites):
    """Chunks of every kind, with states before them, and the gradients of both views."""
    net = LONG[name]()
    y, _ = conditioner_inputs(net, rows=2, sites=sites)
    y.requires_grad_()
    phi, state = net.start(None, 2)
    phis = [phi.unsqueeze(1)]
    for part in y[:, :-1].split([1, 40, sites - 43, 1], 1):
        phi, state = net.extend(part, state)
        phis.append(phi)
    steps, whole = torch.cat(phis, 1), net(y)
    torch.testing.assert_close(steps, whole, rtol=1e-10, atol=1e-10)
    leaves, weight = [y, *net.parameters()], sized(*whole.shape, seed=3)
    for got, expected in zip(*(torch.autograd.grad((weight * v).sum(), leaves) for v in (steps, whole)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LONG)
def test_later_sites_change_nothing_at_all(name):
    net = LONG[name]().float()
    y = conditioner_inputs(LONG[name](), rows=2, sites=100)[0].float()
    other = y.clone()
    other[:, 70:] = 1e6
    assert torch.equal(net(y)[:, :71], net(other)[:, :71])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_no_silent_double_precision(name, dtype):
    net = LONG[name]().to(dtype)
    y = sized(2, 100).to(dtype)
    phi, state = net.extend(y[:, :-1], net.start(None, 2)[1])
    step, last = net.extend(y[:, -1:], state)
    found, whole = {part.dtype for part in (*state.memory, *last.memory)}, net(y)
    assert whole.dtype == phi.dtype == step.dtype == dtype
    assert (net.double()(y.double()) - whole).abs().max() < 100 * torch.finfo(dtype).eps
    assert found <= {dtype, torch.float32, torch.complex64}


@pytest.mark.parametrize("name", STEPS)
def test_states_do_not_grow(name):
    net = STEPS[name]()
    _, state = net.start(None, 3)
    shapes = [part.shape for part in state.memory]
    for sites in (1, 1, 200, 1):
        with torch.no_grad():
            _, state = net.extend(torch.ones(3, sites, dtype=torch.float64), state)
        assert [part.shape for part in state.memory] == shapes
        for part in state.memory:  # nor do they keep a view of something long
            assert part.untyped_storage().nbytes() <= part.numel() * part.itemsize


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rings(size, grad):
    for cut in itertools.product((1, 2, 4, 6), repeat=3):
        x = torch.arange(1.0, 1 + sum(cut)).reshape(1, -1, 1)
        whole, ring, first = torch.cat([torch.zeros(1, size, 1), x], 1), torch.zeros(1, size, 1), 0
        with torch.set_grad_enabled(grad):
            for part in x.split(cut, 1):
                for shift in range(1, size + 1):
                    start = first + size - shift
                    assert torch.equal(shifted(part, ring, first, shift), whole[:, start : start + part.shape[1]])
                ring, first = written(ring, part, first), first + part.shape[1]


@pytest.mark.parametrize("name", STEPS)
def test_branches_do_not_share_memory(name):
    """Buffers written in place, also after inference mode, in branches with as many rows."""
    net, order = STEPS[name](), torch.tensor([2, 0, 1])
    y, _ = conditioner_inputs(net, rows=3, sites=9)
    other = torch.cat([y[order, :3], 1 - y[:, 3:]], 1)
    with torch.inference_mode():
        _, trunk = net.extend(y[:, :3], net.start(None, 3)[1])
    with torch.no_grad():
        branch = net.reorder(trunk, order)
        for values, state in ((other, branch), (y, trunk)):
            first, state = net.extend(values[:, 3:4], state)
            phi = torch.cat([first, net.extend(values[:, 4:8], state)[0]], 1)
            torch.testing.assert_close(phi, net(values)[:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LONG)
def test_steps_under_vmap(name):
    net = LONG[name]()
    y, _ = conditioner_inputs(net, rows=3, sites=6)

    def steps(row):
        return net.extend(row.unsqueeze(0), net.start(None, 1)[1])[0].squeeze(0)

    with torch.no_grad():
        torch.testing.assert_close(vmap(steps)(y[:, :-1]), net(y)[:, 1:], rtol=0, atol=1e-12)


def test_scans_under_autocast():
    u, rate, read = torch.ones(1, 40, 2), torch.full((2, 3), -0.1 + 1j), torch.ones(2, 3) + 0j
    heads, decay, pairs = torch.ones(1, 40, 2, 2), torch.full((1, 40, 2), -0.1), torch.ones(1, 40, 3)
    for scan, inputs in (
        (diagonal_scan, (u, torch.zeros(1, 2, 3) + 0j, rate, read)),
        (selective_scan, (heads, decay, pairs, pairs, torch.zeros(1, 2, 2, 3))),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found = scan(*inputs)
        assert all(map(torch.equal, found, scan(*inputs)))


def test_a_step_that_forgets_everything():
    """Sums of log-decays after a very large one keep their digits."""
    log_decay = -torch.tensor([0.1, 1e9, 0.1, 0.2, 0.3]).reshape(1, 5, 1)
    u, one = torch.ones(1, 5, 1, 1), torch.ones(1, 5, 1)
    y, _ = selective_scan(u, log_decay, one, one, torch.zeros(1, 1, 1, 1))
    s, expected = 0.0, []
    for decay in log_decay.flatten().tolist():
        s = math.exp(decay) * s + 1
        expected.append(s)
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))


def test_a_diagonal_that_forgets_nothing():
    net = StateSpace((), 2, width=3, depth=1, state=4)
    torch.nn.init.constant_(net.layers[0].log_decay, -200.0)  # and the first frequency is 0, so that the pole is 0
    (phi := net(torch.ones(1, 70))).sum().backward()
    assert phi.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())


def test_scans_twice_differentiable():
    u, rate, read = sized(1, 3, 2), torch.complex(-sized(2, 2).exp(), sized(2, 2, seed=1)), sized(2, 2, 2, seed=2)
    state = torch.zeros(1, 2, 2, dtype=torch.complex128)
    parts = [u, torch.view_as_real(rate).clone(), read]

    def diagonal(u, rate, read):
        return diagonal_scan(u, state, torch.view_as_complex(rate), torch.view_as_complex(read))[0]

    assert torch.autograd.gradgradcheck(diagonal, [p.requires_grad_() for p in parts])
    parts = sized(1, 3, 2, 2), -sized(1, 3, 2, seed=1).exp(), sized(1, 3, 2, seed=2), sized(1, 3, 2, seed=3)
    parts = [p.requires_grad_() for p in parts]
    assert torch.autograd.gradgradcheck(lambda *p: selective_scan(*p, sized(1, 2, 2, 2, seed=4))[0], parts)


def test_initialisations():
    torch.manual_seed(0)
    for frequencies, expected in (
        ("linear", [0, math.pi, 2 * math.pi, 3 * math.pi]),
        ("inverse", [8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]),
    ):
        (layer,) = StateSpace((), 2, depth=1, state=8, step_sizes=(0.01, 0.02), frequencies=frequencies).layers
        torch.testing.assert_close(layer.frequency[0], torch.tensor(expected))
        assert torch.allclose(layer.log_decay.exp(), torch.tensor(0.5))
        assert 0.01 <= layer.log_step.exp().min() < layer.log_step.exp().max() <= 0.02
    (layer,) = StateSpace((), 2, kind="selective", width=200, depth=1).layers
    steps = softplus(layer.step_bias)
    assert layer.heads == 10 and 0.0009 < steps.min() < steps.max() < 0.11  # of at most 12, the most that divides 400
    assert 1 <= layer.log_rate.exp().min() < layer.log_rate.exp().max() <= 16


@pytest.mark.parametrize("name", LONG)
def test_dropout_is_for_training_only(name):
    options = {"dilations": (1,)} if name == "CausalConv" else {"kind": name, "depth": 1}
    kind = CausalConv if name == "CausalConv" else StateSpace
    net = factory(kind, (), 2, width=16, dropout=0.5, **options)()
    same = factory(kind, (), 2, width=16, **options)()
    same.load_state_dict(net.state_dict())
    y, _ = conditioner_inputs(net)
    assert torch.equal(net.eval()(y), same(y)) and "dropout=0.5" in repr(net)
    assert not torch.equal(net.train()(y), net(y))


@pytest.mark.parametrize("name", LONG)
def test_a_start_without_grad(name):
    """Gradients of later steps reach the weights."""
    net = LONG[name]()
    y, _ = conditioner_inputs(net)
    with torch.no_grad():
        _, state = net.start(None, len(y))
    phi, _ = net.extend(y[:, :1], state)
    grads = torch.autograd.grad(phi.sum(), list(net.parameters()), allow_unused=True)
    assert all(g is not None or "begin" in n for g, (n, _) in zip(grads, net.named_parameters(), strict=True))
    assert torch.allclose(phi, net(y)[:, 1:2], rtol=0, atol=1e-12)
