"""Wrong supports and standardisation of flows, by the text of their errors."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from support.checks import fails
from support.recipes import maf_and_iaf

MADE, Affine, T = gx.conditioners.MADE, gx.heads.Affine, gx.transforms
zeros, ones = torch.zeros, torch.ones
NAN, INF = float("nan"), float("inf")
SUPPORTS = {
    "positive": (constraints.positive, [[0.0, 1.0], [1.0, 0.0], [-1.0, 1.0], [1.0, INF]], [0.3, 2.0]),
    "nonnegative": (constraints.nonnegative, [[0.0, 1.0], [-1.0, 1.0]], [0.3, 2.0]),
    "unit interval": (constraints.unit_interval, [[0.5, 1.0], [0.0, 0.5], [1.5, 0.5]], [0.3, 0.9]),
    "interval": (constraints.interval(-2.0, 3.0), [[3.0, 0.0], [-2.0, 0.0], [0.0, 4.0]], [-1.0, 2.5]),
    "less than": (constraints.less_than(1.0), [[1.0, 0.0], [2.0, 0.0]], [-3.0, 0.5]),
    "simplex": (constraints.simplex, [[1.0, 0.0], [0.0, 1.0], [1.5, -0.5], [0.5, 0.6]], [0.3, 0.7]),
    "list": ([constraints.positive, constraints.unit_interval], [[0.0, 0.5], [1.0, 1.0], [1.0, 2.0]], [5.0, 0.2]),
}


@maf_and_iaf
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
        (3, [constraints.positive] * 2, "Expected support to list 3 scalar constraints, one per feature; got ["),
        (3, [], "Expected support to list 3 scalar constraints, one per feature; got []."),
        (
            2,
            [constraints.simplex, constraints.real],
            "Expected support to list 2 scalar constraints, one per feature; got [",
        ),
        (3, "positive", "Expected support to be a constraint or a list of constraints; got positive."),
        (2, [constraints.positive, "real"], "Expected support to list 2 scalar constraints, one per feature; got ["),
        (
            9,
            constraints.lower_cholesky,
            "Expected support to be the reals, a half line, an interval or the simplex; got ",
        ),
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
            "Expected standardize to hold finite rows inside the support; got values outside it at rows [1, 2].",
        ),
        (
            torch.tensor([[1.0, 1.0, NAN], [1.0, INF, 1.0]]),
            None,
            "Expected standardize to hold finite rows inside the support; got values outside it at rows [0, 1].",
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
        text = "Expected finite shift and positive finite scale; got others at features [1]."
        fails(ValueError, text, lambda scale=scale: T.Standardize(zeros(2), torch.tensor([1.0, scale])))
