"""Wrong inputs of MADE, by the text of their errors."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import pyro_genexact as gx
from support.checks import fails

MADE, Affine, T = gx.conditioners.MADE, gx.heads.Affine, gx.transforms
zeros, ones = torch.zeros, torch.ones
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("shape", [(3, 3), (3, 2, 2), (3,)])
def test_value_of_another_shape_in_made(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape}.")):
        MADE(2, 1, hidden=(8,))(zeros(shape))


# Networks


def test_narrow_hidden_layers():
    text = (
        "Expected hidden layers wide enough for every site to read an earlier one; got hidden=(2, 5), where site 1 "
        "of 5 reads none (increase the widths or set direct=True)."
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
        (ones(3, 3).tril().bool(), "(sites read earlier sites); got True at [0, 0]."),
        (ones(3, 3).triu(1).bool(), "(sites read earlier sites); got True at [0, 1]."),
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
    text = "Expected activation to be an elementwise function without parameters that is not in place; got "
    fails(ValueError, text, lambda: MADE(3, 2, hidden=(8,), activation=activation))


def test_numbers_of_parameters_of_conditioner_and_head():
    text = "Expected conditioner.num_params == 2 (num_params of the head); got 3."
    fails(ValueError, text, lambda: T.AutoregressiveTransform(MADE(3, 3), Affine()))


# States


def test_extend_beyond_the_last_site():
    net = MADE(4, 2, hidden=(8,))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            _, state = net.start(None, 5)
            text = "Expected y.shape[1] between 1 and 3 (0 of 4 sites have been read, and the last site is never read); got (5, 4)."
            fails(ValueError, text, lambda state=state: net.extend(zeros(5, 4), state))
            fails(ValueError, "got (5, 0).", lambda state=state: net.extend(zeros(5, 0), state))
            _, state = net.extend(zeros(5, 2), state)
            text = "Expected y.shape[1] between 1 and 1 (2 of 4 sites have been read, and the last site is never read); got (5, 2)."
            fails(ValueError, text, lambda state=state: net.extend(zeros(5, 2), state))
            phi, state = net.extend(zeros(5, 1), state)
            assert phi.shape == (5, 1, 2)
            text = "Expected y.shape[1] between 1 and 0 (3 of 4 sites have been read, and the last site is never read); got (5, 1)."
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
