"""Networks on which the native operator is compared with Python."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from pyro_genexact import heads as h
from pyro_genexact import native
from pyro_genexact.conditioners import MADE
from support.values import built, sized

BAND = torch.ones(20, 20, dtype=torch.bool).tril(-1).triu(-3)
NETWORKS = {  # the number of sites and options; panels have 16 sites
    "relu": (20, {"activation": torch.relu, "hidden": (40, 50)}),
    "tanh, context": (20, {"activation": torch.tanh, "context": 3}),
    "sigmoid, no direct link": (35, {"activation": torch.sigmoid, "hidden": (33, 70), "direct": False}),
    "silu, narrow": (18, {"activation": silu, "hidden": (3,)}),
    "linear": (17, {"hidden": ()}),
    "band": (20, {"adjacency": BAND}),
    "one site": (1, {"context": 2}),
    "dropout, in evaluation": (5, {"dropout": 0.5}),
}
BIJECTIONS = {
    "affine": lambda: h.Affine(bound=3.0),
    "affine vectors": lambda: h.Affine((3,)),
    "spline": lambda: h.RationalQuadraticSpline(),
    "spline vectors": lambda: h.RationalQuadraticSpline(5, bound=3.0, shape=(2,)),
    "sum of squares": h.SumOfSquares,
    "constant squares": lambda: h.SumOfSquares(2, degree=0),
    "Bernstein": h.Bernstein,
    "Bernstein of one slope": lambda: h.Bernstein(1),
    "sigmoids": h.DeepSigmoid,
}
FAMILIES = {
    "Bernoulli": (h.Bernoulli, ()),
    "Bernoulli of categories": (h.Bernoulli, 2),
    "Bernoulli vectors": (lambda: h.Bernoulli((3,)), (3,)),
    "Categorical": (lambda: h.Categorical(4), 4),
    "Parametric": (lambda: h.Parametric(torch.distributions.Categorical, (3,)), 3),
}


def network(name, head, site, dtype=torch.float64):
    sites, options = NETWORKS[name]
    net = built(MADE(sites, head.num_params, site=site, **options)).to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.4)  # so that 35 affine sites do not overflow
    return net


def both(call):
    results = []
    for on in (True, False):
        with native.enabled(on), torch.no_grad():
            torch.manual_seed(3)
            results.append(call())
    return results


def given_to(net, rows, *site_shape, dtype=torch.float64):
    context = sized(rows, net.context, seed=1).to(dtype) if net.context else None
    return sized(rows, net.num_sites, *site_shape).to(dtype), context
