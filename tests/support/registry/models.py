"""Autoregressive models, ensembles of orders and conditionals: each a factory of a module and a context or None."""

from __future__ import annotations

from functools import partial

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact.conditioners import MADE
from pyro_genexact.simulation.columns import Columns, affine_splines
from support.registry.heads import flow_head, nested
from support.values import built, sized


def chained(head, sites=2, net=None, context=0, order=None, event_shape=None):
    """An autoregressive model, and a context."""

    def factory():
        it = head()
        make = net or (
            lambda P: MADE(
                sites, P, site=it.site_shape, hidden=(8,), context=context, activation=torch.tanh, direct=False
            )
        )
        module = gx.Autoregressive(make(it.num_params), it, event_shape or (sites, *it.site_shape), order)
        return built(module), sized(3, context, seed=1) if context else None

    return factory


def over_orders():
    net = gx.conditioners.NADE(4, 1, hidden=6, context=2)
    ensemble = gx.OrderEnsemble(gx.Autoregressive(net, h.Bernoulli(), (4,)), torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]]))
    return built(ensemble).eval(), sized(3, 2, seed=1)


def guided(make, weight):
    def factory():
        module, context = make()
        return gx.Guided(module, rate=0.0, weight=weight).eval(), context

    return factory


def conditional(head):
    def factory():
        it = head()
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, it.num_params))
        return built(gx.Conditional(net, it)), sized(3, 3, seed=1)

    return factory


def steps():
    net = gx.conditioners.Recurrent((), 2, hidden=5, context=gx.Covariates(2))
    return built(gx.Autoregressive(net, h.Laplace(), (2,))), sized(3, 2, 2, seed=1)


def columns(*support):
    """The distribution of a learned likelihood, given its encoded inputs: of a scalar or of a vector."""

    def factory():
        recipe = partial(affine_splines, hidden=(8,), activation=torch.tanh)
        of, shape = (support[0], ()) if len(support) == 1 else (list(support), (len(support),))
        return built(Columns(of, shape, 2, recipe)), sized(3, 2, seed=1)

    return factory


DISTRIBUTIONS = {
    "Columns continuous": columns(constraints.positive),
    "Columns discrete": columns(
        constraints.integer_interval(0, 2), constraints.boolean, constraints.integer_interval(0, 40)
    ),
    "Guided categories": guided(
        chained(lambda: h.Categorical(3), 3, lambda P: gx.conditioners.NADE(3, P, site=3, hidden=6, context=2), 2), 1.5
    ),
    "Guided normals": guided(chained(h.Normal, 2, context=2), -0.4),
    "Autoregressive binary": chained(h.Bernoulli, 4, context=2),
    "Autoregressive image": chained(h.Bernoulli, 6, order=[3, 1, 0, 2, 5, 4], event_shape=(2, 3)),
    "Autoregressive categories": chained(
        lambda: h.Categorical(3), 4, lambda P: gx.conditioners.NADE(4, P, site=3, hidden=6)
    ),
    "Autoregressive pixels": chained(
        h.Bernoulli,
        8,
        lambda P: gx.conditioners.PixelCNN((2, 2, 2), P, width=4, depth=1, context=2),
        context=2,
        event_shape=(2, 2, 2),
    ),
    "Autoregressive counts": chained(h.Poisson, 3),
    "Autoregressive levels": chained(lambda: h.DiscretizedLogistic(4, 2), 3, context=1),
    "Autoregressive nested": chained(nested, 2),
    "Autoregressive normal": chained(h.Normal, context=2),
    "Autoregressive recurrent": chained(h.Laplace, 2, lambda P: gx.conditioners.Recurrent((), P, hidden=5)),
    "Autoregressive markov": chained(h.LogNormal, 2, lambda P: gx.conditioners.Markov((), P, order=1, hidden=(5,))),
    "Autoregressive steps": steps,
    "Autoregressive vectors": chained(lambda: h.MultivariateNormal(2), 1, context=1),
    "Autoregressive simplex": chained(lambda: h.ContinuousCategorical(3), 1, context=1),
    "Autoregressive entmax": chained(
        lambda: h.EntmaxCategorical(3), 4, lambda P: gx.conditioners.NADE(4, P, site=3, hidden=6)
    ),
    "Autoregressive mixture": chained(lambda: h.Mixture(h.Normal(), 2)),
    "Autoregressive columns": chained(lambda: h.PerSite([h.LogNormal(), h.Normal()]), order=[1, 0]),
    "Autoregressive flow": chained(flow_head, 1),
    "OrderEnsemble": over_orders,
    "Conditional": conditional(lambda: h.MultivariateNormal(2)),
    "Conditional positive": conditional(h.LogNormal),
    "Conditional sparse": conditional(lambda: h.BetaGaussian(alpha=1.5)),
    "Conditional interval": conditional(lambda: h.Parametric(dist.Kumaraswamy)),
    "Conditional discrete": conditional(lambda: h.Categorical(3)),
    "Conditional nested": conditional(nested),
    "Conditional twice": conditional(lambda: h.ConditionalHead(gx.Conditional(nn.Linear(4, 1), h.Bernoulli()))),
}
OUTSIDE = {  # values outside the support
    "Columns continuous": [-1.0, 0.0],
    "Columns discrete": [[3.0, 0.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 41.0], [0.0, 0.0, 0.5]],
    "Conditional positive": [-1.0, 0.0],
    "Conditional interval": [-1.0, 0.0, 1.0, 2.0],
    "Conditional discrete": [-1.0, 0.5, 3.0],
    "Autoregressive binary": [[0.0, 1.0, 0.5, 0.0], [2.0, 1.0, 0.0, 0.0]],
    "Autoregressive image": [[[0.0, 1.0, 0.5], [0.0, 1.0, 1.0]]],
    "Autoregressive categories": [[0.0, 3.0, 1.0, 1.0], [0.0, 0.5, 1.0, 1.0], [-1.0, 0.0, 1.0, 1.0]],
    "Autoregressive counts": [[1.0, -1.0, 0.0], [0.5, 0.0, 0.0]],
    "Autoregressive levels": [[0.0, 4.0, 1.0], [0.0, 1.5, 1.0]],
    "Autoregressive markov": [[1.0, 0.0], [-1.0, 2.0]],
    "Autoregressive simplex": [[[0.5, 0.6, 0.2]], [[-0.1, 0.6, 0.5]]],
    "Autoregressive columns": [[1.0, -1.0], [1.0, 0.0]],
    "OrderEnsemble": [[0.0, 1.0, 0.5, 0.0]],
}
INERT = {  # nothing precedes the only site
    name: ["*conditioner.layers.0.weight"]
    for name in ("Autoregressive vectors", "Autoregressive simplex", "Autoregressive flow", "Columns continuous")
}
INERT["Columns discrete"] = ["counts.net.layers.0.weight"]
