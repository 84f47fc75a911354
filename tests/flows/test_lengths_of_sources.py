"""Flows over sequences that read sources, each row of its own length."""

from __future__ import annotations

from math import nan

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import flows, heads, transforms
from support.checks import close, fails
from support.flows_of_lengths import LENGTHS, markov, recurrent, transformer
from support.values import built, sized

T = 5
SOURCE_LENGTHS = torch.tensor([1, 4, 0, 5, 2, 3])


@pytest.mark.parametrize("net", [transformer, recurrent])
@pytest.mark.parametrize("recipe", [flows.maf, flows.iaf])
@pytest.mark.parametrize("own", [None, LENGTHS])
def test_each_row_reads_its_own_source(net, recipe, own):
    """As if the source had no more steps, in density, samples and gradients; padding is not read."""
    flow = built(recipe(T, conditioner=net, context=gx.Source(2), transforms=2))
    source, y = sized(6, 7, 2, seed=1), sized(6, T, seed=2)
    padding = torch.arange(7) >= SOURCE_LENGTHS.unsqueeze(1)
    filled = source.masked_fill(padding.unsqueeze(2), nan).requires_grad_()
    ds = flow(filled, own, source_lengths=SOURCE_LENGTHS), flow(gx.PaddedSequence(filled, SOURCE_LENGTHS), own)
    log_prob = ds[0].log_prob(y)
    close(ds[1].log_prob(y), log_prob)
    close(flow.condition(filled, own, SOURCE_LENGTHS).log_prob(y), log_prob)
    torch.manual_seed(4)
    drawn = ds[0].rsample((2,))
    torch.manual_seed(4)
    noise = ds[0].base_dist.sample((2,))
    got = torch.autograd.grad((log_prob + drawn.sin().sum((0, 2))).sum(), [filled, *flow.parameters()])
    assert (got[0][padding] == 0).all() and got[0].isfinite().all()
    wanted = [torch.zeros_like(g) for g in got]
    for row, n in enumerate(SOURCE_LENGTHS.tolist()):
        short = source[row, :n].clone().requires_grad_()
        d = flow(short) if own is None else flow(short, own[row])
        expected, sample = d.log_prob(y[row]), d.transforms[0](noise[:, row])
        close(log_prob[row], expected)
        close(drawn[:, row], sample)
        loss = expected + sample.sin().sum()
        grads = torch.autograd.grad(loss, [short, *flow.parameters()], allow_unused=True)
        if grads[0] is not None:
            wanted[0][row, :n] = grads[0]
        for total, g in zip(wanted[1:], grads[1:], strict=True):
            total += 0 if g is None else g
    for g, expected in zip(got, wanted, strict=True):
        close(g, expected, 1e-8)


def test_sources_of_a_batch_of_lengths():
    """Lengths broadcast as contexts do; a length changed in place is no stale value."""
    flow = built(flows.maf(T, conditioner=transformer, context=gx.Source(2), transforms=1))
    source, lengths, y = sized(7, 2), torch.tensor([[2], [7]]), sized(3, T)
    d = flow(source, LENGTHS[:3], lengths)
    assert d.batch_shape == (2, 3) and d.sample((4,)).shape == (4, 2, 3, T)
    close(d.log_prob(y)[0], flow(source[:2], LENGTHS[:3]).log_prob(y))
    close(d.log_prob(y)[1], flow(source, LENGTHS[:3]).log_prob(y))
    close(
        torch.func.vmap(lambda n: flow(source, None, n).transforms[0](y))(lengths[:, 0])[0],
        flow(source[:2]).transforms[0](y),
    )
    module = transforms.AutoregressiveTransform(transformer(2, gx.Source(2)), heads.Affine())
    t = built(module)(gx.PaddedSequence(source, lengths))
    with torch.no_grad():
        t(y)
        lengths.sub_(1)
        close(t(y), t.with_cache(0)(y))


def test_wrong_sources():
    flow = flows.maf(3, conditioner=transformer, context=gx.Source(2))
    source, n = torch.zeros(4, 5, 2), torch.tensor([1, 2, 3, 6])
    fails(
        ValueError,
        "Expected source_lengths between 0 and 5 (steps of the source); got 6.",
        lambda: flow(source, None, n),
    )
    fails(ValueError, "Expected source_lengths between 0 and 5", lambda: flow(gx.PaddedSequence(source, n)))
    fails(
        ValueError,
        "Expected no source_lengths with a PaddedSequence",
        lambda: flow(gx.PaddedSequence(source, n), source_lengths=n),
    )
    fails(
        TypeError, "Expected source_lengths to be a tensor of integers", lambda: flow(source, source_lengths=n.float())
    )
    fails(ValueError, "Expected a context (*batch, S, 2)", lambda: flow(source_lengths=n))
    plain = flows.maf(3, conditioner=markov)
    text = "Expected no source_lengths (Flow built with context=0); got lengths of shape (4,)."
    fails(ValueError, text, lambda: plain(source_lengths=n))


def test_a_flow_on_one_axis_reads_sources():
    flow = built(flows.univariate(flows.maf, gx.Source(2), conditioner=transformer))
    source = sized(2, 7, 2)
    d = flow(source, source_lengths=torch.tensor([3, 7]))
    close(d.log_prob(torch.zeros(2).double())[0], flow(source[0, :3]).log_prob(torch.zeros(()).double()))
