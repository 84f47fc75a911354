"""What users of flows do wrong, and the text of the errors; and odd sizes that are right."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx
from support.checks import fails
from support.recipes import maf_and_iaf

MADE, Affine, T = gx.conditioners.MADE, gx.heads.Affine, gx.transforms
zeros, ones = torch.zeros, torch.ones
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def unvalidated(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)


# Contexts


@maf_and_iaf
@pytest.mark.parametrize(
    "context, text",
    [
        (zeros(7, 2), "Expected context.shape[-1] == 3 (Flow built with context=3); got (7, 2)."),
        (zeros(()), "Expected context.shape[-1] == 3 (Flow built with context=3); got ()."),
        (zeros(7, 0), "Expected context.shape[-1] == 3 (Flow built with context=3); got (7, 0)."),
        (None, "Expected a context (*batch, 3) (Flow built with context=3); got none."),
        (
            zeros(7, 3, dtype=torch.float64),
            "Expected context.dtype == torch.float32 (that of the parameters); got torch.float64.",
        ),
        (
            zeros(7, 3, dtype=torch.long),
            "Expected context.dtype == torch.float32 (that of the parameters); got torch.int64.",
        ),
        (zeros(7, 3, device="meta"), "Expected context.device == cpu (that of the parameters); got meta."),
    ],
    ids=["width", "scalar", "empty", "missing", "float64", "integers", "device"],
)
def test_context(recipe, context, text):
    flow = recipe(3, context=3, hidden=(8,))
    fails(ValueError, text, lambda: flow(context))
    fails(ValueError, text, lambda: flow.condition(context))


@maf_and_iaf
def test_unexpected_context(recipe):
    text = "Expected no context (Flow built with context=0); got one of shape (2, 3)."
    fails(ValueError, text, lambda: recipe(3, hidden=(8,))(zeros(2, 3)))


def test_context_of_the_parts():
    net = MADE(3, 2, context=2, hidden=(8,))
    module = T.AutoregressiveTransform(net, Affine())
    text = "Expected context.shape[-1] == 2 (MADE built with context=2); got (5, 4)."
    fails(ValueError, text, lambda: module(zeros(5, 4)))
    fails(ValueError, text, lambda: T.ConditionedAutoregressive(net, Affine(), zeros(5, 4)))
    fails(ValueError, text, lambda: net.start(zeros(5, 4), 5))
    fails(ValueError, text, lambda: net(zeros(5, 3), zeros(5, 4)))
    fails(ValueError, "Expected a context (*batch, 2) (MADE built with context=2); got none.", module)


@pytest.mark.parametrize("context", [[1.0, 2.0, 3.0], "abc", 1.0])
def test_context_that_is_no_tensor(context):
    flow = gx.flows.maf(3, context=3, hidden=(8,))
    fails(TypeError, f"Expected context to be a tensor; got {type(context).__name__}.", lambda: flow(context))


# Sizes


@maf_and_iaf
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
@pytest.mark.parametrize("name", ["features", "transforms", "context", "hidden"])
def test_counts(recipe, name, value):
    if name == "context" and value == 0:
        value = -2
    options = {"features": 3, name: (8, value) if name == "hidden" else value}
    least = 0 if name == "context" else 1
    kind = "a sequence of integers" if name == "hidden" else "an integer"
    text = f"Expected {name} to be {kind} >= {least}; got {options[name]!r}."
    fails(ValueError, text, lambda: recipe(**options))


@maf_and_iaf
def test_hidden_that_is_no_sequence(recipe):
    fails(ValueError, "Expected hidden to be a sequence of integers >= 1; got 8.", lambda: recipe(3, hidden=8))


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: MADE(0, 2), "Expected num_sites to be an integer >= 1; got 0."),
        (lambda: MADE(3, 0), "Expected num_params to be an integer >= 1; got 0."),
        (lambda: MADE(3, 2, context=-1), "Expected context to be an integer >= 0; got -1."),
        (lambda: MADE(3, 2, site=0), "Expected site to be an integer >= 1; got 0."),
        (lambda: MADE(3, 2, site=(0,)), "Expected site to be a sequence of integers >= 1; got (0,)."),
        (lambda: MADE(3, 2, site=True), "Expected site to be an integer >= 1; got True."),
        (
            lambda: MADE(2, 1, site=[3]),
            "Expected site to be one kind or a list of 2 scalar kinds, () or an integer; got [3].",
        ),
        (
            lambda: MADE(2, 1, site=[3, (2,)]),
            "Expected site to be one kind or a list of 2 scalar kinds, () or an integer; got [3, (2,)].",
        ),
        (lambda: Affine(bound=0), "Expected bound to be positive and finite; got 0."),
        (lambda: Affine(bound=-1.0), "Expected bound to be positive and finite; got -1.0."),
        (lambda: Affine(bound=NAN), "Expected bound to be positive and finite; got nan."),
        (lambda: Affine(shape=(0,)), "Expected shape to be a sequence of integers >= 1; got (0,)."),
        (lambda: T.Reverse(1), "Expected dim to be a negative integer (counted from the right); got 1."),
        (lambda: T.Chain([]), "Expected parts to hold at least one transform; got an empty sequence."),
    ],
)
def test_sizes_of_the_parts(call, text):
    fails(ValueError, text, call)


@pytest.mark.parametrize("call", [gx.flows.maf, gx.flows.iaf])
def test_unknown_keyword(call):
    with pytest.raises(TypeError, match="unexpected keyword argument 'hiden'"):
        call(3, hiden=(8,))
    with pytest.raises(TypeError, match="unexpected keyword argument 'hiden'"):
        MADE(3, 2, hiden=(8,))


@maf_and_iaf
@pytest.mark.parametrize("hidden", [(), (8,)])
@pytest.mark.parametrize("features", [1, 3])
def test_smallest_sizes_are_right(recipe, hidden, features):
    """Neither hidden layers nor other features: the density is still the Jacobian's."""
    flow = recipe(features, hidden=hidden, transforms=2).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0.0, 0.5)
    d = flow()
    y = torch.randn(features, dtype=torch.float64)
    chain = d.transforms[0]
    x = chain.inv(y)
    jacobian = torch.autograd.functional.jacobian(chain.inv, y).reshape(features, features)
    truth = dist.Normal(0.0, 1.0).log_prob(x).sum() + jacobian.det().abs().log()
    assert d.log_prob(y).item() == pytest.approx(truth.item(), abs=1e-10)
    assert (chain(x.clone()) - y).abs().max() < 1e-10
    assert d.sample((5,)).shape == (5, features)


# Values


@maf_and_iaf
def test_value_of_another_width(recipe, monkeypatch):
    d = recipe(3, hidden=(8,))()
    fails(
        ValueError,
        "value must match event_shape: torch.Size([4, 2]) vs torch.Size([3])",
        lambda: d.log_prob(zeros(4, 2)),
    )
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    d = recipe(3, hidden=(8,))()
    for shape in ((4, 2), (4, 1), ()):
        text = f"Expected value.shape[-1] == 3 (features of the flow); got {shape}."
        fails(ValueError, text, lambda shape=shape: d.log_prob(zeros(shape)))


def test_value_of_another_width_in_transforms():
    t = T.AutoregressiveTransform(MADE(3, 2, hidden=(8,)), Affine())()
    text = "Expected value.shape[-1:] == (3,) (the sites of the transform); got (4, 2)."
    fails(ValueError, text, lambda: t(zeros(4, 2)))
    fails(ValueError, text, lambda: t.inv(zeros(4, 2)))
    fails(ValueError, "Expected value.shape[-1:] == (3,) (the sites of the transform); got ().", lambda: t(zeros(())))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_value_of_another_width_in_fixed_transforms(width):
    """A wider value would silently lose columns, a narrower one be broadcast."""
    for t in (T.Permute(torch.tensor([2, 0, 1])), T.Standardize(zeros(3), ones(3))):
        for call in (t, t.inv):
            with pytest.raises(ValueError, match=rf"Expected value\.shape\[-1\] == 3 .*got \(4, {width}\)\."):
                call(zeros(4, width))


@maf_and_iaf
def test_wrong_dtype_of_value(recipe):
    d = recipe(3, hidden=(8,))()
    text = "dtype == torch.float32 (that of the parameters); got torch.float64."
    y = torch.tensor([[1.0, -2.0, 3.0]])
    fails(ValueError, text, lambda: d.log_prob(y.double()))
    for dtype in (torch.long, torch.half):  # nothing is lost: the right result, or an error that says so
        try:
            log_prob = d.log_prob(y.to(dtype))
        except ValueError as error:
            assert str(error).endswith(f"dtype == torch.float32 (that of the parameters); got {dtype}.")
        else:
            torch.testing.assert_close(log_prob, d.log_prob(y))
    t = T.AutoregressiveTransform(MADE(3, 2, hidden=(8,)), Affine())()
    for call in (t, t.inv):
        fails(ValueError, text, lambda call=call: call(zeros(4, 3, dtype=torch.float64)))


@maf_and_iaf
def test_wrong_device_of_value(recipe, unvalidated):
    d = recipe(3, hidden=(8,))()
    with pytest.raises(ValueError, match=r"\.device == cpu \(that of the parameters\); got meta\."):
        d.log_prob(zeros(4, 3, device="meta"))


@maf_and_iaf
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_value_that_is_not_finite(recipe, bad, monkeypatch):
    y = torch.tensor([[0.5, bad, 0.0], [0.5, 0.1, 0.0]])
    fails(ValueError, "to be within the support", lambda: recipe(3, hidden=(8,))().log_prob(y))
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    flow = recipe(3, hidden=(8,))
    log_prob = flow().log_prob(y)
    assert log_prob[0].isnan() if bad != bad else log_prob[0] == -INF
    torch.testing.assert_close(log_prob[1], flow().log_prob(y[1]))


@pytest.mark.parametrize("permutation", [[0, 0, 1], [1, 2, 3], [[0, 1]], [0.0, 1.0], [-1, 0]])
def test_permute(permutation):
    text = f"Expected permutation to hold each of 0 ... T-1 once; got {permutation}."
    fails(ValueError, text, lambda: T.Permute(torch.tensor(permutation)))


# Flows


def test_flow_of_nothing():
    text = "Expected transforms to hold at least one transform; got an empty sequence."
    fails(ValueError, text, lambda: gx.Flow([], dist.Normal(zeros(3), 1.0).to_event(1)))


def test_flow_of_contexts_of_two_widths():
    steps = [T.AutoregressiveTransform(MADE(3, 2, context=c), Affine()) for c in (4, 2)]
    text = "Expected transforms and base with the same context; got [2, 4]."
    fails(ValueError, text, lambda: gx.Flow(steps, dist.Normal(zeros(3), 1.0).to_event(1)))


def test_flow_with_parts_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"Expected base to be a distribution or a module; got str\."):
        gx.flows.maf(3, base="normal")
    with pytest.raises(TypeError, match=r"Expected transforms to be transforms or modules; got str\."):
        gx.Flow(["reverse"], dist.Normal(zeros(3), 1.0).to_event(1))


@pytest.mark.parametrize("recipe", [gx.flows.maf, gx.flows.iaf])
def test_base_of_another_size(recipe):
    with pytest.raises(ValueError, match=r"Expected base\.event_shape == \(3,\).*; got \(2,\)\."):
        recipe(3, base=dist.Normal(zeros(2), 1.0).to_event(1))()


@maf_and_iaf
def test_value_that_does_not_broadcast_with_the_context(recipe):
    d = recipe(3, context=3, hidden=(8,))(zeros(2, 3))
    fails(ValueError, "Value is not broadcastable with batch_shape+event_shape", lambda: d.log_prob(zeros(4, 3)))
