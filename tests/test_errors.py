"""What users do wrong, and the text that tells them; and odd sizes that are right."""

from __future__ import annotations

import re

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx

MADE, Affine, T = gx.conditioners.MADE, gx.heads.Affine, gx.transforms
zeros, ones = torch.zeros, torch.ones
NAN, INF = float("nan"), float("inf")
recipes = pytest.mark.parametrize("recipe", [gx.flows.maf, gx.flows.iaf])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def unvalidated(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)


def fails(kind, text, call):
    """The call raises exactly this kind of error, with this text in its message."""
    with pytest.raises(kind, match=re.escape(text)) as caught:
        call()
    assert caught.type is kind
    return str(caught.value)


# Contexts


@recipes
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


@recipes
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


@recipes
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


@recipes
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
        (lambda: T.Chain([]), "Expected parts to hold at least one transform; got none."),
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


@recipes
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


@recipes
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


@pytest.mark.parametrize("shape", [(3, 3), (3, 2, 2), (3,)])
def test_value_of_another_shape_in_made(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape}.")):
        MADE(2, 1, hidden=(8,))(zeros(shape))


@recipes
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


@recipes
def test_wrong_device_of_value(recipe, unvalidated):
    d = recipe(3, hidden=(8,))()
    with pytest.raises(ValueError, match=r"\.device == cpu \(that of the parameters\); got meta\."):
        d.log_prob(zeros(4, 3, device="meta"))


@recipes
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_value_that_is_not_finite(recipe, bad, monkeypatch):
    y = torch.tensor([[0.5, bad, 0.0], [0.5, 0.1, 0.0]])
    fails(ValueError, "to be within the support", lambda: recipe(3, hidden=(8,))().log_prob(y))
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    flow = recipe(3, hidden=(8,))
    log_prob = flow().log_prob(y)
    assert log_prob[0].isnan() if bad != bad else log_prob[0] == -INF
    torch.testing.assert_close(log_prob[1], flow().log_prob(y[1]))


SUPPORTS = {
    "positive": (constraints.positive, [[0.0, 1.0], [1.0, 0.0], [-1.0, 1.0], [1.0, INF]], [0.3, 2.0]),
    "nonnegative": (constraints.nonnegative, [[0.0, 1.0], [-1.0, 1.0]], [0.3, 2.0]),
    "unit interval": (constraints.unit_interval, [[0.5, 1.0], [0.0, 0.5], [1.5, 0.5]], [0.3, 0.9]),
    "interval": (constraints.interval(-2.0, 3.0), [[3.0, 0.0], [-2.0, 0.0], [0.0, 4.0]], [-1.0, 2.5]),
    "less than": (constraints.less_than(1.0), [[1.0, 0.0], [2.0, 0.0]], [-3.0, 0.5]),
    "simplex": (constraints.simplex, [[1.0, 0.0], [0.0, 1.0], [1.5, -0.5], [0.5, 0.6]], [0.3, 0.7]),
    "list": ([constraints.positive, constraints.unit_interval], [[0.0, 0.5], [1.0, 1.0], [1.0, 2.0]], [5.0, 0.2]),
}


@recipes
@pytest.mark.parametrize("name", SUPPORTS)
def test_boundary_and_beyond(recipe, name, monkeypatch):
    support, outside, inside = SUPPORTS[name]
    flow = recipe(2, support=support, hidden=(8,))
    for row in outside:
        fails(ValueError, "to be within the support", lambda row=row: flow().log_prob(torch.tensor(row)))
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    rows = torch.tensor([*outside, inside], requires_grad=True)
    log_prob = flow().log_prob(rows)
    assert (log_prob[:-1] == -INF).all() and log_prob[-1].isfinite()
    log_prob[:-1].sum().backward(retain_graph=True)
    assert (rows.grad == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())
    rows.grad = None
    log_prob.sum().backward()
    assert (rows.grad[:-1] == 0).all() and rows.grad[-1].isfinite().all() and rows.grad[-1].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in flow.parameters())


# Supports and standardisation


@pytest.mark.parametrize(
    "features, support, text",
    [
        (3, constraints.boolean, "Expected support to be continuous; got Boolean()."),
        (
            3,
            constraints.nonnegative_integer,
            "Expected support to be continuous; got IntegerGreaterThan(lower_bound=0).",
        ),
        (
            3,
            [constraints.positive, constraints.boolean, constraints.real],
            "Expected support to be continuous; got Boolean().",
        ),
        (3, [constraints.positive] * 2, "Expected support to list 3 scalar constraints, one a feature; got ["),
        (3, [], "Expected support to list 3 scalar constraints, one a feature; got []."),
        (
            2,
            [constraints.simplex, constraints.real],
            "Expected support to list 2 scalar constraints, one a feature; got [",
        ),
        (3, "positive", "Expected support to be a constraint or a list of constraints; got positive."),
        (2, [constraints.positive, "real"], "Expected support to list 2 scalar constraints, one a feature; got ["),
        (9, constraints.lower_cholesky, "Expected support to be continuous, of scalars or vectors; got "),
        (1, constraints.simplex, "Expected features to be an integer >= 2"),
    ],
    ids=[
        "boolean",
        "integers",
        "boolean in list",
        "short",
        "empty",
        "simplex in list",
        "text",
        "text in list",
        "matrix",
        "point",
    ],
)
def test_support(features, support, text):
    fails(ValueError, text, lambda: gx.flows.maf(features, support=support))


@pytest.mark.parametrize(
    "rows, support, text",
    [
        (zeros(5, 2), None, "Expected standardize.shape[1:] == (3,) (features); got (5, 2)."),
        (zeros(3), None, "Expected standardize.shape[1:] == (3,) (features); got (3,)."),
        (zeros(2, 5, 3), None, "Expected standardize.shape[1:] == (3,) (features); got (2, 5, 3)."),
        (
            torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 1.0, 1.0]]),
            constraints.positive,
            "Expected standardize to hold finite rows inside the support; got others at rows [1, 2].",
        ),
        (
            torch.tensor([[1.0, 1.0, NAN], [1.0, INF, 1.0]]),
            None,
            "Expected standardize to hold finite rows inside the support; got others at rows [0, 1].",
        ),
        (torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 3.0]]), None, "at features [0, 2]."),
        (zeros(0, 3), None, "got torch.float32 of shape (0, 3)."),
        (torch.tensor([[1, 2, 3], [4, 0, 1]]), None, "got torch.int64 of shape (2, 3)."),
    ],
    ids=["width", "vector", "batch", "outside", "not finite", "constant", "empty", "integers"],
)
def test_standardize(rows, support, text):
    fails(ValueError, text, lambda: gx.flows.maf(3, support=support, standardize=rows))


def test_standardize_that_is_no_tensor():
    text = "Expected standardize to be a tensor; got list."
    fails(TypeError, text, lambda: gx.flows.maf(3, standardize=[[1.0, 2.0, 3.0]]))


def test_constant_feature_is_called_so():
    message = fails(
        ValueError, "at features [1]", lambda: T.Standardize.from_data(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    )
    assert "constant" in message


def test_standardize_directly():
    text = "Expected shift and scale of shape (D,); got (3,) and (2,)."
    fails(ValueError, text, lambda: T.Standardize(zeros(3), ones(2)))
    for scale in (0.0, -1.0, INF, NAN):
        text = "Expected finite shifts and positive finite scales; got others at features [1]."
        fails(ValueError, text, lambda scale=scale: T.Standardize(zeros(2), torch.tensor([1.0, scale])))


# Networks


def test_narrow_hidden_layers():
    text = (
        "Expected hidden layers wide enough that every site reads an earlier one; got hidden=(2, 5), with which site 1 "
        "of 5 reads none (widen them, or direct=True)."
    )
    fails(ValueError, text, lambda: MADE(5, 2, context=2, hidden=(2, 5), direct=False))
    net = MADE(5, 2, context=2, hidden=(2, 5)).double()
    y, x = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    reads = torch.autograd.functional.jacobian(lambda y: net(y, x)[0], y)[:, :, 0].abs().sum(1) > 0
    assert (reads == ones(5, 5).tril(-1).bool()).all()


@pytest.mark.parametrize("hidden", [(1,), (2,), (3, 2), (1, 1, 1)])
def test_narrow_hidden_layers_that_do(hidden):
    """Without a context every site that may read reads at least one earlier site."""
    net = MADE(5, 2, hidden=hidden, activation=torch.tanh).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    y = torch.randn(1, 5, dtype=torch.float64)
    reads = torch.autograd.functional.jacobian(lambda y: net(y)[0], y)[:, :, 0].abs().sum(1) > 0
    assert not (reads & ~ones(5, 5).tril(-1).bool()).any() and reads[1:].any(1).all()


@pytest.mark.parametrize(
    "adjacency, text",
    [
        (
            ones(2, 2).bool(),
            "Expected adjacency to be a Boolean matrix of shape (3, 3); got torch.bool of shape (2, 2).",
        ),
        (ones(3).bool(), "Expected adjacency to be a Boolean matrix of shape (3, 3); got torch.bool of shape (3,)."),
        (
            ones(3, 3).tril(-1),
            "Expected adjacency to be a Boolean matrix of shape (3, 3); got torch.float32 of shape (3, 3).",
        ),
        (ones(3, 3).tril().bool(), "(a site reads earlier sites only); got adjacency[0, 0]."),
        (ones(3, 3).triu(1).bool(), "(a site reads earlier sites only); got adjacency[0, 1]."),
    ],
    ids=["shape", "vector", "dtype", "diagonal", "upper"],
)
def test_adjacency(adjacency, text):
    fails(ValueError, text, lambda: MADE(3, 2, adjacency=adjacency))


@pytest.mark.parametrize(
    "activation",
    [nn.PReLU(), nn.ReLU(inplace=True), torch.relu_, "relu", None, nn.Softmax(-1), nn.GLU()],
    ids=["parameters", "in place", "in-place function", "text", "none", "mixes units", "halves"],
)
def test_activation(activation):
    text = "Expected activation to be an elementwise function without parameters, not in place; got "
    fails(ValueError, text, lambda: MADE(3, 2, hidden=(8,), activation=activation))


def test_numbers_of_parameters_of_conditioner_and_head():
    text = "Expected conditioner.num_params == 2 (that of the head); got 3."
    fails(ValueError, text, lambda: T.AutoregressiveTransform(MADE(3, 3), Affine()))


@pytest.mark.parametrize("permutation", [[0, 0, 1], [1, 2, 3], [[0, 1]], [0.0, 1.0], [-1, 0]])
def test_permute(permutation):
    text = f"Expected permutation to hold each of 0 ... T-1 once; got {permutation}."
    fails(ValueError, text, lambda: T.Permute(torch.tensor(permutation)))


# Flows


def test_flow_of_nothing():
    text = "Expected transforms to hold at least one; got none."
    fails(ValueError, text, lambda: gx.Flow([], dist.Normal(zeros(3), 1.0).to_event(1)))


def test_flow_of_contexts_of_two_widths():
    steps = [T.AutoregressiveTransform(MADE(3, 2, context=c), Affine()) for c in (4, 2)]
    text = "Expected transforms and base with contexts of one width; got [2, 4]."
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


@recipes
def test_value_that_does_not_broadcast_with_the_context(recipe):
    d = recipe(3, context=3, hidden=(8,))(zeros(2, 3))
    fails(ValueError, "Value is not broadcastable with batch_shape+event_shape", lambda: d.log_prob(zeros(4, 3)))


# States


def test_extend_beyond_the_last_site():
    net = MADE(4, 2, hidden=(8,))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            _, state = net.start(None, 5)
            text = "Expected y.shape[1] between 1 and 3 (0 of 4 sites were read and the last one never is); got (5, 4)."
            fails(ValueError, text, lambda state=state: net.extend(zeros(5, 4), state))
            fails(ValueError, "got (5, 0).", lambda state=state: net.extend(zeros(5, 0), state))
            _, state = net.extend(zeros(5, 2), state)
            text = "Expected y.shape[1] between 1 and 1 (2 of 4 sites were read and the last one never is); got (5, 2)."
            fails(ValueError, text, lambda state=state: net.extend(zeros(5, 2), state))
            phi, state = net.extend(zeros(5, 1), state)
            assert phi.shape == (5, 1, 2)
            text = "Expected y.shape[1] between 1 and 0 (3 of 4 sites were read and the last one never is); got (5, 1)."
            fails(ValueError, text, lambda state=state: net.extend(zeros(5, 1), state))


def test_consumed_state():
    net = MADE(4, 2, hidden=(8,))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            _, start = net.start(None, 5)
            net.extend(zeros(5, 2), start)
            text = (
                "Expected a fresh state; got one at site 0 whose buffers were extended to site 2 (branch with "
                "conditioner.reorder before extend)."
            )
            fails(RuntimeError, text, lambda start=start: net.extend(zeros(5, 1), start))
            fails(RuntimeError, text, lambda start=start: net.reorder(start, torch.arange(2)))


def test_a_failed_extend_consumes_nothing():
    net = MADE(4, 2, hidden=(8,))
    y = torch.randn(5, 3)
    _, state = net.start(None, 5)
    with pytest.raises(ValueError, match="Expected y"):
        net.extend(zeros(5, 1, dtype=torch.float64), state)
    phi, _ = net.extend(y, state)
    torch.testing.assert_close(phi, net(torch.cat([y, zeros(5, 1)], 1))[:, 1:])


@pytest.mark.parametrize(
    "y, text",
    [
        (torch.tensor([[3, 0]]), "Expected integers 0 ... 2 at a site with 3 categories; got 3 ... 3."),
        (torch.tensor([[-1, 0], [1, 0]]), "Expected integers 0 ... 2 at a site with 3 categories; got -1 ... 1."),
        (torch.tensor([[1.5, 0.0]]), "Expected integers 0 ... 2 at a site with 3 categories; got 1.5."),
        (torch.tensor([[NAN, 0.0]]), "Expected integers 0 ... 2 at a site with 3 categories; got nan."),
    ],
    ids=["above", "below", "fraction", "nan"],
)
def test_categories(y, text):
    for site in (3, [3, 3], [3, ()]):
        net = MADE(2, 1, site=site, hidden=(8,))
        fails(ValueError, text, lambda net=net: net(y))
        fails(ValueError, text, lambda net=net: net.extend(y[:, :1], net.start(None, len(y))[1]))


def test_categories_of_any_dtype():
    net = MADE(3, 2, site=4, hidden=(8,))
    y = torch.tensor([[3, 1, 0], [0, 2, 1]])
    truth = net(y)
    assert (truth[0] - truth[1]).abs().max() > 0
    for dtype in (torch.float32, torch.int32, torch.uint8, torch.float64):
        torch.testing.assert_close(net(y.to(dtype)), truth)
