"""Every argument that is one integer, a sequence of integers or a number refuses anything else by its name."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from support.checks import fails

c, f, h, t = gx.conditioners, gx.flows, gx.heads, gx.transforms
Z, ones = torch.zeros, torch.ones
NAN, INF = float("nan"), float("inf")


def numbers(sites=3, head=None):
    """An autoregressive model of so many numbers, or binary digits."""
    head = head or h.Normal()
    return gx.Autoregressive(c.NADE(sites, head.num_params, hidden=4), head, (sites,))


def strings(**options):
    return gx.Sequence(c.Recurrent(3, 3, hidden=4, **options), h.Categorical(3), 0, 4)


SOME = {"num_params": 2}
MODEL = {"conditioner": c.Recurrent(3, 3, hidden=4), "head": h.Categorical(3)}
CALLS = {  # a call, and its arguments that are integers, sequences of integers or numbers
    "MADE": (c.MADE, {"num_sites": 3, **SOME, "hidden": (8,), "context": 1}),
    "NADE": (c.NADE, {"num_sites": 3, **SOME, "hidden": 8, "context": 1}),
    "Independent": (c.Independent, {"num_sites": 3, **SOME, "context": 1, "hidden": (8,)}),
    "Markov": (lambda **o: c.Markov((), **o), {**SOME, "order": 2, "hidden": (8,), "context": 1}),
    "Recurrent": (
        lambda **o: c.Recurrent(3, **o),
        {**SOME, "hidden": 8, "layers": 1, "context": 1, "width": 4, "dropout": 0.5},
    ),
    "Transformer": (
        lambda **o: c.Transformer(3, **o),
        {**SOME, "context": 1, "width": 8, "depth": 1, "num_heads": 2, "max_len": 5, "window": 2, "dropout": 0.5},
    ),
    "CausalConv": (
        lambda **o: c.CausalConv((), **o),
        {**SOME, "context": 1, "width": 8, "kernel": 2, "dilations": (1, 2), "dropout": 0.5},
    ),
    "StateSpace": (
        lambda **o: c.StateSpace((), **o),
        {**SOME, "context": 1, "width": 8, "depth": 1, "state": 4, "step_sizes": (0.01, 0.1), "dropout": 0.5},
    ),
    "PixelCNN": (
        c.PixelCNN,
        {
            "image_shape": (1, 3, 3),
            **SOME,
            "context": 1,
            "width": 4,
            "depth": 1,
            "kernel": 3,
            "first_kernel": 3,
            "dropout": 0.5,
        },
    ),
    "Covariates": (gx.Covariates, {"features": 2}),
    "Source": (gx.Source, {"features": 2}),
    "Affine": (h.Affine, {"shape": (2,), "bound": 2.0}),
    "Shift": (h.Shift, {"shape": (2,)}),
    "RationalQuadraticSpline": (h.RationalQuadraticSpline, {"bins": 4, "bound": 2.0}),
    "CircularSpline": (h.CircularSpline, {"bins": 4}),
    "SumOfSquares": (h.SumOfSquares, {"polynomials": 2, "degree": 3, "bound": 2.0}),
    "Bernstein": (h.Bernstein, {"degree": 4, "bound": 2.0}),
    "DeepSigmoid": (h.DeepSigmoid, {"units": 4, "layers": 2, "bound": 2.0}),
    "LogisticMixtureCDF": (h.LogisticMixtureCDF, {"components": 4, "bound": 2.0}),
    "MonotoneNetwork": (h.MonotoneNetwork, {"signal": 4, "hidden": (4,)}),
    "IntegratedPositive": (h.IntegratedPositive, {"signal": 4, "hidden": (4,), "bound": 2.0}),
    "Categorical": (h.Categorical, {"categories": 3}),
    "OneHotCategorical": (h.OneHotCategorical, {"size": 3}),
    "Dirichlet": (h.Dirichlet, {"size": 3}),
    "MultivariateNormal": (h.MultivariateNormal, {"size": 3}),
    "Normal": (h.Normal, {"shape": (2,)}),
    "ContinuousCategorical": (h.ContinuousCategorical, {"k": 3}),
    "DiscretizedLogistic": (h.DiscretizedLogistic, {"levels": 4, "K": 2}),
    "Mixture": (lambda **o: h.Mixture(h.Normal(), **o), {"K": 2}),
    "Tempered": (lambda **o: h.Tempered(h.Categorical(3), **o), {"temperature": 0.5}),
    "TopK": (lambda **o: h.TopK(h.Categorical(3), **o), {"k": 2}),
    "TopP": (lambda **o: h.TopP(h.Categorical(3), **o), {"p": 0.5}),
    "MinP": (lambda **o: h.MinP(h.Categorical(3), **o), {"p": 0.5}),
    "Forbid": (lambda **o: h.Forbid(h.Categorical(3), **o), {"tokens": [1]}),
    "MinLength": (lambda **o: h.MinLength(h.Categorical(3), **o), {"n": 2, "eos": 0}),
    "BlockAutoregressive": (t.BlockAutoregressive, {"num_sites": 3, "context": 1, "hidden": (3,)}),
    "Coupling": (lambda **o: t.Coupling(head=h.Affine(), **o), {"num_sites": 3, "context": 1, "hidden": (3,)}),
    "Planar": (t.Planar, {"features": 2, "context": 1, "hidden": (4,)}),
    "Sylvester": (t.Sylvester, {"features": 3, "rank": 2, "reflections": 2, "context": 1, "hidden": (4,)}),
    "LULinear": (t.LULinear, {"features": 2}),
    "Householder": (t.Householder, {"features": 2, "reflections": 2}),
    "ToSupport": (lambda **o: t.ToSupport(constraints.real, **o), {"features": 2}),
    "Interval": (t.Interval, {"low": -1.0, "high": 2.0}),
    "HalfLine": (t.HalfLine, {"bound": 0.5}),
    "maf": (f.maf, {"features": 2, "context": 1, "transforms": 1, "hidden": (4,)}),
    "nsf": (f.nsf, {"features": 2, "bins": 4, "bound": 2.0}),
    "sospf": (f.sospf, {"features": 2, "polynomials": 2, "degree": 2, "bound": 2.0}),
    "bpf": (f.bpf, {"features": 2, "degree": 4, "bound": 2.0}),
    "coupling_nsf": (f.coupling_nsf, {"features": 2, "bins": 4, "bound": 2.0}),
    "bnaf": (f.bnaf, {"features": 2, "context": 1, "transforms": 1, "hidden": (4,)}),
    "Autoregressive": (lambda **o: gx.Autoregressive(**MODEL, **o), {"event_shape": (4,), "limit": 9}),
    "AutoregressiveDistribution": (
        lambda **o: gx.distributions.AutoregressiveDistribution(**MODEL, **o),
        {"event_shape": (4,), "limit": 9},
    ),
    "Sequence": (lambda **o: gx.Sequence(**MODEL, **o), {"eos": 0, "max_len": 4, "limit": 9}),
    "SequenceDistribution": (
        lambda **o: gx.distributions.SequenceDistribution(**MODEL, **o),
        {"eos": 0, "max_len": 4, "limit": 9},
    ),
    "OrderEnsemble": (lambda **o: gx.OrderEnsemble(numbers(), **o), {"orders": 2}),
    "CRF": (gx.CRF, {"num_labels": 3, "context": 2}),
    "HiddenMarkov": (
        lambda **o: gx.HiddenMarkov(Z(2), Z(2, 2), dist.Normal(Z(2), 1.0), **o),
        {"duration": 3},
    ),
    "k_best": (gx.LinearChainCRF(Z(3, 2), Z(2, 2)).k_best, {"k": 2}),
    "beam_search": (
        lambda **o: gx.decoding.beam_search(strings()(), **o, unfinished=True),
        {"width": 3, "length_penalty": 0.5, "k": 2},
    ),
    "stochastic_beam_search": (lambda **o: gx.decoding.stochastic_beam_search(strings()(), **o), {"k": 2}),
    "exact_mode": (lambda **o: gx.decoding.exact_mode(strings()(), **o), {"budget": 99, "width": 3, "block": 9}),
    "termination_curve": (strings()().termination_curve, {"max_len": 3, "num_samples": 9}),
}
SEQUENCES = ([2.5], [True], ["2"], [[2]], "2")
INTEGERS = ([2], (2,), True, 2.5, "2", torch.tensor(2))
NUMBERS = ("x", True, NAN, INF, [0.5], 1j)


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in CALLS for argument in CALLS[name][1]])
def test_argument(name, argument):
    call, arguments = CALLS[name]
    call(**arguments)
    right = arguments[argument]
    wrong = NUMBERS if isinstance(right, float) else SEQUENCES if isinstance(right, Sequence) else INTEGERS
    if (name, argument) == ("OrderEnsemble", "orders"):
        wrong = (True, 2.5, "2")  # a list is one of orders
    if (name, argument) == ("ToSupport", "features"):
        wrong = (True, 2.5, torch.tensor(2), (), *SEQUENCES)  # a sequence of integers is a shape
    for value in wrong:
        with pytest.raises((ValueError, TypeError), match=rf"^Expected .*\b{argument}\b.*; got .*") as caught:
            call(**{**arguments, argument: value})
        assert caught.type in (ValueError, TypeError)


def test_limit():
    for make in ("Autoregressive", "AutoregressiveDistribution", "Sequence", "SequenceDistribution"):
        call, arguments = CALLS[make]
        for wrong in (0, -1, INF, NAN, "9", torch.tensor(9)):
            text = f"Expected limit to be an integer >= 1; got {wrong!r}."
            fails(ValueError, text, lambda call=call, a={**arguments, "limit": wrong}: call(**a))


@pytest.mark.parametrize("wrong", [0, -1, -0.5, NAN, INF])
def test_bound_that_is_not_positive(wrong):
    for name, (call, arguments) in CALLS.items():
        if "bound" in arguments and name != "HalfLine":
            text = f"Expected bound to be positive and finite; got {wrong}."
            fails(ValueError, text, lambda call=call, a={**arguments, "bound": wrong}: call(**a))


def test_dropout():
    for make in (lambda p: c.Recurrent((), 2, dropout=p), lambda p: c.Transformer((), 2, dropout=p)):
        for wrong in ("a", None, True, [0.5], 1j, torch.tensor(0.5)):
            fails(TypeError, f"Expected dropout to be a number; got {wrong!r}.", lambda m=make, w=wrong: m(w))
        for wrong in (1, 1.0, -0.1, NAN, INF):
            fails(ValueError, f"Expected 0 <= dropout < 1; got {wrong}.", lambda m=make, w=wrong: m(w))


# Uniforms


@pytest.mark.parametrize("model", [numbers, strings])
def test_from_uniform(model):
    d = model()()
    u = torch.full(d.event_shape, 0.5)
    for wrong in (u.tolist(), 0.5, "x", None):
        text = f"Expected u to be of class Tensor; got {type(wrong).__name__}."
        fails(TypeError, text, lambda u=wrong: d.from_uniform(u))
    for kind in (torch.long, torch.bool, torch.complex64):
        text = f"Expected u to be a tensor of floating-point numbers; got {kind}."
        fails(TypeError, text, lambda kind=kind: d.from_uniform(u.to(kind)))
    for kind in (torch.float16, torch.bfloat16):
        text = f"Expected u.dtype to be torch.float32 or torch.float64; got {kind}."
        fails(ValueError, text, lambda kind=kind: d.from_uniform(u.to(kind)))
    text = f"Expected u.shape[-1:] == ({len(u)},) (event_shape); got (2,)."
    fails(ValueError, text, lambda: d.from_uniform(u[:2]))


# Lengths


@pytest.mark.parametrize(
    "call",
    [
        lambda lengths: numbers()(lengths=lengths),
        lambda lengths: f.maf(3)(lengths=lengths),
        lambda lengths: strings()().conditional_on_prefix(ones(2, 3).long(), lengths),
        lambda lengths: gx.LinearChainCRF(Z(2, 3, 3), Z(3, 3), lengths=lengths),
        lambda lengths: gx.HiddenMarkov(Z(2, 2), Z(2, 2), dist.Normal(Z(2), 1.0), lengths, duration=3),
        lambda lengths: gx.CRF(3, 2)(Z(2, 3, 2), lengths=lengths),
        lambda lengths: strings(context=gx.Source(2))(Z(2, 3, 2), source_lengths=lengths),
        lambda lengths: strings(context=gx.Source(2))(gx.PaddedSequence(Z(2, 3, 2), lengths)),
        lambda lengths: t.Reverse(lengths=lengths),
        lambda lengths: t.Prefixes([t.Reverse()], lengths),
    ],
)
def test_lengths(call):
    for wrong in ([1, 2], 1, "x", (1, 2)):
        text = f"lengths to be a tensor of integers; got {type(wrong).__name__}."
        fails(TypeError, text, lambda w=wrong: call(w))
    for kind in (torch.float32, torch.bool):
        fails(TypeError, f"lengths to be a tensor of integers; got {kind}.", lambda k=kind: call(ones(2, dtype=k)))


def test_lengths_of_values():
    d = strings()()
    for wrong in ([1, 2, 0, 0], 1, None):
        text = f"Expected value to be of class Tensor; got {type(wrong).__name__}."
        fails(TypeError, text, lambda w=wrong: d.lengths_of(w))
    for shape in ((3,), (2, 5), ()):
        text = f"Expected value.shape[-1:] == (4,) (event_shape); got {shape}."
        fails(ValueError, text, lambda s=shape: d.lengths_of(ones(s).long()))


def test_lengths_of_another_batch():
    three = ones(3).long()
    text = "Expected batch shapes that broadcast; got value (2,), lengths (3,)."
    for transform in (t.Reverse(lengths=three), t.Prefixes([t.Reverse()], three)):
        fails(ValueError, text, lambda transform=transform: transform(Z(2, 3)))


# Orders


@pytest.mark.parametrize(
    ("orders", "kind", "text"),
    [
        (2.0, TypeError, "Expected orders to be an integer, a tensor (K, 3) or a list of orders; got 2.0."),
        ("a", TypeError, "Expected orders to be an integer, a tensor (K, 3) or a list of orders; got 'a'."),
        (None, TypeError, "Expected orders to be an integer, a tensor (K, 3) or a list of orders; got None."),
        (0, ValueError, "Expected orders to be an integer >= 1; got 0."),
        (True, ValueError, "Expected orders to be an integer >= 1; got True."),
        ([], ValueError, "Expected orders of shape (K, 3) with K >= 1 and 3 sites; got []."),
        (Z(0, 3).long(), ValueError, "Expected orders of shape (K, 3) with K >= 1 and 3 sites; got (0, 3)."),
        (torch.arange(3), ValueError, "Expected orders of shape (K, 3) with K >= 1 and 3 sites; got (3,)."),
        (torch.tensor(3), ValueError, "Expected orders of shape (K, 3) with K >= 1 and 3 sites; got ()."),
        ([0, 1, 2], TypeError, "Expected orders[0] to be a tensor or a list of integers; got 0."),
        (["abc"], TypeError, "Expected orders[0] to be a tensor or a list of integers; got 'abc'."),
        ([[0, 1]], ValueError, "Expected orders[0] to be a permutation of 0 ... 2 (the sites); got [0, 1]."),
        ([[0, 1, 1]], ValueError, "Expected orders[0] to be a permutation of 0 ... 2 (the sites); got [0, 1, 1]."),
        (
            [[0, 1, "2"]],
            ValueError,
            "Expected orders[0] to be a permutation of 0 ... 2 (the sites); got [0, 1, '2'].",
        ),
        (
            torch.tensor([[0.0, 1.0, 2.0]]),
            ValueError,
            "Expected orders[0] to be a permutation of 0 ... 2 (the sites); got [0.0, 1.0, 2.0].",
        ),
    ],
)
def test_orders(orders, kind, text):
    fails(kind, text, lambda: gx.OrderEnsemble(numbers(), orders))


def test_orders_of_booleans():
    text = "Expected orders[0] to be a permutation of 0 ... 1 (the sites); got [False, True]."
    fails(ValueError, text, lambda: gx.OrderEnsemble(numbers(2), torch.tensor([[False, True]])))


def test_orders_that_are_right():
    for orders in ([[2, 0, 1]], [torch.tensor([2, 0, 1])], ((2, 0, 1),), torch.tensor([[2, 0, 1]])):
        assert gx.OrderEnsemble(numbers(), orders).orders.tolist() == [[2, 0, 1]]


# Conditioners of flows


def three(P, C, other):
    raise AssertionError("never called")


RECIPES = [
    f.maf,
    f.nsf,
    f.realnvp,
    f.glow_vector,
    lambda features, **o: f.autoregressive(h.Affine, features, **o),
    lambda features, **o: f.coupling(h.Affine, features, **o),
    lambda features, **o: t.Coupling(features, h.Affine(), **o),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_conditioner(recipe):
    text = "Expected conditioner to be a callable (num_params, context) that makes one; got"
    for wrong, got in (
        (1, "int"),
        ("x", "str"),
        (c.MADE(2, 2), "MADE"),
        (nn.Linear(2, 2), "Linear"),
        (lambda: None, "<lambda>()"),
        (lambda P: None, "<lambda>(P)"),
        (three, "three(P, C, other)"),
    ):
        fails(TypeError, f"{text} {got}.", lambda w=wrong: recipe(2, conditioner=w))
    for wrong, got in ((lambda P, C: None, "NoneType"), (lambda P, C: nn.Linear(P, 2), "Linear")):
        text = f"Expected conditioner(num_params, context) to be a Conditioner; got {got}."
        fails(TypeError, text, lambda w=wrong: recipe(2, conditioner=w))
    with pytest.raises(ValueError, match=r"^Expected a conditioner of \(num_params, context\) == \(\d+, \d\); got "):
        recipe(2, conditioner=lambda P, C: c.MADE(2, P + 1, context=C))


def test_error_within_the_callable_is_its_own():
    def make(P, C):
        raise TypeError("of the user")

    fails(TypeError, "of the user", lambda: f.maf(2, conditioner=make))


# Conditional


class Gives(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def test_network():
    for wrong in (None, 1, "x", lambda x: x, Z(3, 2), nn.Linear, dist.Normal(0.0, 1.0)):
        text = f"Expected network to be of class Module; got {type(wrong).__name__}."
        fails(TypeError, text, lambda w=wrong: gx.Conditional(w, h.Normal(), 3))
        fails(TypeError, text, lambda w=wrong: gx.Conditional(w, h.Normal()))


def test_outputs_of_the_network():
    def call(output):
        return gx.Conditional(Gives(output), h.Normal(), 3)(Z(5, 3))

    for wrong, got in ((None, "NoneType"), ([1.0, 2.0], "list"), ((Z(5, 2), None), "tuple"), (1.0, "float")):
        text = f"Expected the network's outputs to be a tensor of floating-point numbers; got {got}."
        fails(TypeError, text, lambda w=wrong: call(w))
    for kind in (torch.long, torch.bool, torch.complex64):
        text = f"Expected the network's outputs to be a tensor of floating-point numbers; got {kind}."
        fails(TypeError, text, lambda k=kind: call(Z(5, 2, dtype=k)))
    for shape in ((5, 3), ()):
        text = f"Expected the network's outputs (*batch, 2) (num_params of the head); got {shape}."
        fails(ValueError, text, lambda s=shape: call(Z(s)))


# Observations of a hidden Markov model


@pytest.mark.parametrize("family", [lambda: dist.Normal(Z(2), 1.0), lambda: dist.Bernoulli(Z(2) + 0.5)])
def test_observations_that_are_no_floats(family):
    """Booleans and integers are the numbers that they are for other distributions too."""
    d = gx.HiddenMarkov(Z(2), Z(2, 2), family(), duration=3)
    x = torch.tensor([1.0, 0.0, 1.0])
    for kind in (torch.bool, torch.long, torch.uint8):
        for query in (d.log_prob, d.filter, lambda value: d.posterior(value).marginals):
            torch.testing.assert_close(query(x.to(kind)), query(x))
