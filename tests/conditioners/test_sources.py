"""Sources of transformers and recurrent networks: padding, empty ones, lengths, errors."""

from math import inf, nan

import pytest
import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact.conditioners import Recurrent, StateSpace, Transformer
from pyro_genexact.contexts import PaddedSequence, Source
from pyro_genexact.testing import conditioner_inputs
from support.networks import by_sites
from support.registry import CONDITIONERS
from support.registry.conditioners import factory
from support.values import F64

SOURCES = [
    "Transformer source",
    "Recurrent gru source",
    "Recurrent lstm categories, source padded",
    "CausalConv categories, source padded",
    "StateSpace selective categories, source padded",
]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("fill", [nan, inf, 1e30])
def test_padding_of_a_source_never_matters(name, fill):
    net = CONDITIONERS[name]()
    y, context = conditioner_inputs(net, rows=8, padded=True)
    beyond = context.values.isnan()
    assert beyond.all(2).any(1).tolist() == [True, True, True, False] * 2
    values = context.values.nan_to_num().requires_grad_()
    filled = values.detach().masked_fill(beyond, fill).requires_grad_()
    phi, same = (net(y, PaddedSequence(v, context.lengths)) for v in (values, filled))
    assert torch.equal(phi, same)
    assert torch.equal(by_sites(net, y, PaddedSequence(filled, context.lengths))[0], by_sites(net, y, context)[0])
    grads = torch.autograd.grad(same.square().sum(), [filled, *net.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][beyond] == 0).all() and (grads[0][~beyond] != 0).all()
    longer = torch.cat([filled.detach(), torch.full((8, 2, 2), fill, dtype=F64)], 1)
    torch.testing.assert_close(net(y, PaddedSequence(longer, context.lengths)), phi, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOURCES)
def test_empty_sources_add_zero(name):
    net = CONDITIONERS[name]()
    y, source = conditioner_inputs(net, rows=4)
    empty = net(y, PaddedSequence(source, torch.zeros(4, dtype=torch.long)))
    assert torch.equal(empty, net(y, source[:, :0]))
    assert torch.equal(empty, net(y, PaddedSequence(source[:, :0], torch.zeros(4, dtype=torch.long))))
    torch.testing.assert_close(by_sites(net, y, source[:, :0])[0], empty, rtol=0, atol=1e-12)
    for g in torch.autograd.grad(empty.sum(), list(net.parameters()), allow_unused=True, materialize_grads=True):
        assert g.isfinite().all()
    with torch.no_grad():  # whatever the weights that read it
        for part in net.modules():
            for key in ("source", "query", "read_source"):
                if isinstance(getattr(part, key, None), nn.Linear):
                    getattr(part, key).weight.mul_(-3)
    assert torch.equal(net(y, source[:, :0]), empty)
    assert not torch.allclose(net(y, source), empty)


@pytest.mark.parametrize("name", SOURCES)
def test_full_lengths_change_nothing(name):
    net = CONDITIONERS[name]()
    y, source = conditioner_inputs(net, rows=4)
    full = PaddedSequence(source, torch.full((4,), source.shape[1]))
    torch.testing.assert_close(net(y, full), net(y, source), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_source_by_hand(cell):
    net = factory(Recurrent, (3,), 2, hidden=5, cell=cell, layers=2, context=Source(2))()
    y, context = conditioner_inputs(net, rows=8, padded=True)
    h, _ = net.rnn(torch.cat([net.begin.expand(8, 1, 3), y[:, :-1]], 1))
    found = torch.zeros_like(h)
    for b, n in enumerate(context.lengths.tolist()):
        read = context.values[b, :n] @ net.read_source.weight.T
        for t in range(5):
            weights = (read @ h[b, t] / 5**0.5).softmax(0)
            found[b, t] = sum((weights[s] * read[s] for s in range(n)), torch.zeros(5, dtype=F64))
    joined = torch.tanh(torch.cat([h, found], 2) @ net.join.weight.T + net.join.bias)
    torch.testing.assert_close(net(y, context), joined @ net.last.weight.T + net.last.bias, rtol=0, atol=1e-12)


def test_translations_have_total_mass_one():
    net, head = CONDITIONERS["Transformer categories, source padded"](), gx.heads.Categorical(3)
    _, context = conditioner_inputs(net, rows=4, padded=True)
    d = gx.distributions.AutoregressiveDistribution(
        net, head, (4,), context.values, source_lengths=context.lengths, validate_args=True
    )
    y = d.enumerate_support()
    assert y.shape == (81, 4, 4)
    log_prob = d.log_prob(y)
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(4, dtype=F64), rtol=0, atol=1e-12)
    assert (log_prob[:, 1:] - log_prob[:, :1]).abs().amax(0).min() > 1e-3
    assert d.sample((5,)).shape == (5, 4, 4)


@pytest.mark.parametrize("make", [Transformer, Recurrent, StateSpace])
@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (None, ValueError, r"Expected a context \(\*batch, S, 3\) \(\w+ built with context=Source\(3\)\); got none\."),
        (torch.zeros(2, 5, 4), ValueError, r"Expected context\.shape\[-1\] == 3 .*; got \(2, 5, 4\)\."),
        (torch.zeros(2, 3), ValueError, r"Expected context\.shape == \(2, S, 3\) \(sources\); got \(2, 3\)\."),
        (
            torch.zeros(1, 5, 3),
            ValueError,
            r"Expected context\.shape\[0\] == 2 \(rows of the batch\); got \(1, 5, 3\)\.",
        ),
        (
            PaddedSequence(torch.zeros(2, 5, 3), torch.tensor([5])),
            ValueError,
            r"Expected context\.lengths\.shape == \(2,\) \(rows of the batch\); got \(1,\)\.",
        ),
        (
            PaddedSequence(torch.zeros(2, 5, 3), torch.tensor([5.0, 1.0])),
            TypeError,
            r"Expected context\.lengths to be a tensor of integers; got torch\.float32\.",
        ),
        (
            PaddedSequence(torch.zeros(2, 5, 3), torch.tensor([6, 1])),
            ValueError,
            r"Expected context\.lengths between 0 and 5 \(steps of the source\); got 6\.",
        ),
        (
            PaddedSequence(torch.zeros(2, 5, 3), torch.tensor([0, -1])),
            ValueError,
            r"Expected context\.lengths between 0 and 5 \(steps of the source\); got -1\.",
        ),
        (
            PaddedSequence(torch.zeros(2, 5, 3, dtype=F64), torch.tensor([0, 1])),
            ValueError,
            r"Expected context\.dtype == torch\.float32",
        ),
    ],
)
def test_errors_of_sources(make, context, error, message):
    sizes = {Transformer: {"width": 8, "num_heads": 2}, Recurrent: {"hidden": 4}, StateSpace: {"width": 4, "depth": 1}}
    net = make((), 2, context=Source(3), **sizes[make])
    with pytest.raises(error, match=message):
        net(torch.zeros(2, 4), context)
    with pytest.raises(error, match=message):
        net.start(context, 2)
