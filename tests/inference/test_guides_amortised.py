"""``AutoFlow`` given data: latents of rows, the scale of plates, encoders."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    Trace_ELBO,
)
from torch import nn

import pyro_genexact as gx
from pyro_genexact.guides import AutoFlow
from support.latents import DOUBLE, numbers, plated

# amortised


def rows_model(y, total=None):
    with pyro.plate("data", total or len(y), subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(numbers(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("total", [None, 100])
@pytest.mark.parametrize("together", [False, True])
def test_amortised_rows_have_their_own_latents_and_scale(total, together):
    """The ELBO by hand of a linear Gaussian guide without noise of its own: each row's q is N(context, 0.01)."""
    y = torch.randn(6, 2, **DOUBLE)
    guide = AutoFlow(rows_model, gx.flows.iaf, context=2, hidden=(8,))
    call = lambda y, total=None: guide(y, total, context=2 * y)  # noqa: E731
    assert call(y, total)["z"].shape == (6, 2)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=together, max_plate_nesting=1)
    seen = []
    loss = elbo.loss(rows_model, lambda *a: seen.append(call(*a)) or seen[-1], y, total)
    z = torch.cat([s["z"].reshape(-1, 6, 2) for s in seen])
    assert z.shape == (3, 6, 2)
    log_q = guide.get_posterior(context=2 * y).log_prob(z)
    log_p = (dist.Normal(numbers(2), 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(y)).sum(-1)
    weight = 1.0 if total is None else total / 6
    assert loss == pytest.approx(weight * (log_q - log_p).sum(-1).mean().item(), rel=1e-6)
    assert call(y[:4], total)["z"].shape == (4, 2)  # batches of another size
    assert guide.quantiles([0.5, 0.9], context=2 * y)["z"].shape == (2, 6, 2)


def test_amortised_guide_learns_the_posterior():
    y = torch.randn(32, 2, **DOUBLE)
    encoder = nn.Linear(2, 3, **DOUBLE)
    guide = AutoFlow(rows_model, context=3, transforms=1, hidden=())

    def call(y):
        pyro.module("encoder", encoder)
        return guide(y, context=encoder(y))

    result = gx.fit_guide(rows_model, call, y, steps=250, lr=0.05, num_particles=1, progress=False)
    evidence = dist.Normal(0.0, 1.25**0.5).log_prob(y).sum().item()
    assert evidence - 1 < result.final < evidence + 0.1
    with torch.no_grad():
        z = guide.get_posterior(context=encoder(y)).sample((2000,))
    torch.testing.assert_close(z.mean(0), 0.8 * y, atol=0.2, rtol=0)
    assert (z.std(0) / 0.2**0.5 - 1).abs().max() < 0.25


@pytest.mark.parametrize("sizes", [[(6, None), (3, 30)], [(3, 30), (6, None)], [(3, 30), (3, 60)]])
def test_amortised_plates_are_those_of_each_call(sizes):
    """Whatever the first call was: latents count as often in the guide as in the model."""
    guide = AutoFlow(rows_model, context=2, hidden=(8,))
    for size, total in sizes:
        y = numbers(size, 2)
        trace = poutine.trace(guide).get_trace(y, total, context=y)
        model = poutine.trace(poutine.replay(rows_model, trace=trace)).get_trace(y, total)
        assert trace.nodes["z"]["scale"] == model.nodes["z"]["scale"] == (total or size) / size
    with pytest.raises(ValueError, match=r"context.shape\[:-1\] == \(3,\), the sizes of the plates .*; got \(4,\)"):
        guide(numbers(3, 2), context=numbers(4, 2))
    with pytest.raises(
        ValueError, match=r"Expected context with 1 batch dims, as in the first call; got context.shape\[:-1\] == \(\)"
    ):
        guide(numbers(3, 2), context=numbers(2))


def test_an_encoder_is_not_warmed_up():
    encoder = nn.Linear(2, 3, **DOUBLE)
    y = numbers(4, 2)
    AutoFlow(rows_model, context=3, hidden=(8,), warm_start=5)(y, context=encoder(y))
    assert encoder.weight.grad is None


def test_one_context_for_all_latents():
    guide = AutoFlow(plated, context=2, hidden=(8,))
    assert guide(context=numbers(2))["z"].shape == (3,)
