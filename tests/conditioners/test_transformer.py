"""Transformer against the same computed by hand: the cache, weights of the call, derivatives, dropout."""

import copy
from math import inf

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyro_genexact as gx
from pyro_genexact.conditioners import attention
from pyro_genexact.contexts import Covariates, PaddedSequence, Source
from pyro_genexact.core.binding import Bound
from pyro_genexact.testing import conditioner_inputs, redraw
from support.networks import by_sites
from support.registry import CONDITIONERS
from support.registry.conditioners import transformer
from support.values import F64


def rotated(x, grid):
    """Pairs of numbers of the heads (B, heads, T, d), each turned by the angle of its place, or its row and column."""
    *_, T, d = x.shape
    angles = [[t * 10000 ** (-i / d) for i in range(0, d, 2)] for t in range(T)]
    if grid:
        angles = [[place * 100 ** (-i / d) for place in divmod(t, grid[1]) for i in range(0, d, 4)] for t in range(T)]
    angle = torch.tensor(angles, dtype=F64)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


def attend(query, key, value, heads, mask=None, grid=None):
    """Rows (B, T, width) and (B, S, width); with a mask (T, T), of the same places."""
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if mask is not None:
        query, key = rotated(query, grid), rotated(key, grid)
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -inf)
    return (scores.softmax(3) @ value).transpose(1, 2).flatten(2)


def norm(x, layer):
    x = x - x.mean(2, keepdim=True)
    return x / (x.square().mean(2, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def by_hand(net, y, context):
    B, T = y.shape[:2]
    if isinstance(net.site, int):
        read = net.encoder.weight[y]
    else:
        read = (y if net.site else y.unsqueeze(2)) @ net.read.weight.T + net.read.bias
    x = torch.cat([net.begin.expand(B, 1, -1), read[:, :-1]], 1)
    if isinstance(context, torch.Tensor):
        x = x + (context if context.dim() == 3 else context.unsqueeze(1)) @ net.read_context.weight.T
        x = x + net.read_context.bias
    x = x if net.grid is None else x + net.places[:T]
    past = torch.arange(T)[:, None] - torch.arange(T)
    mask = (past >= 0) & (past < (net.window or T))
    for layer in net.layers:
        query, key, value = (norm(x, layer.norm) @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, 2)
        x = x + attend(query, key, value, net.num_heads, mask, net.grid) @ layer.mix.weight.T + layer.mix.bias
        if isinstance(context, PaddedSequence):
            query = norm(x, layer.norm_source) @ layer.query.weight.T + layer.query.bias
            found = []
            for b, n in enumerate(context.lengths.tolist()):
                key, value = (context.values[b, :n] @ layer.source.weight.T).chunk(2, 1)
                one = attend(query[b : b + 1], key[None], value[None], net.num_heads)
                found.append(one if n else torch.zeros_like(one))  # an empty source adds nothing
            x = x + torch.cat(found) @ layer.mix_source.weight.T
        hidden = norm(x, layer.norm_mlp) @ layer.up.weight.T + layer.up.bias
        x = x + (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ layer.down.weight.T + layer.down.bias
    return norm(x, net.norm) @ net.last.weight.T + net.last.bias


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"window": 1, "depth": 1},
        {"context": 2, "window": 9},
        {"context": Covariates(2)},
        {"context": Source(3)},
        {"width": 12, "num_heads": 1, "depth": 3},
        {"width": 16, "num_heads": 2, "grid": (2, 4), "context": 2},
        {"grid": (9, 1), "window": 3},
    ],
)
@pytest.mark.parametrize("site", [(), (2,), 4])
def test_by_hand(site, options):
    net = transformer(site, 3, **options)()
    y, context = conditioner_inputs(net, rows=4, sites=7, padded=True)
    expected = by_hand(net, y, context)
    torch.testing.assert_close(net(y, context), expected, rtol=0, atol=1e-12)
    for cut in ((1,) * 6, (6,), (2, 1, 3)):
        with torch.no_grad():
            torch.testing.assert_close(by_sites(net, y, context, cut)[0], expected, rtol=0, atol=1e-12)


def test_places_count_by_their_distance_alone():
    """With a window, parameters of a periodic sequence are periodic, however far from its start."""
    net = transformer(window=4)()
    period = torch.randn(1, 5, dtype=F64)
    with torch.no_grad():
        phi = net(period.repeat(1, 300))[0].unflatten(0, (300, 5))
    assert phi[10].std(0).min() > 0.01
    torch.testing.assert_close(phi[299], phi[10], rtol=0, atol=1e-9)
    torch.manual_seed(0)
    whole = transformer()()
    first, moved = torch.randn(2, 6, dtype=F64)
    assert (whole(torch.stack([first, first.roll(1)]))[0, 5] - whole(first[None])[0, 5]).abs().max() < 1e-12
    assert not torch.allclose(whole(first[None])[0, 5], whole(moved[None])[0, 5])


# Work and memory


@pytest.fixture
def calls(monkeypatch):
    """What attention is called with: queries, keys, whether there is a mask, whether it is causal."""
    made, plain = [], attention.attention

    def counted(query, key, value, mask=None, is_causal=False):
        made.append((query.shape[2], key.shape[2], mask is not None, is_causal))
        return plain(query, key, value, mask, is_causal=is_causal)

    monkeypatch.setattr(attention, "attention", counted)
    return made


def test_a_window_limits_the_state():
    net = transformer(window=4)()
    with torch.no_grad():
        whole, (_, state) = net(torch.ones(2, 602, dtype=F64)), net.start(None, 2)
        _, state = net.extend(torch.ones(2, 600, dtype=F64), state)
        phi, state = net.extend(torch.ones(2, 1, dtype=F64), state)
    assert state.cache.shape[4] < 50
    torch.testing.assert_close(phi[:, 0], whole[:, 601], rtol=0, atol=1e-12)


def test_a_site_is_read_once(calls):
    net, head = transformer(3, 3, depth=2)(), gx.heads.Categorical(3)
    calls.clear()
    gx.distributions.AutoregressiveDistribution(net, head, (6,)).sample((4,))
    assert calls == [(1, t + 1, False, False) for t in range(6) for _ in range(2)]


@pytest.mark.parametrize("keep", [True, False])
def test_masks_only_where_needed(calls, keep):
    net, y = transformer(3, 3, depth=1)(), torch.zeros(2, 9, dtype=torch.long)
    calls.clear()
    with torch.set_grad_enabled(keep):
        by_sites(net, y, cut=(5, 1, 2))
        net(y)
    assert calls[:2] == [(1, 1, False, False), (5, 6, True, False)]
    assert calls[2:] == [(1, 7, False, False), (2, 9, True, False), (9, 9, False, True)]
    net = transformer(3, 3, depth=1, window=4)()
    calls.clear()
    with torch.set_grad_enabled(keep):
        by_sites(net, y, cut=(1,) * 8)
        by_sites(net, y, cut=(5, 3))
        net(y[:, :4])
    assert calls[:9] == [(1, min(t + 1, 4), False, False) for t in range(9)]
    assert calls[9:] == [(1, 1, False, False), (5, 6, True, False), (3, 6, True, False), (4, 4, False, True)]


def test_the_source_is_projected_once(monkeypatch):
    net = CONDITIONERS["Transformer source"]()
    y, source = conditioner_inputs(net)
    seen, plain = [], attention.Layer.of_source
    monkeypatch.setattr(attention.Layer, "of_source", lambda *args: seen.append(1) or plain(*args))
    by_sites(net, y, source)
    assert len(seen) == net.depth


def test_cache_is_written_in_place():
    net, y = transformer(3, 3)(), torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        state = net.start(None, 2)[1]
        moves, sizes = 0, []
        for t in range(400):
            before = state.cache.data_ptr()
            state = net.extend(y, state)[1]
            moves += state.cache.data_ptr() != before
            sizes.append(state.cache.shape[4])
            assert state.used == t + 2 <= sizes[-1] <= max(t + 34, (t + 2) * 9 / 8)
        assert moves == len(set(sizes)) - 1 < 13
        assert state.cache.shape[:4] == (2, 2, 2, 2) and state.cache.shape[5] == 4
        branch = net.reorder(state, torch.tensor([1, 1, 0]))
        assert branch.cache.data_ptr() != state.cache.data_ptr()
        room = branch.cache.data_ptr()
        assert net.extend(y[[0, 0, 0]], branch)[1].cache.data_ptr() == room
    bounded = transformer(3, 3, max_len=40)()
    with torch.no_grad():
        assert by_sites(bounded, y.expand(2, 40))[1].cache.shape[4] == 40


@pytest.mark.parametrize("size", [1, 3])
def test_memory_is_bounded_by_the_window(size):
    net = transformer(3, 3, window=5)()
    y = torch.randint(3, (2, 300))
    with torch.no_grad():
        phi, state = net.start(None, 2)
        for chunk in y.split(size, 1):
            phi, state = net.extend(chunk, state)
            assert state.cache.shape[4] <= 4 + size + 32
        longest = net(torch.cat([y, y[:, :1]], 1))
    torch.testing.assert_close(phi, longest[:, -size:], rtol=0, atol=1e-12)
    grown = net.extend(y[:, :100], net.start(None, 2)[1])[1]  # with grad
    assert net.extend(y[:, :1], grown)[1].cache.shape[4] == 5
    with torch.no_grad():
        kept = net.reorder(state, torch.tensor([0]))
        assert kept.used == 4


@pytest.mark.parametrize("modes", [("no", "yes", "no"), ("yes", "no", "yes"), ("inference", "no", "yes")])
def test_grad_may_be_switched_between_chunks(modes):
    net = transformer()()
    y = torch.randn(3, 6, dtype=F64)
    of = {"no": torch.no_grad, "yes": torch.enable_grad, "inference": torch.inference_mode}
    phis = []
    for i, (mode, chunk) in enumerate(zip(modes, ((0, 1), (1, 3), (3, 5)), strict=True)):
        with of[mode]():
            if not i:
                phi, state = net.start(None, 3)
            phi, state = net.extend(y[:, slice(*chunk)], state)
            phis.append(phi)
    torch.testing.assert_close(torch.cat(phis, 1), net(y)[:, 1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_grad", [True, False])
def test_reorder_to_more_rows(with_grad):
    net = CONDITIONERS["Transformer categories, source padded"]()
    y, source = conditioner_inputs(net, 4, 6, padded=True)
    index = torch.tensor([3, 3, 0, 1, 2, 2, 1, 3, 0])
    with torch.set_grad_enabled(with_grad):
        _, state = by_sites(net, y[:, :4], source)
        phi, _ = net.extend(y[index, 3:5], net.reorder(state, index))
        torch.testing.assert_close(phi, net(y, source)[index, 4:], rtol=0, atol=1e-12)
        none = net.reorder(state, index[:0])
        assert net.extend(y[:0, 3:5], none)[0].shape == (0, 2, 3)
        torch.testing.assert_close(net.extend(y[:, 3:5], state)[0], net(y, source)[:, 4:], rtol=0, atol=1e-12)


# Weights of the call, precision, derivatives


def test_weights_of_the_call():
    net = CONDITIONERS["Transformer categories, source padded"]()
    other = redraw(copy.deepcopy(net), 7)
    y, context = conditioner_inputs(net, padded=True)
    expected = other(y, context)
    weights = dict(other.named_parameters())
    assert torch.equal(functional_call(net, weights, (y, context)), expected)
    bound = Bound(net)
    assert {id(t) for t in bound.tensors} == {id(p) for p in net.parameters()}
    before = net(y, context)
    net.layers[1].qkv.weight = nn.Parameter(2 * net.layers[1].qkv.weight.detach())
    assert torch.equal(bound.module(y, context), before) and not torch.allclose(net(y, context), before)
    torch.testing.assert_close(by_sites(bound.module, y, context)[0], before, rtol=0, atol=1e-12)


def test_priors_on_weights():
    net = CONDITIONERS["Transformer source"]()
    y, context = conditioner_inputs(net)
    plain, shapes = copy.deepcopy(net), {key: p.shape for key, p in net.named_parameters()}
    to_pyro_module_(net)
    for key, shape in shapes.items():
        owner, _, leaf = key.rpartition(".")
        prior = dist.Normal(torch.zeros(shape, dtype=F64), 0.5).to_event(len(shape))
        setattr(net.get_submodule(owner), leaf, PyroSample(prior))
    trace = pyro.poutine.trace(net).get_trace(y, context)
    drawn = {key: trace.nodes[key]["value"] for key in shapes}
    assert torch.equal(trace.nodes["_RETURN"]["value"], functional_call(plain, drawn, (y, context)))


def test_per_example_gradients_and_vmap():
    net = transformer()()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    y = torch.randn(3, 2, 5, dtype=F64)

    def loss(weights, y):
        return functional_call(net, weights, (y,)).square().sum()

    each = [grad(loss)(weights, part) for part in y]
    together = vmap(grad(loss), (None, 0))(weights, y)
    for name, found in together.items():
        expected = torch.stack([part[name] for part in each])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        found = vmap(lambda y: by_sites(net, y)[0])(y)
    torch.testing.assert_close(found, torch.stack([net(part) for part in y]), rtol=0, atol=1e-12)


def test_second_and_forward_derivatives():
    """As documented: with torch's plain attention."""
    net = transformer(context=Source(2))()
    y, context = conditioner_inputs(net, rows=2, sites=3)
    y.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda y: net(y, context), (y,))
        (y0, step), eps = torch.randn(2, 2, 3, dtype=F64), 1e-6
        _, tangent = jvp(lambda y: net(y, context), (y0,), (step,))
        slope = (net(y0 + eps * step, context) - net(y0 - eps * step, context)) / (2 * eps)
    torch.testing.assert_close(tangent, slope, rtol=1e-6, atol=1e-8)


def test_autocast():
    net = transformer(3, 3, width=32, context=Source(2))().float()
    y, source = conditioner_inputs(net, sites=9)
    expected = net(y, source)
    with torch.autocast("cpu", torch.bfloat16):
        phi = net(y, source)
        with torch.no_grad():
            stepwise, state = by_sites(net, y, source)
    assert phi.dtype == stepwise.dtype == state.cache.dtype == torch.bfloat16
    scale = expected.std()
    assert 0 < (phi - expected).abs().max() < 0.2 * scale
    assert (stepwise - expected).abs().max() < 0.2 * scale
    assert all(g.isfinite().all() for g in torch.autograd.grad(phi.float().square().sum(), list(net.parameters())))
    low = copy.deepcopy(net).bfloat16()
    assert (low(y, source.bfloat16()) - expected).abs().max() < 0.3 * scale


def test_state_dict_round_trip():
    net = transformer(3, 3, context=Source(2))()
    other = transformer(3, 3, context=Source(2))()
    redraw(other, 5)
    y, source = conditioner_inputs(net)
    assert not torch.allclose(other(y, source), net(y, source))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(y, source), net(y, source))


def test_dropout():
    net = transformer(3, 3, dropout=0.5, context=Source(2))()
    y, source = conditioner_inputs(net)
    same = transformer(3, 3, context=Source(2))()
    same.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(y, source), same.eval()(y, source))
    assert torch.equal(same.train()(y, source), same.eval()(y, source))
    net.train()
    assert not torch.equal(net(y, source), net(y, source))
    zeros = [torch.zeros_like(p) if "layers" in name else p for name, p in net.named_parameters()]
    bare = dict(zip(dict(net.named_parameters()), zeros, strict=True))
    seen = []
    net.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    functional_call(net, bare, (y.repeat(500, 1), source.repeat(500, 1, 1)))  # dropout of the inputs alone
    dropped = seen[0] == 0
    assert abs(dropped.double().mean() - 0.5) < 0.01
    kept = net.encoder.weight[y.repeat(500, 1)[:, :-1]]
    torch.testing.assert_close(seen[0][:, 1:][~dropped[:, 1:]], 2 * kept[~dropped[:, 1:]])
