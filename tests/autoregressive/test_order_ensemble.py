"""Ensembles of orders: mixtures, columns, weights in use."""

import math

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.distributions import AutoregressiveDistribution
from support.small_models import CONTEXT, ORDER, binary
from support.values import built


def test_order_ensemble_is_the_mixture_over_orders():
    orders = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]])
    for net in (conditioners.MADE(6, 1, hidden=(16,), context=2), conditioners.NADE(6, 1, hidden=8, context=2)):
        model = built(gx.Autoregressive(net, heads.Bernoulli(), (6,)))
        ensemble = gx.OrderEnsemble(model, orders).eval()
        d = ensemble(CONTEXT)
        support = d.enumerate_support(expand=False)
        parts = []
        for order in orders:
            under = AutoregressiveDistribution(net.permuted(order), heads.Bernoulli(), (6,), CONTEXT, order=order)
            parts.append(under.log_prob(support))
        parts = torch.stack(parts)
        assert (parts[0] - parts[1]).abs().max() > 0.01
        torch.testing.assert_close(d.log_prob(support), parts.logsumexp(0) - math.log(3))
        torch.testing.assert_close(d.log_prob(support).logsumexp(0), torch.zeros(3, dtype=torch.float64))
        p = d.log_prob(support).exp()
        torch.testing.assert_close(d.entropy(), -(p * p.log()).sum(0))
        torch.testing.assert_close(d.mean, (p[..., None] * support).sum(0))
        assert torch.equal(d.mode, support[p.argmax(0), 0])
        torch.manual_seed(0)
        y = d.sample((4000,))
        p = d.log_prob(support).exp()
        frequencies = (y[:, None] == support).all(-1).double().mean(0)
        assert ((frequencies - p).abs() < 5 * (p / 4000).sqrt() + 1e-3).all()
        ensemble.train()
        seen = {round(ensemble(CONTEXT).log_prob(support[7])[0].item(), 9) for _ in range(40)}
        assert seen == {round(lp.item(), 9) for lp in parts[:, 7, 0]}


def test_order_ensemble_of_columns():
    """Each column keeps its head wherever an order puts it."""
    head = heads.PerSite([heads.Bernoulli(), heads.Normal(), heads.Gamma()])
    model = built(gx.Autoregressive(conditioners.MADE(3, head.num_params, hidden=(9,)), head, (3,)))
    orders = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    ensemble = gx.OrderEnsemble(model, orders).eval()
    y = torch.tensor([[1.0, -0.5, 2.0], [0.0, 1.5, 0.3]], dtype=torch.float64)
    total = 0.0
    for order in orders:
        net, visited = model.conditioner.permuted(order), y[:, order]
        phi = net(visited)
        for i, variable in enumerate(order.tolist()):
            one = head.heads[variable]
            total = total + one(phi[:, i : i + 1, : one.num_params]).log_prob(visited[:, i : i + 1])[:, 0]
    d = ensemble()
    parts = torch.stack([c.log_prob(y) for c in d.components])
    torch.testing.assert_close(parts.sum(0), total)
    torch.testing.assert_close(d.log_prob(y), parts.logsumexp(0) - math.log(3))
    assert d.support.check(d.sample((50,))).all()


def test_an_ensemble_in_use_follows_its_weights():
    """Like other distributions here: all weights as they are now, gradients in the mode of the use, as often as wanted."""
    ensemble = gx.OrderEnsemble(binary(context=0), torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])).eval()
    y = torch.ones(6, dtype=torch.float64)
    with torch.no_grad():
        d = ensemble()
        before = d.log_prob(y)
        for p in ensemble.parameters():
            p.add_(0.5)
    for _ in range(2):
        torch.testing.assert_close(d.log_prob(y), ensemble().log_prob(y))
        d.log_prob(y).backward()
    assert (d.log_prob(y) - before).abs() > 0.01 and all(p.grad is not None for p in ensemble.parameters())


def test_validation_is_scored_under_the_first_orders():
    orders = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]])
    model = binary(context=0)
    ensemble = gx.OrderEnsemble(model, orders, validation=2)
    x = torch.bernoulli(torch.full((64, 6), 0.3, dtype=torch.float64))
    result = gx.fit(ensemble, x, validation=x, epochs=2, progress=False)
    first = gx.OrderEnsemble(model, orders[:2]).eval()().log_prob(x).mean()
    assert result.best_epoch == 1 and result.validation[-1] == pytest.approx(first.item(), abs=1e-9)
    assert len(ensemble.eval()().components) == 3 and len(ensemble.for_validation().eval()().components) == 2


def test_order_ensemble_refuses():
    model = gx.Autoregressive(conditioners.Recurrent((), 1), heads.Bernoulli(), (6,))
    with pytest.raises(ValueError, match=r"weights belong to variables; got Recurrent"):
        gx.OrderEnsemble(model, 2)
    with pytest.raises(ValueError, match=r"autoregressive\.order to be None"):
        gx.OrderEnsemble(binary(ORDER), 2)
    with pytest.raises(ValueError, match=r"permutation of 0 ... 5"):
        gx.OrderEnsemble(binary(), torch.zeros(2, 6, dtype=torch.long))
