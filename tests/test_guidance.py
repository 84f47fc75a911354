"""Guided: the parameters by hand, which rows lose their context, shared parameters, wrong modules."""

import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from support.checks import fails
from support.registry.heads import flow_head
from support.values import F64, built

HEAD = heads.Categorical(3)
CONTEXT = torch.eye(3, dtype=F64)


def names():
    """A model of sequences with a Transformer."""
    net = conditioners.Transformer(3, 3, context=3, width=8, depth=1, num_heads=2)
    return built(gx.Sequence(net, HEAD, eos=0, max_len=4))


def images(**options):
    sizes = {"transforms": 2, "width": 8, "depth": 1, "num_heads": 1, **options}
    return built(gx.flows.tarflow((2, 2), 1, 3, **sizes))


@pytest.mark.parametrize("weight", [-1.0, 0.0, 2.5])
def test_parameters_by_hand(weight):
    lm = names()
    y = torch.tensor([[1, 2, 0, 0], [2, 2, 1, 0], [1, 1, 1, 1]])
    given, none = (lm.conditioner(y, context) for context in (CONTEXT, torch.zeros_like(CONTEXT)))
    logits = given + weight * (given - none)
    each = dist.Categorical(logits=logits).log_prob(y)
    before_end = torch.cat([torch.ones(3, 1), (y[:, :-1] != 0).double().cumprod(1)], 1)
    expected = (each * before_end).sum(1)
    guided = gx.Guided(lm, weight=weight).eval()
    torch.testing.assert_close(guided(CONTEXT).log_prob(y), expected, rtol=0, atol=1e-12)
    assert guided(CONTEXT, max_len=2).event_shape == (2,)


def test_flow_is_guided_in_every_block():
    """The base of a sample, by a loop over the blocks from the data, with parameters by hand."""
    flow, weight, y = images(transforms=3), 0.8, torch.randn(3, 2, 2, dtype=F64)
    cut = gx.transforms.Patches((2, 2), 1)
    x, total = cut(y), 0.0
    blocks = [part.transform for part in flow.transforms if hasattr(part, "context") and part.context]
    for i, block in enumerate(reversed(blocks)):
        x = x.flip(1) if i else x
        given, none = (block.conditioner(x, context) for context in (CONTEXT, 0 * CONTEXT))
        t = block.head(given + weight * (given - none))
        x, ladj = t.call_and_ladj(x)
        total = total + ladj.sum(1)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum((1, 2)) + total
    guided = gx.Guided(flow, weight=weight).eval()
    torch.testing.assert_close(guided(CONTEXT).log_prob(y), expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        draws = guided(CONTEXT).sample((5,))
        other = guided(CONTEXT, solver="fixed_point").transforms[0]
        torch.testing.assert_close(other(other.inv(draws).clone()), draws, rtol=0, atol=1e-8)


def test_rows_lose_their_context_in_all_blocks_at_once():
    flow, y = images(transforms=3), torch.randn(400, 2, 2, dtype=F64)
    context = CONTEXT[torch.arange(400) % 3]
    given, none = flow(context).log_prob(y), flow(0 * context).log_prob(y)
    torch.manual_seed(0)
    found = gx.Guided(flow, rate=0.25)(context).log_prob(y)
    dropped = torch.isclose(found, none)
    assert (dropped ^ torch.isclose(found, given)).all()
    assert 65 < dropped.sum() < 135  # four standard deviations around 100
    assert torch.equal(gx.Guided(flow, rate=0.0)(context).log_prob(y), given)
    assert torch.equal(gx.Guided(flow, rate=1.0)(context).log_prob(y), none)


def test_weights_share_parameters_and_leave_the_model_alone():
    flow, y = images(), torch.randn(3, 2, 2, dtype=F64)
    before = flow(CONTEXT).log_prob(y)
    model = gx.Guided(flow).eval()
    strong = model.with_weight(3.0)
    first = strong(CONTEXT).log_prob(y)
    assert not torch.allclose(first, before) and not strong.training
    assert torch.equal(flow(CONTEXT).log_prob(y), before) and torch.equal(model(CONTEXT).log_prob(y), before)
    assert [id(p) for p in strong.parameters()] == [id(p) for p in flow.parameters()]
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(1.1)
    assert not torch.allclose(strong(CONTEXT).log_prob(y), first)
    assert torch.equal(strong.for_validation()(CONTEXT).log_prob(y), flow(CONTEXT).log_prob(y))


def test_a_conditioner_with_two_names_is_guided():
    lm, y = names(), torch.tensor([[1, 2, 0, 0], [2, 2, 1, 0], [1, 1, 1, 1]])
    expected = gx.Guided(lm, weight=1.5).eval()(CONTEXT).log_prob(y)
    net = lm._modules.pop("conditioner")
    lm._modules |= {"other": net, "conditioner": net}
    assert torch.equal(gx.Guided(lm, weight=1.5).eval()(CONTEXT).log_prob(y), expected)


def test_fit_learns_both():
    """Two classes of normals: given the class, and without it their mixture's mean and scale."""
    torch.manual_seed(0)
    classes = torch.eye(2).repeat(300, 1)
    y = torch.randn(600, 1) * 0.5 + 4 * classes[:, 1:] - 2
    net = conditioners.Independent(1, 2, context=2, hidden=(16,))
    model = gx.Guided(gx.Autoregressive(net, heads.Normal(), (1,)), rate=0.3)
    gx.fit(model, y, classes, epochs=60, lr=1e-2, progress=False)
    model.eval()
    given, none = model(torch.eye(2)).sample((2000,)), model.with_weight(-1.0)(torch.eye(2)).sample((2000,))
    assert torch.allclose(given.mean((0, 2)), torch.tensor([-2.0, 2.0]), atol=0.2)
    assert torch.allclose(none.mean((0, 2)), torch.zeros(2), atol=0.4) and (none.std(0) > 1.5).all()
    assert model.with_weight(1.0)(torch.eye(2)).sample((2000,)).mean((0, 2))[1] > 3  # further from the mean of all


@pytest.mark.parametrize(
    "run, kind, text",
    [
        (lambda: gx.Guided(HEAD), TypeError, "Expected module to be of class DistributionModule; got Categorical"),
        (lambda: gx.Guided(gx.flows.maf(2)), ValueError, "Expected module.context to be an integer >= 1; got 0."),
        (lambda: gx.Guided(names(), rate=1.5), ValueError, "Expected 0 <= rate <= 1; got 1.5."),
        (lambda: gx.Guided(names(), weight=float("nan")), ValueError, "Expected weight to be finite; got nan."),
        (lambda: gx.Guided(names(), weight="2"), TypeError, "Expected weight to be a number; got '2'."),
        (
            lambda: gx.Guided(gx.flows.realnvp(2, 3)),
            ValueError,
            "Expected module whose parts of context=3 have conditioners; got Coupling without.",
        ),
        (
            lambda: gx.Guided(gx.Flow([*gx.flows.maf(2, 3).transforms], gx.Conditional(torch.nn.Linear(3, 3), HEAD))),
            ValueError,
            "Expected module whose parts of context=3 have conditioners; got Conditional without.",
        ),
        (
            lambda: gx.Guided(gx.Conditional(torch.nn.Linear(3, 3), flow_head())),
            ValueError,
            "Expected module whose parts of context=3 have conditioners; got Conditional without.",
        ),
        (lambda: gx.Guided(names())(CONTEXT[:, :2]), ValueError, "Expected context.shape[-1] == 3"),
        (lambda: gx.Guided(names())(), ValueError, "Expected a context (*batch, 3) (Guided built with context=3)"),
    ],
)
def test_errors(run, kind, text):
    fails(kind, text, run)
