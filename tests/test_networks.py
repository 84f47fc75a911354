"""Recurrent, Independent, Markov, NADE, and orders: the laws, and each against the same computed by hand."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import registry
import torch
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from registry import CONDITIONERS, factory
from torch import nn
from torch.func import functional_call, vmap

from pyro_genexact import Autoregressive, heads, testing
from pyro_genexact.conditioners import nade
from pyro_genexact.conditioners.independent import Independent
from pyro_genexact.conditioners.made import MADE
from pyro_genexact.conditioners.markov import Markov
from pyro_genexact.conditioners.nade import NADE
from pyro_genexact.conditioners.recurrent import Recurrent
from pyro_genexact.contexts import Steps
from pyro_genexact.core.binding import bind
from pyro_genexact.testing import conditioner_inputs, redraw
from pyro_genexact.transforms import AutoregressiveTransform, ConditionedAutoregressive

ORDER = torch.tensor([3, 0, 4, 1, 2])
PERMUTED = {
    "MADE permuted": lambda: factory(MADE, 5, 2, hidden=(12, 10), context=2)().permuted(ORDER),
    "MADE direct permuted": lambda: factory(MADE, 5, 2, hidden=(12,), direct=True)().permuted(ORDER),
    "NADE permuted": lambda: factory(NADE, 5, 3, site=3, hidden=7, context=2)().permuted(ORDER),
    "Independent permuted": lambda: factory(Independent, 5, 2, context=2)().permuted(ORDER),
}


@pytest.mark.parametrize("law", [testing.chunks, testing.reorder, testing.consumption, testing.context_use])
@pytest.mark.parametrize("name", PERMUTED)
def test_laws_of_permuted_networks(name, law):
    law(PERMUTED[name]())


def test_steps_have_power():
    class Later(Markov):
        def forward(self, y, context=None):
            return super().forward(y, context.roll(1, 1))

    with pytest.raises(AssertionError, match=r"context use broken \[feature 0\]: changes site 0 by 0, not by more"):
        testing.context_use(factory(Later, (), 2, order=1, hidden=(8,), context=Steps(2))())

    class Endless(Recurrent):
        def extend(self, y, state):
            return super().extend(y, state._replace(context=torch.cat([state.context, state.context], 1)))

    with pytest.raises(AssertionError, match=r"consumption broken \[5 of 5 sites, grad False\]: no error"):
        testing.consumption(factory(Endless, (), 2, hidden=6, context=Steps(2))())


@pytest.mark.parametrize("name", ["Recurrent gru steps", "Recurrent lstm steps", "Markov steps", "Independent steps"])
def test_later_covariates_are_not_read(name):
    net = CONDITIONERS[name]()
    y, context = conditioner_inputs(net)
    moved = context.clone()
    moved[:, 3:] += 1
    change = (net(y, moved) - net(y, context)).abs().amax((0, 2))
    assert (change[:3] == 0).all()
    assert (change[3:] > 1e-6).all()


# Starts


@pytest.mark.parametrize("name", [name for name in CONDITIONERS if not name.startswith("RunningSum")])
def test_phi_starts_small(name, monkeypatch):
    """So that heads start near phi = 0, which is where they are sensible; and not at 0, where parts would stay alike."""
    monkeypatch.setattr(registry, "redraw", lambda module: module)
    torch.manual_seed(0)
    net = CONDITIONERS[name]()
    phi = net(*conditioner_inputs(net, 100))
    assert 0 < phi.abs().max() < 0.5


def test_starts_differ():
    torch.manual_seed(0)
    assert Independent(4, 3).phi.unique().numel() == 12
    for net in (Recurrent((), 2), Recurrent((3,), 2, cell="lstm"), Recurrent(5, 2, hidden=7, cell="elman")):
        assert (net.begin != 0).all() and net.begin.unique().numel() == net.encoder.features


# Calls under vmap


VMAPPED = [
    lambda: factory(NADE, 4, 3, site=2, hidden=6)(),
    lambda: factory(NADE, 4, 3, site=[(), 3, (), 2], hidden=6)(),
    lambda: factory(Markov, 2, 3, order=2, hidden=(5,))(),
    lambda: factory(MADE, 4, 3, site=2, hidden=(8,))(),
    lambda: factory(MADE, 4, 3, site=[(), 3, (), 2], hidden=(8,))(),
]


@pytest.mark.parametrize("make", VMAPPED)
def test_categories_under_vmap(make):
    net = make()
    rows = [conditioner_inputs(net, 5, 4, seed)[0] for seed in range(3)]
    if isinstance(net, NADE) and isinstance(net.site, list):
        bad = rows[0].clone()
        bad[2, 1] = 3
        with pytest.raises(ValueError, match="3 categories"):  # still checked outside of vmap
            net(bad)

    def by_chunks(y):
        phi, state = net.start(None, len(y))
        first, state = net.extend(y[:, :1], state)
        return torch.cat([phi.unsqueeze(1), first, net.extend(y[:, 1:-1], state)[0]], 1)

    expected = torch.stack([net(y) for y in rows])
    for call in (net, by_chunks):
        torch.testing.assert_close(vmap(call)(torch.stack(rows)), expected, rtol=0, atol=1e-12)


# Recurrent


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
@pytest.mark.parametrize("context", [0, 2, Steps(2)])
def test_recurrent_by_hand(cell, context):
    net = factory(Recurrent, 4, 3, hidden=5, cell=cell, layers=2, context=context, width=6)()
    y, x = conditioner_inputs(net, rows=3, sites=6)
    cells = [
        {"elman": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[cell](n, 5).double()
        for n in (8 if x is not None else 6, 5)
    ]
    for i, layer in enumerate(cells):
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(layer, part).data = getattr(net.rnn, f"{part}_l{i}").data
    states, phis = [None, None], []
    for t in range(6):
        below = net.begin.expand(3, 6) if t == 0 else net.encoder.weight[y[:, t - 1]]
        if x is not None:
            below = torch.cat([below, x if x.dim() == 2 else x[:, t]], 1)
        for i, layer in enumerate(cells):
            states[i] = layer(below, states[i])
            below = states[i][0] if cell == "lstm" else states[i]
        phis.append(below @ net.last.weight.t() + net.last.bias)
    torch.testing.assert_close(net(y, x), torch.stack(phis, 1), rtol=0, atol=1e-12)


def test_recurrent_real_sites_by_hand():
    net = factory(Recurrent, (3,), 2, hidden=5)()
    y, _ = conditioner_inputs(net)
    out, _ = net.rnn(torch.cat([net.begin.expand(6, 1, 3), y[:, :-1]], 1))
    torch.testing.assert_close(net(y), net.last(out), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_recurrent_weights_of_the_call(cell):
    """functional_call, bound copies and pickles use the weights that they should, in forward and step by step."""
    make = factory(Recurrent, (), 2, hidden=6, cell=cell, layers=2, context=1)
    net, other = make(), redraw(make(), 7)
    y, x = conditioner_inputs(net)
    before, expected = net(y, x), other(y, x)
    weights = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    got = functional_call(net, weights, (y, x))
    assert torch.equal(got, expected)
    for grad in torch.autograd.grad(got.square().sum(), list(weights.values())):
        assert grad.abs().max() > 0
    for grad in torch.autograd.grad(net(y, x).square().sum(), list(net.parameters())):
        assert grad.abs().max() > 0

    bound, tensors = bind(net)
    assert {id(t) for t in tensors} == {id(p) for p in net.parameters()}
    for name in ("weight_ih_l0", "weight_hh_l1"):  # replaced on the module, not in the copy
        setattr(net.rnn, name, nn.Parameter(2 * getattr(net.rnn, name).detach()))
    assert not torch.allclose(net(y, x), before)
    for module in (bound, pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)):
        assert torch.equal(module(y, x), before)
        phi, state = module.start(x, len(y))
        torch.testing.assert_close(
            torch.cat([phi.unsqueeze(1), module.extend(y[:, :-1], state)[0]], 1), before, rtol=0, atol=1e-12
        )


class Model(pyro.nn.PyroModule):
    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self):
        return self.call(self.net)


def in_a_model(net, call):
    """The trace and the value of a call of a PyroModule inside another one's."""
    trace = pyro.poutine.trace(Model(net, call)).get_trace()
    return trace, trace.nodes["_RETURN"]["value"]


@pytest.mark.parametrize("name", ["Recurrent gru layers", "Recurrent lstm", "Recurrent elman", "Markov", "NADE"])
def test_priors_on_weights(name):
    net = CONDITIONERS[name]()
    y, context = conditioner_inputs(net)
    plain = copy.deepcopy(net)
    shapes = {key: p.shape for key, p in net.named_parameters()}
    to_pyro_module_(net)
    for key, shape in shapes.items():
        owner, _, leaf = key.rpartition(".")
        prior = dist.Normal(torch.zeros(shape, dtype=torch.float64), 0.5).to_event(len(shape))
        setattr(net.get_submodule(owner), leaf, PyroSample(prior))
    pyro_copy = copy.deepcopy(net)
    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(net).get_trace(y, context)
    drawn = {key: trace.nodes[key]["value"] for key in shapes}
    assert torch.equal(trace.nodes["_RETURN"]["value"], functional_call(plain, drawn, (y, context)))

    trace, bound = in_a_model(pyro_copy, lambda net: bind(net)[0])  # it keeps its draw, in every view
    drawn = {key: trace.nodes[f"net.{key}"]["value"] for key in shapes}
    expected = functional_call(plain, drawn, (y, context))
    assert torch.equal(bound(y, context), expected)
    _, state = bound.start(context, len(y))
    torch.testing.assert_close(bound.extend(y[:, :-1], state)[0], expected[:, 1:], rtol=0, atol=1e-12)


def test_made_dropout_is_that_of_the_same_network_in_eval():
    net = factory(MADE, 4, 2, hidden=(64,), context=1, activation=torch.tanh, dropout=0.5)()
    same = factory(MADE, 4, 2, hidden=(64,), context=1, activation=torch.tanh)()
    same.load_state_dict(net.state_dict())
    y, context = conditioner_inputs(net)
    assert torch.equal(net.eval()(y, context), same(y, context)) and net.has_adjoint
    assert not net.train().has_adjoint and "dropout=0.5" in repr(net)


@pytest.mark.parametrize("grad", [False, True])
def test_made_drops_the_same_way_in_both_views(grad):
    """Many rows alike: the mean is that of the whole network, which is linear in what is dropped; deviations agree."""
    net = factory(MADE, 4, 2, hidden=(64,), activation=torch.tanh, dropout=0.5)()
    y, _ = conditioner_inputs(net, rows=1)
    many, whole = y.expand(8000, -1), net.eval()(y)[0]
    net.train()
    with torch.set_grad_enabled(grad):
        phi, state = net.start(None, 8000)
        stepped = torch.cat([phi.unsqueeze(1), net.extend(many[:, :1], state)[0]], 1)
        phi, state = net.extend(many[:, 1:3], net.extend(many[:, :1], net.start(None, 8000)[1])[1])
    draws = {"parallel": net(many), "one site": stepped, "two sites": phi}
    sites = {"parallel": slice(None), "one site": slice(0, 2), "two sites": slice(2, 4)}
    spread = draws["parallel"].std(0)
    for name, values in draws.items():
        at = sites[name]
        errors = spread[at] / 8000**0.5
        read = spread[at] > 0  # the first site reads nothing
        assert ((values.mean(0) - whole[at]).abs()[read] < 4.5 * errors[read]).all(), name
        assert ((values.std(0) / spread[at] - 1).abs()[read] < 0.05).all(), name


def test_gradients_of_the_inverse_while_units_are_dropped():
    net, head = factory(MADE, 4, 2, hidden=(16,), activation=torch.tanh, dropout=0.5)(), heads.Affine()
    t = AutoregressiveTransform(net, head)()
    y, _ = conditioner_inputs(net, rows=3)

    def of_seed(y):
        torch.manual_seed(3)
        return t.inv(y.clone())

    assert torch.autograd.gradcheck(of_seed, y.requires_grad_(), fast_mode=True)
    model = Autoregressive(net, heads.Normal(), (4,))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(model().rsample((5,)).sum(), [*net.parameters()]))


@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_dropout(layers):
    net = factory(Recurrent, (), 2, hidden=64, layers=layers, dropout=0.5)()
    y, _ = conditioner_inputs(net)
    same = factory(Recurrent, (), 2, hidden=64, layers=layers)()
    same.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(y), same(y))
    torch.manual_seed(0)
    draws = net.train()(y[:1].expand(4000, -1)).unflatten(0, (4000, 1))
    assert draws.std(0).min() > 0
    if layers == 1:  # dropout keeps the mean of what the linear read-out reads
        assert ((draws.mean(0) - same(y[:1])).abs() / draws.std(0) * 4000**0.5).max() < 4.5
    with torch.no_grad():
        phi, state = net.train().start(None, 6)
        assert not torch.equal(phi, net.start(None, 6)[0])
        net.extend(y[:, :2], state)


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
def test_recurrent_dropout_is_between_layers_too(cell):
    """The same numbers as those of torch's own module with its dropout between layers, and one more after the last."""
    net = factory(Recurrent, (3,), 2, hidden=8, layers=3, cell=cell, dropout=0.5)().train()
    kind = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell]
    other = kind(3, 8, 3, batch_first=True, dropout=0.5).double().train()
    other.load_state_dict(net.rnn.state_dict())
    y, _ = conditioner_inputs(net)
    torch.manual_seed(0)
    phi = net(y)
    torch.manual_seed(0)
    out, _ = other(torch.cat([net.begin.expand(6, 1, 3), y[:, :-1]], 1))
    torch.testing.assert_close(phi, net.last(nn.functional.dropout(out, 0.5)), rtol=0, atol=1e-12)


def test_recurrent_state_does_not_grow():
    net = CONDITIONERS["Recurrent lstm"]()
    _, x = conditioner_inputs(net)
    _, state = net.start(x, 6)
    sizes = [[h.shape for h in state.hidden]]
    for _ in range(3):
        _, state = net.extend(torch.ones(6, 4, 2, dtype=torch.float64), state)
        sizes.append([h.shape for h in state.hidden])
    assert state.position == 12
    assert sizes == [[(2, 6, 6)] * 2] * 4


def test_huge_values_stay_finite():
    for name in ("Recurrent gru", "Recurrent lstm", "Markov", "NADE context"):
        net = CONDITIONERS[name]()
        y, context = conditioner_inputs(net)
        y = (1e8 * y).requires_grad_()
        phi = net(y, context)
        grads = torch.autograd.grad(phi.sum(), [y, *net.parameters()])
        assert all(value.isfinite().all() for value in (phi, *grads))


# Independent


def test_independent_is_constant_in_history():
    for name in ("Independent", "Independent context", "Independent steps"):
        net = CONDITIONERS[name]()
        (y, x), (other, _) = conditioner_inputs(net), conditioner_inputs(net, seed=1)
        assert torch.equal(net(y, x), net(other, x))
    phi = CONDITIONERS["Independent"]()
    assert torch.equal(phi(torch.zeros(3, 5, dtype=torch.float64)), phi.phi.expand(3, 5, 2))


def test_independent_steps_share_a_network():
    net = CONDITIONERS["Independent steps"]()
    y, x = conditioner_inputs(net)
    same = x[:, :1].expand(-1, 5, -1)
    torch.testing.assert_close(net(y, same), net(y, same)[:, :1].expand(-1, 5, -1))


# Markov


def test_markov_by_hand():
    net = CONDITIONERS["Markov context"]()
    y, x = conditioner_inputs(net, rows=3)
    for b in range(3):
        for t in range(5):
            window = []
            for s in (t - 2, t - 1):
                window += [net.encoder.weight[y[b, s]], torch.ones(1)] if s >= 0 else [torch.zeros(8), torch.zeros(1)]
            phi = net.net(torch.cat([*window, x[b]]))
            torch.testing.assert_close(net(y, x)[b, t], phi, rtol=0, atol=1e-12)


def test_markov_knows_how_much_history_it_has():
    net = CONDITIONERS["Markov"]()
    phi = net(torch.zeros(1, 5, dtype=torch.float64))[0]
    assert (phi[0] != phi[1]).all()
    assert (phi[1] != phi[2]).all()
    torch.testing.assert_close(phi[2], phi[3])


# NADE


def naive_nade(net, y, x=None, order=None):
    """One site at a time, site i being variable order[i]; one unit vector a category."""
    T, order = net.num_sites, range(net.num_sites) if order is None else order.tolist()
    kinds = net.site if isinstance(net.site, list) else [net.site] * T
    widths = [kind if isinstance(kind, int) else kind[0] if kind else 1 for kind in kinds]
    phi = torch.zeros(len(y), T, net.num_params, dtype=torch.float64)
    for b in range(len(y)):
        a = net.hidden_bias.clone()
        if x is not None:
            a = a + net.hidden_context @ x[b]
        for i, t in enumerate(order):
            phi[b, i] = net.activation(a) @ net.readout[t] + net.bias[t]
            if x is not None:
                phi[b, i] += x[b] @ net.readout_context[t]
            value = y[b, i]
            inputs = torch.eye(kinds[t], dtype=torch.float64)[int(value)] if isinstance(kinds[t], int) else value
            first = sum(widths[:t])
            a = a + inputs.reshape(-1) @ net.weight[first : first + widths[t]]
    return phi


@pytest.mark.parametrize("name", [name for name in CONDITIONERS if name.startswith("NADE")])
def test_nade_by_hand(name):
    net = CONDITIONERS[name]()
    y, x = conditioner_inputs(net, rows=3)
    torch.testing.assert_close(net(y, x), naive_nade(net, y, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("site", [(), (2,), 3, [(), 3, (), 2, 4, ()] * 3], ids=str)
@pytest.mark.parametrize("context", [0, 2])
def test_nade_in_panels(site, context, monkeypatch):
    """Four panels of 4 sites and one of 1: values and gradients, every chunk length, and no site leaks into earlier ones."""
    monkeypatch.setattr(nade, "_TILE", 0)
    net = factory(NADE, 18, 2, site=site, hidden=6, context=context)()
    y, x = conditioner_inputs(net, rows=3)
    inputs = list(net.parameters())
    if not isinstance(site, int):
        inputs.append(y.requires_grad_())
    phi, expected = net(y, x), naive_nade(net, y, x)
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(value.sin().sum(), inputs) for value in (phi, expected)]
    for got, truth in zip(*grads, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10)
    testing.chunks(net)
    if not isinstance(site, int):
        bad = y.detach().clone()
        bad[:, 11] = torch.nan  # a real site in every list
        changed = net(bad, x)
        assert torch.equal(changed[:, :12], phi[:, :12]) and changed[:, 12:].isnan().all()


# Orders


def test_nade_permuted_by_hand():
    for name, order in (
        ("NADE context", ORDER),
        ("NADE categories", ORDER),
        ("NADE vectors", torch.tensor([2, 0, 3, 1])),
    ):
        net = CONDITIONERS[name]()
        y, x = conditioner_inputs(net, rows=3)
        torch.testing.assert_close(net.permuted(order)(y, x), naive_nade(net, y, x, order), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"context": 2, "hidden": (12, 10)},
        {"hidden": (12,), "direct": True, "site": 3},
        {"hidden": (), "context": 1, "site": (2,)},
    ],
)
def test_made_permuted_by_hand(options):
    net = factory(MADE, 5, 2, **options)()
    y, x = conditioner_inputs(net)
    other = factory(MADE, 5, 2, **options)()
    k = {(): 1, 3: 3, (2,): 2}[net.site]
    with torch.no_grad():
        for i, v in enumerate(ORDER.tolist()):
            ins, of = (
                (slice(i * k, (i + 1) * k), slice(v * k, (v + 1) * k)),
                (slice(2 * i, 2 * i + 2), slice(2 * v, 2 * v + 2)),
            )
            columns, rows = ins, of
            if len(net.layers) > 1:
                other.layers[0].weight[:, columns[0]] = net.layers[0].weight[:, columns[1]]
                other.layers[-1].weight[rows[0]] = net.layers[-1].weight[rows[1]]
            links = [(other.layers[0], net.layers[0])] if len(net.layers) == 1 else []
            links += [(other.direct, net.direct)] if net.direct is not None else []
            for into, source in links:
                for j, u in enumerate(ORDER.tolist()):
                    into.weight[rows[0], j * k : (j + 1) * k] = source.weight[rows[1], u * k : (u + 1) * k]
            other.layers[-1].bias[rows[0]] = net.layers[-1].bias[rows[1]]
            if x is not None:
                other.layers[-1].context_weight[rows[0]] = net.layers[-1].context_weight[rows[1]]
    assert torch.equal(net.permuted(ORDER)(y, x), other(y, x))
    assert not torch.allclose(net(y, x), other(y, x))
    assert torch.equal(net.permuted(torch.arange(5))(y, x), net(y, x))
    testing.causality(other)


def test_independent_permuted_by_hand():
    for name in ("Independent", "Independent steps"):
        net = CONDITIONERS[name]()
        y, x = conditioner_inputs(net)
        there = net.permuted(ORDER)(y, x if x is None else x[:, ORDER])
        assert torch.equal(there, net(y, x)[:, ORDER])
    net = factory(Independent, 5, 2, context=2)()
    y, x = conditioner_inputs(net)
    torch.testing.assert_close(net.permuted(ORDER)(y, x), net(y, x)[:, ORDER], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["MADE", "NADE context", "Independent"])
def test_permuted_reaches_the_parameters(name):
    net = factory(MADE, 5, 2, hidden=(12,), direct=True)() if name == "MADE" else CONDITIONERS[name]()
    y, x = conditioner_inputs(net)
    kept = {key: p.detach().clone() for key, p in net.named_parameters()}
    grads = torch.autograd.grad(net.permuted(ORDER)(y, x).square().sum(), list(net.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)
    assert all(torch.equal(p, kept[key]) for key, p in net.named_parameters())
    here, there = net(y, x), net.permuted(ORDER).permuted(ORDER.argsort())(y, x)
    assert torch.equal(here, there)


@pytest.mark.parametrize("name", ["MADE permuted", "MADE direct permuted"])
def test_permuted_sweep(name):
    """The reverse sweep of a permuted MADE gives the gradients of the parameters that it was made of."""
    source = factory(MADE, 5, 2, hidden=(12, 10), context=2, direct="direct" in name)()

    y, x = conditioner_inputs(source, 4)
    head = heads.Affine().double()
    transform = ConditionedAutoregressive(source.permuted(ORDER), head, x)
    got = transform.inv(y)
    parameters = list(source.parameters())
    sweep = torch.autograd.grad(got.square().sum(), parameters)
    net, xs = source.permuted(ORDER), []
    phi, state = net.start(x, 4)
    phi = phi.unsqueeze(1)
    for t in range(5):
        if t:
            phi, state = net.extend(xs[-1], state)
        xs.append(head(phi).inv(y[:, t : t + 1]))
    for a, b in zip(sweep, torch.autograd.grad(torch.cat(xs, 1).square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_permuted_with_computed_weights():
    """Weights that are no parameters: parametrised, or drawn from a prior."""
    for make, owner, leaf in (
        (factory(MADE, 5, 2, hidden=(12,)), "layers.0", "weight"),
        (factory(NADE, 5, 2, hidden=7), "", "weight"),
        (factory(Independent, 5, 2, context=2), "net.last", "weight"),
    ):
        net = make()
        y, x = conditioner_inputs(net)
        weight = net.get_parameter(f"{owner}.{leaf}".lstrip("."))
        expected = functional_call(net, {f"{owner}.{leaf}".lstrip("."): 2 * weight}, (y, x))

        class Twice(nn.Module):
            def forward(self, w):
                return 2 * w

        computed = copy.deepcopy(net)
        nn.utils.parametrize.register_parametrization(computed.get_submodule(owner), leaf, Twice())
        torch.testing.assert_close(computed(y, x), expected)
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(computed.permuted(ORDER)(y, x), net.permuted(ORDER)(y, x))

        prior = dist.Normal(torch.zeros_like(weight), 1.0).to_event(2)
        to_pyro_module_(computed := copy.deepcopy(net))
        setattr(computed.get_submodule(owner), leaf, PyroSample(prior))
        trace, bound = in_a_model(computed, lambda net: net.permuted(ORDER))
        value = trace.nodes[".".join(filter(None, ["net", owner, leaf]))]["value"]
        with torch.no_grad():
            weight.copy_(value)
        torch.testing.assert_close(
            bound(y, x), net.permuted(ORDER)(y, x), rtol=1e-13, atol=1e-13
        )  # products of other strides


# Errors


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: Recurrent((), 2, cell="rnn"), r"Expected cell in \['elman', 'gru', 'lstm'\]; got 'rnn'\."),
        (lambda: Recurrent((), 2, dropout=1.0), r"Expected 0 <= dropout < 1; got 1\.0\."),
        (lambda: MADE(3, 2, dropout=1.0), r"Expected 0 <= dropout < 1; got 1\.0\."),
        (lambda: Recurrent(3, 2, hidden=(4,)), r"Expected hidden to be an integer >= 1; got \(4,\)\."),
        (lambda: Recurrent(3, 2, width=(4,)), r"Expected width to be an integer >= 1; got \(4,\)\."),
        (lambda: Recurrent((), (2,)), r"Expected num_params to be an integer >= 1; got \(2,\)\."),
        (lambda: Recurrent((), 2, context=(3,)), r"Expected context to be an integer >= 0; got \(3,\)\."),
        (lambda: NADE(3, 2, hidden=[4]), r"Expected hidden to be an integer >= 1; got \[4\]\."),
        (lambda: NADE(3, 2, context=[4]), r"Expected context to be an integer >= 0; got \[4\]\."),
        (lambda: MADE((3,), 2), r"Expected num_sites to be an integer >= 1; got \(3,\)\."),
        (lambda: Independent(3, [2]), r"Expected num_params to be an integer >= 1; got \[2\]\."),
        (lambda: Markov((), 2, order=(1,)), r"Expected order to be an integer >= 1; got \(1,\)\."),
        (lambda: Recurrent(1.5, 2), r"Expected site to be \(\), \(k,\) or an integer; got 1\.5\."),
        (lambda: Recurrent((2, 3), 2), r"Expected site to be \(\), \(k,\) or an integer; got \(2, 3\)\."),
        (lambda: Markov((2, 3), 2, order=1), r"Expected site to be \(\), \(k,\) or an integer; got \(2, 3\)\."),
        (lambda: NADE(3, 2, site=(2, 3)), r"Expected site to be \(\), \(k,\) or an integer; got \(2, 3\)\."),
        (lambda: MADE(3, 2, site=(2, 3)), r"Expected site to be \(\), \(k,\) or an integer; got \(2, 3\)\."),
        (lambda: Independent(3, 2, site="a"), r"Expected site to be \(\), \(k,\) or an integer; got a\."),
        (lambda: Recurrent((), 2, layers=0), r"Expected layers to be an integer >= 1; got 0\."),
        (lambda: Recurrent([3, 3], 2), r"Expected site to be one kind, the same at every site; got \[3, 3\]\."),
        (lambda: Recurrent(0, 2), r"Expected site to be an integer >= 1; got 0\."),
        (lambda: Recurrent((), 2, context=-1), r"Expected context to be an integer >= 0; got -1\."),
        (lambda: Markov((), 2, order=0), r"Expected order to be an integer >= 1; got 0\."),
        (lambda: Markov((), 2, order=1, hidden=8), r"Expected hidden to be a sequence of integers >= 1; got 8\."),
        (lambda: NADE(3, 2, activation=0), r"Expected activation to be a function; got 0\."),
        (
            lambda: NADE(3, 2, site=[3, ()]),
            r"Expected site to be one kind or a list of 3 scalar kinds, .*; got \[3, \(\)\]",
        ),
        (lambda: NADE(3, 2, context=Steps(2)), r"Expected context to be an integer >= 0; got Steps\(features=2\)\."),
        (lambda: Independent(0, 2), r"Expected num_sites to be an integer >= 1; got 0\."),
        (
            lambda: Recurrent(4, 2)(torch.tensor([[1, 4, 0]])),
            r"Expected integers 0 \.\.\. 3 at a site with 4 categories; got 1 \.\.\. 4\.",
        ),
        (
            lambda: Markov(4, 2, order=1)(torch.tensor([[0.5, 0.0]])),
            r"Expected integers 0 \.\.\. 3 at a site with 4 categories; got 0\.5\.",
        ),
        (
            lambda: NADE(3, 2, site=4)(torch.tensor([[1, -1, 0]])),
            r"Expected integers 0 \.\.\. 3 at a site with 4 categories; got -1 \.\.\. 1\.",
        ),
        (
            lambda: NADE(4, 2, site=[(), 3, 2, ()])(torch.tensor([[9.0, 2.0, 2.0, 0.0]])),
            r"Expected integers 0 \.\.\. 1 at a site with 2 categories; got 2 \.\.\. 2\.",
        ),
        (
            lambda: NADE(4, 2, site=[(), 3, 2, ()])(torch.tensor([[9.0, 1.5, 1.0, 0.0]])),
            r"Expected integers 0 \.\.\. 2 at a site with 3 categories; got 1\.5\.",
        ),
        (
            lambda: NADE(3, 2)(torch.zeros(2, 4)),
            r"Expected y\.shape\[1:\] == \(3,\) \(sites and site of NADE\); got \(2, 4\)",
        ),
        (
            lambda: Recurrent((3,), 2)(torch.zeros(2, 4)),
            r"Expected y\.shape\[2:\] == \(3,\) \(sites and site of Recurrent\); got \(2, 4\)",
        ),
        (
            lambda: Recurrent((), 2)(torch.zeros(2, 4, dtype=torch.float64)),
            r"Expected y\.dtype == torch\.float32 \(that of the parameters\); got torch\.float64\.",
        ),
        (
            lambda: Recurrent((), 2, context=3)(torch.zeros(2, 4)),
            r"Expected a context \(\*batch, 3\) \(Recurrent built with context=3\); got none\.",
        ),
        (
            lambda: Markov((), 2, order=1, context=Steps(3))(torch.zeros(2, 4), torch.zeros(2, 4, 2)),
            r"Expected context\.shape\[-1\] == 3 \(Markov built with context=Steps\(3\)\); got \(2, 4, 2\)\.",
        ),
        (
            lambda: Recurrent((), 2, context=Steps(3))(torch.zeros(2, 4), torch.zeros(2, 3, 3)),
            r"Expected context\.shape\[1\] >= 4 \(covariates for as many sites\); got \(2, 3, 3\)\.",
        ),
        (
            lambda: Independent(4, 2, context=Steps(3))(torch.zeros(2, 4), torch.zeros(2, 5, 3)),
            r"Expected context\.shape\[1\] == 4 \(covariates of every site\); got \(2, 5, 3\)\.",
        ),
        (
            lambda: MADE(3, 2, site=[3, 3, 2]).permuted(torch.arange(3)),
            r"Expected sites of one kind, to visit them in another order \(MADE\); got site=\[3, 3, 2\]\.",
        ),
        (
            lambda: MADE(3, 2, adjacency=torch.ones(3, 3).tril(-1).bool()).permuted(torch.arange(3)),
            r"Expected adjacency == None, to visit sites in another order; got a matrix",
        ),
        (
            lambda: NADE(3, 2).permuted(torch.tensor([0, 2, 2])),
            r"Expected order to be a permutation of 0 \.\.\. 2 \(the sites\); got \[0, 2, 2\]\.",
        ),
        (
            lambda: Independent(3, 2).permuted(torch.arange(4)),
            r"Expected order to be a permutation of 0 \.\.\. 2 \(the sites\); got \[0, 1, 2, 3\]\.",
        ),
    ],
)
def test_errors(run, message):
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((2, 3), r"Expected y\.shape\[1\] between 1 and 2 \(0 of 3 sites were read .*; got \(2, 3\)\."),
        ((2, 0), r"Expected y\.shape\[1\] between 1 and 2"),
        ((2, 1, 5), r"Expected y\.shape\[2:\] == \(\) \(site of \w+\); got \(2, 1, 5\)\."),
    ],
)
@pytest.mark.parametrize("kind", [MADE, NADE, Independent])
def test_errors_of_extend(kind, sites, message):
    net = kind(3, 2)
    _, state = net.start(None, 2)
    with pytest.raises(ValueError, match=message):
        net.extend(torch.zeros(sites), state)


@pytest.mark.parametrize("name", ["Recurrent gru steps", "Markov steps"])
def test_bad_input_does_not_consume(name):
    net = CONDITIONERS[name]()
    y, x = conditioner_inputs(net)
    _, state = net.start(x, len(y))
    for bad in (y, y[:, :0], y[:, :1].unsqueeze(-1).expand(*y[:, :1].shape, 5)):
        with pytest.raises(ValueError):
            net.extend(bad, state)
    torch.testing.assert_close(net.extend(y[:, :-1], state)[0], net(y, x)[:, 1:])
