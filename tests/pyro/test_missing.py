"""Missing entries of autoregressive sites: masked factors, completions, rows without an observation."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyro_genexact.distributions import AutoregressiveDistribution
from support.checks import close, has_frequencies
from support.pyro_models import (
    ROWS,
    T,
    W,
    X,
    Y,
    binaries,
    build,
    by_hand,
    call,
    draws,
    nets,
    normal,
    nothing,
    same_loss_and_gradient,
    sites_by_hand,
)

SEEN = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)  # the missing entries last
HOLES = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)


def factored(model, y, seen, d=None):
    def f():
        pyro.module("net", model)
        factors = (d or call(model)).log_prob_sites(torch.where(seen, y, 0.0))
        with pyro.plate("rows", ROWS, dim=-2), pyro.plate("sites", T, dim=-1), poutine.mask(mask=seen):
            pyro.factor("y", factors)

    return f


def marginal_by_hand(model, y, seen):
    """log p of the seen entries, by enumeration of the others, (ROWS,)."""
    z = binaries()[:, None]
    possible = ((z == y) | ~seen).all(-1)
    return torch.where(possible, by_hand(model, z, X), -torch.inf).logsumexp(0)


@nets
@pytest.mark.parametrize("seen", [SEEN, HOLES])
def test_masked_factors(net, seen):
    model = build(net)
    y = draws(model)
    trace = poutine.trace(factored(model, y, seen)).get_trace()
    trace.compute_log_prob()
    factors = sites_by_hand(model, torch.where(seen, y, 0.0), X)
    close(trace.nodes["y"]["log_prob"], factors * seen)
    exact = marginal_by_hand(model, y, seen).sum()
    if seen is HOLES:  # a hole before a seen entry would have to be summed over: factors alone are not the marginal
        assert (trace.log_prob_sum() - exact).abs() > 1e-3
        return
    close(trace.log_prob_sum(), exact)
    same_loss_and_gradient(Trace_ELBO(), factored(model, y, seen), nothing, -exact, list(model.parameters()))


def test_masked_factors_in_another_order():
    """In visiting order 2, 0, 1, an entry of site 1 that is missing is the last."""
    order = torch.tensor([2, 0, 1])
    model = build("made")
    d = AutoregressiveDistribution(model.conditioner, model.head, (T,), X, order=order)
    y = draws(model)
    seen = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    got = poutine.trace(factored(model, y, seen, d)).get_trace().log_prob_sum()
    close(got, marginal_by_hand(model, y[:, order], seen[:, order]).sum())


def test_holes_as_enumerated_sites():
    """Any pattern of missing entries, exactly: they are sites of their own, and the completed event is observed."""
    model = build("nade")
    y = draws(model)

    def f():
        pyro.module("net", model)
        with pyro.plate("rows", ROWS):
            parts = []
            for t in range(T):
                fair = dist.Bernoulli(torch.full((ROWS,), 0.5, dtype=torch.float64))
                z = pyro.sample(f"z{t}", fair, infer={"enumerate": "parallel"})
                # seen entries must be what they are; and the fair coin's factor is taken back
                pyro.factor(
                    f"seen{t}", math.log(2) + torch.where(HOLES[:, t] & (z != y[:, t]), -torch.inf, 0.0).double()
                )
                parts.append(z)
            pyro.sample("y", model(X), obs=torch.stack(torch.broadcast_tensors(*parts), -1))

    truth = -marginal_by_hand(model, y, HOLES).sum()
    same_loss_and_gradient(TraceEnum_ELBO(max_plate_nesting=1), f, nothing, truth, list(model.parameters()))


@nets
def test_completions_are_drawn_from_the_exact_conditional(net):
    model = build(net).requires_grad_(False)
    prefix = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)

    def f():
        with pyro.plate("rows", ROWS):
            rest = pyro.sample("rest", model(X).conditional_on_prefix(prefix))
        return torch.cat([prefix.expand(*rest.shape[:-1], 1), rest], -1)

    y = Predictive(f, num_samples=4000, parallel=True, return_sites=["rest", "_RETURN"])()["_RETURN"]
    assert y.shape == (4000, ROWS, T)
    z = binaries()[:, None]
    joint = torch.where((z[..., :1] == prefix).all(-1), by_hand(model, z, X), -torch.inf)
    p = joint.softmax(0)
    has_frequencies(y, z, p)


@pytest.mark.parametrize("net", ["made", "recurrent"])
def test_a_completion_enumerated_within_a_model(net):
    """y_2, y_3 are missing and a measurement depends on the whole row: seen factors, the rest enumerated."""
    model = build(net)
    prefix = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)

    def f():
        pyro.module("net", model)
        d = model(X)
        padded = nn.functional.pad(prefix, (0, T - 1))
        with pyro.plate("rows", ROWS):
            pyro.factor("seen", d.log_prob_sites(padded)[:, 0])
            rest = pyro.sample("rest", d.conditional_on_prefix(prefix), infer={"enumerate": "parallel"})
            row = torch.cat([prefix.expand(*rest.shape[:-2], ROWS, 1), rest.expand(*rest.shape[:-2], ROWS, 2)], -1)
            pyro.sample("y", normal(row @ W, 0.5), obs=Y)

    z = binaries()[:, None]
    joint = by_hand(model, z, X) + normal(z @ W, 0.5).log_prob(Y)
    truth = -torch.where(z[..., 0] == prefix[:, 0], joint, -torch.inf).logsumexp(0).sum()
    same_loss_and_gradient(TraceEnum_ELBO(max_plate_nesting=1), f, nothing, truth, list(model.parameters()))


@nets
def test_rows_that_are_missing_as_a_whole(net):
    """``obs_mask``: seen rows are scored, the others drawn."""
    model = build(net)
    y, seen = draws(model), torch.tensor([True, False, True, False])

    def f():
        with pyro.plate("data", ROWS):
            return pyro.sample("y", call(model), obs=torch.where(seen[:, None], y, 0.0), obs_mask=seen)

    trace = poutine.trace(f).get_trace()
    trace.compute_log_prob()
    close(trace.nodes["y_observed"]["log_prob"], by_hand(model, y, X) * seen)
    drawn = torch.stack([f() for _ in range(300)])
    assert (drawn[:, seen] == y[seen]).all()
    p = by_hand(model, binaries()[:, None], X).exp()[:, ~seen]
    has_frequencies(drawn[:, ~seen], binaries()[:, None], p)
