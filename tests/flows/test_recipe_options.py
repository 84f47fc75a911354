"""Options of the recipes of flows: signatures, supports, sizes, heads, conditioners and errors."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import flows, heads
from pyro_genexact.conditioners import MADE, Independent, Markov, Recurrent
from support.checks import close
from support.recipes import COUPLINGS, RECIPES, by_jacobian, couplings, make, recipes
from support.values import F64

# Shared options


@recipes
def test_signatures_share_their_defaults(name):
    """Recipes spell all options out; each default is that of maf, but for the two documented exceptions."""
    common, own = (inspect.signature(recipe).parameters for recipe in (flows.maf, RECIPES[name]))
    different = {key for key, p in common.items() if key not in own or own[key].default != p.default}
    assert different == {"iaf": {"activation", "inverse"}, "bnaf": {"activation", "hidden"}}.get(name, set())
    assert all(p.kind is not p.VAR_KEYWORD for p in own.values())


@recipes
def test_support_and_standardize(name):
    """Changes of variables by hand, from the flow over the reals with the same weights."""
    rows = torch.randn(100, 3, dtype=F64) * torch.tensor([3.0, 0.1, 1.0], dtype=F64) + torch.tensor([10.0, -1.0, 0.0])
    flow, plain = make(name, 3, support=constraints.positive, standardize=rows.div(4).exp()), make(name, 3)
    x = rows / 4
    shift, scale = x.mean(0), x.std(0, correction=0)
    expected = plain().log_prob((x - shift) / scale) - scale.log().sum() - x.sum(-1)
    close(flow().log_prob(x.exp()), expected, 1e-8)
    assert (flow().sample((100,)) > 0).all()
    simplex = make(name, 3, support=constraints.simplex)()
    draws = simplex.sample((100,))
    assert draws.shape == (100, 3) and simplex.support.check(draws).all()
    assert simplex.log_prob(draws).isfinite().all()


@recipes
def test_options_of_sizes_and_names(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'hiden'"):
        RECIPES[name](3, hiden=(8,))
    with pytest.raises(ValueError, match=r"Expected features to be an integer >= 1; got 0\."):
        RECIPES[name](0)
    with pytest.raises(ValueError, match=r"Expected transforms to be an integer >= 1; got 0\."):
        RECIPES[name](3, transforms=0)


def test_options_of_heads():
    shapes = {name: p.shape for name, p in flows.nsf(3, bins=5, hidden=(8,), transforms=1).named_parameters()}
    assert shapes["transforms.0.transform.conditioner.layers.1.bias"].numel() == 3 * (3 * 5 - 1)
    assert (
        flows.bpf(3, degree=9).transforms[0].transform.head.num_params
        != flows.bpf(3).transforms[0].transform.head.num_params
    )
    assert (
        flows.sospf(2, polynomials=2, degree=1).transforms[0].transform.head.num_params
        == heads.SumOfSquares(2, 1).num_params
    )
    assert flows.umnn(2, signal=5).transforms[0].transform.head.num_params == heads.IntegratedPositive(5).num_params
    x = torch.tensor([3.0, -20.0])
    close(flows.nsf(2, bound=2.0)().transforms[0].inv(x), x)  # beyond the bound, the identity; reversed twice


# Networks


AUTOREGRESSIVE = [name for name in RECIPES if name not in (*COUPLINGS, "bnaf")]


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize(
    "net",
    [
        lambda P, C: Recurrent((), P, context=C, hidden=5),
        lambda P, C: Markov((), P, order=1, context=C, hidden=(5,), activation=torch.tanh),
        lambda P, C: Independent(3, P, context=C, hidden=(5,), activation=torch.tanh),
        lambda P, C: MADE(3, P, context=C, hidden=(5,), direct=True, activation=torch.tanh),
    ],
    ids=["recurrent", "markov", "independent", "direct"],
)
def test_conditioner_of_an_autoregressive_flow(name, net):
    made = []

    def conditioner(P, C):
        made.append(net(P, C))
        return made[-1]

    flow, c, y = (
        make(name, 3, context=2, conditioner=conditioner),
        torch.randn(2, 2, dtype=F64),
        torch.randn(2, 3, dtype=F64),
    )
    assert len(made) == 2 and all(any(m is n for m in flow.modules()) for n in made)
    expected = torch.cat([by_jacobian(flow(row), value[None]) for row, value in zip(c, y, strict=True)])
    close(flow(c).log_prob(y), expected, 1e-8)


@couplings
def test_conditioner_of_a_coupling(name):
    made = []

    def conditioner(P, C):
        made.append((P, C))
        return Independent(1, P, context=C, hidden=(5,), activation=torch.tanh)

    flow, c, y = (
        make(name, 5, context=2, conditioner=conditioner),
        torch.randn(2, 2, dtype=F64),
        torch.randn(2, 5, dtype=F64),
    )
    assert len(made) == 2 and {C for _, C in made} == {4}  # two features and the context
    expected = torch.cat([by_jacobian(flow(row), value[None]) for row, value in zip(c, y, strict=True)])
    close(flow(c).log_prob(y), expected, 1e-8)


def test_conditioners_that_are_none():
    text = r"Expected conditioner=None \(the network of bnaf is itself the bijection.*; got function\."
    with pytest.raises(ValueError, match=text):
        flows.bnaf(3, conditioner=lambda P, C: MADE(3, P, context=C))
    for recipe in (flows.maf, flows.nsf, flows.realnvp, flows.glow_vector):
        with pytest.raises(
            TypeError, match=r"Expected conditioner\(num_params, context\) to be a Conditioner; got Linear\."
        ):
            recipe(3, conditioner=lambda P, C: nn.Linear(3, P))
    with pytest.raises(
        ValueError, match=r"Expected a conditioner of \(num_params, context\) == \(2, 0\); got \(5, 0\)\."
    ):
        flows.maf(3, conditioner=lambda P, C: MADE(3, 5))


def test_heads_that_are_none():
    for builder in (flows.autoregressive, flows.coupling):
        with pytest.raises(TypeError, match=r"Expected head to be a callable that makes a head; got Affine\."):
            builder(heads.Affine(), 3)
        with pytest.raises(TypeError, match=r"Expected head to be a callable that makes a head; got Linear\."):
            builder(lambda: nn.Linear(2, 2), 3)


def test_heads_of_distributions():
    text = r"Expected head to make bijections; got {}, whose call returns "
    for builder in (flows.autoregressive, flows.coupling):
        with pytest.raises(TypeError, match=text.format("Normal") + "Normal"):
            builder(heads.Normal, 3)
    with pytest.raises(TypeError, match=text.format("Categorical") + "Categorical"):
        gx.transforms.Coupling(3, heads.Categorical(4))
    with pytest.raises(TypeError, match=r"Expected head to be of class Head; got Linear\."):
        gx.transforms.Coupling(3, nn.Linear(2, 2))


def test_conditioners_that_are_no_callables_or_read_another_context():
    text = r"Expected conditioner to be a callable \(num_params, context\) that makes one; got MADE\."
    for recipe in (flows.maf, flows.realnvp, flows.glow_vector):
        with pytest.raises(TypeError, match=text):
            recipe(3, conditioner=MADE(3, 2))
    with pytest.raises(
        ValueError, match=r"Expected a conditioner of \(num_params, context\) == \(2, 2\); got \(2, 0\)\."
    ):
        flows.maf(3, 2, conditioner=lambda P, C: MADE(3, P))
    with pytest.raises(
        ValueError, match=r"Expected a conditioner of \(num_params, context\) == \(\d, 1\); got \(\d, 0\)\."
    ):
        flows.realnvp(3, conditioner=lambda P, C: Independent(1, P))


def test_widths_that_are_no_sequence():
    for recipe in (flows.bnaf, flows.maf, flows.realnvp):
        with pytest.raises(ValueError, match=r"Expected hidden to be a sequence of integers >= 1; got 8\."):
            recipe(3, hidden=8)


@pytest.mark.parametrize("name", ["autoregressive", "coupling", "bnaf", "glow_vector"])
def test_unknown_options_name_the_recipe(name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'hiden'"):
        RECIPES[name](3, hiden=(8,))
