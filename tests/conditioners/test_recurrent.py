"""Recurrent networks against torch's own, weights of the call, dropout."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pyro_genexact.conditioners.recurrent import Recurrent
from pyro_genexact.contexts import Covariates
from pyro_genexact.core.binding import Bound
from pyro_genexact.testing import conditioner_inputs, redraw
from support.registry import CONDITIONERS
from support.registry.conditioners import factory


@pytest.mark.parametrize("cell", ["elman", "gru", "lstm"])
@pytest.mark.parametrize("context", [0, 2, Covariates(2)])
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

    bound = Bound(net)
    assert {id(t) for t in bound.tensors} == {id(p) for p in net.parameters()}
    for name in ("weight_ih_l0", "weight_hh_l1"):  # replaced on the module, not in the copy
        setattr(net.rnn, name, nn.Parameter(2 * getattr(net.rnn, name).detach()))
    assert not torch.allclose(net(y, x), before)
    bound = bound.module
    for module in (bound, pickle.loads(pickle.dumps(bound)), copy.deepcopy(bound)):
        assert torch.equal(module(y, x), before)
        phi, state = module.start(x, len(y))
        torch.testing.assert_close(
            torch.cat([phi.unsqueeze(1), module.extend(y[:, :-1], state)[0]], 1), before, rtol=0, atol=1e-12
        )


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
    sizes = [[h.shape for h in state.memory]]
    for _ in range(3):
        _, state = net.extend(torch.ones(6, 4, 2, dtype=torch.float64), state)
        sizes.append([h.shape for h in state.memory])
    assert state.position == 12
    assert sizes == [[(2, 6, 6)] * 2] * 4


def test_huge_values_stay_finite():
    for name in ("Recurrent gru", "Recurrent lstm", "Markov", "NADE context", "CausalConv", "StateSpace selective"):
        net = CONDITIONERS[name]()
        y, context = conditioner_inputs(net)
        y = (1e8 * y).requires_grad_()
        phi = net(y, context)
        grads = torch.autograd.grad(phi.sum(), [y, *net.parameters()])
        assert all(value.isfinite().all() for value in (phi, *grads))
