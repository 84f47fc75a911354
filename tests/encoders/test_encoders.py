"""Encoders: standardisation, errors, and what a DeepSet learns of sets of all sizes."""

import functools

import pytest
import torch
from torch import nn

from pyro_genexact import conditioners
from pyro_genexact.contexts import PaddedSequence
from pyro_genexact.core.functional import as_on_a_device
from pyro_genexact.encoders import DeepSet, Joint, Series, SetTransformer, Standardized, Vector
from support.values import double, sized


def test_standardize_reads_what_was_observed():
    x = 1e6 + sized(50, 4, 3) * double(1.0, 1e-3, 0.0)
    x[..., 2] = 0.1
    lengths = torch.arange(50) % 5
    beyond = torch.arange(4) >= lengths[:, None]
    x[0, 0, 0] = x[7, 1, 1] = torch.nan
    values = PaddedSequence(x.masked_fill(beyond[..., None], torch.inf), lengths)
    encoder = DeepSet(3, 2).double().standardize(values)
    rows = x[~beyond].double()
    for i in (0, 1):
        column = rows[:, i][~rows[:, i].isnan()]
        torch.testing.assert_close(encoder.shift[i], column.mean(), rtol=1e-14, atol=0)
        torch.testing.assert_close(encoder.scale[i], column.std(correction=0), rtol=1e-6, atol=0)
    assert encoder.shift[2] == 0.1 and encoder.scale[2] == 1  # a constant is shifted alone
    z, seen = encoder.entries(values)
    assert not z[~seen].any() and seen.sum() == 3 * lengths.sum() - 1  # one of the two is in the padding


def test_standardize_leaves_what_was_never_observed():
    encoder = Vector(2, 3).standardize(torch.tensor([[1.0, torch.nan], [3.0, torch.nan]]))
    assert encoder.shift.tolist() == [2, 0] and encoder.scale.tolist() == [1, 1]
    encoder.standardize(torch.zeros(0, 2))
    assert encoder.shift.tolist() == [2, 0] and encoder.scale.tolist() == [1, 1]


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_standardize_in_any_unit(unit):
    x = sized(50, 1).float()
    encoder = Standardized(1)
    z = encoder.standardize(unit * x)(unit * x)
    torch.testing.assert_close(z, Standardized(1).standardize(x)(x), rtol=1e-5, atol=1e-5)


def test_integers_are_numbers():
    encoder = DeepSet(2, 3)
    counts = torch.tensor([[[3, 0], [1, 7]]])
    assert torch.equal(encoder(counts), encoder(counts.float()))


def test_absent_items_are_skipped_or_masked():
    """Both ways, with and without reading the mask, give the same sums and gradients."""
    encoder = DeepSet(2, 3).double()
    values = PaddedSequence(sized(6, 5, 2), torch.arange(6))
    found = []
    for on_a_device in (False, True):
        with as_on_a_device() if on_a_device else torch.enable_grad():
            c = encoder(values)
            found.append((c, *torch.autograd.grad(c.square().sum(), [*encoder.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


X = torch.zeros(4, 7, 2)
OF_A_SITE = functools.partial(conditioners.MADE, 3, 2)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: DeepSet(0, 2), ValueError, r"inputs to be an integer >= 1; got 0"),
        (lambda: DeepSet(2, 2, width=0), ValueError, r"width to be an integer >= 1; got 0"),
        (lambda: SetTransformer(2, 2, width=6), ValueError, r"width to be a multiple of num_heads; got 6 and 4"),
        (lambda: SetTransformer(2, 2, depth=-1), ValueError, r"depth to be an integer >= 0; got -1"),
        (lambda: Series(2, 2, conditioner=3), TypeError, r"conditioner to be callable; got int"),
        (lambda: Series(2, 2, conditioner=lambda *_: nn.Linear(2, 2)), TypeError, r"to be a Conditioner; got Linear"),
        (lambda: Series(2, 2, conditioner=lambda *_: OF_A_SITE()), ValueError, r"got num_sites=3, context=0"),
        (lambda: DeepSet(2, 2)([1.0]), TypeError, r"values to be a tensor or a PaddedSequence; got list"),
        (lambda: Vector(2, 2)(PaddedSequence(X, X)), TypeError, r"values to be a tensor; got PaddedSequence"),
        (lambda: DeepSet(3, 2)(X), ValueError, r"values of shape \(\*batch, N, 3\); got \(4, 7, 2\)"),
        (lambda: DeepSet(2, 2)(X[0, 0]), ValueError, r"values of shape \(\*batch, N, 2\); got \(2,\)"),
        (lambda: DeepSet(2, 2)(X.double()), ValueError, r"values.dtype == torch.float32"),
        (lambda: DeepSet(2, 2)(PaddedSequence(X, torch.ones(3, dtype=torch.long))), ValueError, r"got \(3,\)"),
        (lambda: DeepSet(2, 2)(PaddedSequence(X, torch.full((4,), 8))), ValueError, r"between 0 and 7 .*; got 8"),
        (lambda: DeepSet(2, 2)(PaddedSequence(X, torch.ones(4))), TypeError, r"lengths to be a tensor of integers"),
        (lambda: DeepSet(2, 2)(PaddedSequence(X, 3)), TypeError, r"lengths to be a tensor of integers; got int"),
        (lambda: DeepSet(2, 2).standardize(X + torch.inf), ValueError, r"got infinity at entry"),
        (lambda: Standardized(2)(X / 0), ValueError, r"without NaN \(Vector encodes missing entries\); got 56"),
        (lambda: Joint([Vector(2, 2)]), TypeError, r"encoders to be a dict; got list"),
        (lambda: Joint({}), ValueError, r"at least one site"),
        (lambda: Joint({"y": nn.Tanh()}), TypeError, r"encoders\['y'\] to be a module .* got Tanh"),
        (lambda: Joint({"y": Vector(2, 2)})(X), TypeError, r"values to be a dict; got Tensor"),
        (lambda: Joint({"y": Vector(2, 2)})({"x": X}), ValueError, r"values of \['y'\]; got those of \['x'\]"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def draws(rows, n=None):
    """Sets of 1 ... 1000 normal draws, most of them small, and their means and log scales."""
    lengths = torch.exp(torch.rand(rows) * 6.9).long() if n is None else torch.full((rows,), n)
    truth = torch.randn(rows, 2) * torch.tensor([1.0, 0.5])
    values = truth[:, :1] + truth[:, 1:].exp() * torch.randn(rows, int(lengths.max()))
    return truth, PaddedSequence(values.unsqueeze(-1), lengths)


def test_one_encoder_for_sets_of_all_sizes():
    """A regression finds the mean with errors of about 1 / sqrt(n), those of the sample mean, and something of the log scale."""
    encoder = DeepSet(1, 2, width=16).standardize(draws(200)[1])
    optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-2)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 2e-2 * (1 - step / 120)
        truth, values = draws(48)
        weights = 1 + torch.stack([values.lengths, values.lengths.clamp(max=30)], 1)
        loss = ((encoder(values) - truth).square() * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for n in (1, 10, 100, 1000):
        truth, values = draws(300, n)
        with torch.no_grad():
            error = (encoder(values) - truth).square().mean(0).sqrt()
        assert error[0] < 1.5 * n**-0.5 + 0.06 and error[1] < (0.6 if n == 1 else 0.45)
