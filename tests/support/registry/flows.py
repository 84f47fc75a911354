"""Flows: each a factory of a module and a context or None."""

from __future__ import annotations

from functools import partial
from math import inf

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact.conditioners import MADE, Recurrent
from pyro_genexact.testing import redraw
from support.registry.transforms import MIXED
from support.small_conditioners import RunningSum
from support.values import built, sized
from support.with_zuko import zuko


def flow(recipe, features, context=0, **options):
    def factory():
        module = built(recipe(features, context, **{"hidden": (8,), "transforms": 2, **options}))
        return module, sized(3, context, seed=1) if context else None

    return factory


def mild(recipe, features, context=0, **options):
    """Of recipes whose density would have spikes too narrow for the quadrature of the laws."""

    def factory():
        module, given = flow(recipe, features, context, **{"hidden": (6,), "activation": torch.tanh, **options})()
        redraw(module, spread=0.2)
        with torch.no_grad():
            for name, p in module.named_parameters():
                if ".network." in name and ".last." in name:  # of couplings, which are no conditioners
                    p.mul_(0.15)
        return module, given

    return factory


def images(patch, image_shape, context=0, **options):
    def factory():
        sizes = {"transforms": 2, "width": 8, "depth": 1, "num_heads": 1, **options}
        module = redraw(gx.flows.tarflow(image_shape, patch, context, **sizes).double(), spread=0.3)
        return module, sized(3, context, seed=1) if context else None

    return factory


def univariate(recipe, context=0, **options):
    return mild(
        lambda features, context, **options: gx.flows.univariate(recipe, context, **options), 1, context, **options
    )


def over_multivariate_normal():
    base = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    return built(gx.flows.maf(2, base=base, hidden=(8,), transforms=1)), None


def continuous(features, context=0):
    """A flow of zuko that integrates a differential equation, with tolerances below those of the laws."""

    def factory():
        net = {"hidden_features": (3,), "activation": nn.Tanh, "freqs": 0}
        made = built(gx.flows.from_zuko(zuko.flows.CNF(features, context, atol=1e-10, rtol=1e-10, **net)))
        with torch.no_grad():
            for p in made.parameters():
                p.mul_(0.35)  # so that few steps do
        return made, sized(3, context, seed=1) if context else None

    return factory


def directly():
    head = gx.heads.Affine()
    step = gx.transforms.AutoregressiveTransform(MADE(2, 2, context=2, hidden=(8,)), head)
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    parts = [
        step,
        gx.transforms.Permute(torch.tensor([1, 0])),
        dist.transforms.AffineTransform(torch.ones(2), torch.full((2,), 2.0), 1),
        gx.transforms.ToSupport(constraints.real, 2),
    ]
    return built(gx.Flow(parts, base)), sized(3, 2, seed=1)


def generic():
    step = gx.transforms.AutoregressiveTransform(RunningSum(2, context=2), gx.heads.Affine())
    return built(gx.Flow([step.inv], gx.Constant(dist.Normal(torch.zeros(2), 1.0).to_event(1)))), sized(2, 2, seed=1)


f = gx.flows
maf, iaf = f.maf, f.iaf
DISTRIBUTIONS = {
    "maf": flow(maf, 2),
    "maf one feature": flow(maf, 1, context=3),
    "maf one feature, no context": flow(maf, 1),
    "maf context": flow(maf, 2, context=3),
    "maf four features": flow(maf, 4, context=2, activation=torch.tanh),
    "maf positive": flow(maf, 2, support=constraints.positive),
    "maf interval": flow(maf, 1, context=2, support=constraints.interval(-1.0, 2.0)),
    "maf simplex": flow(maf, 3, support=constraints.simplex, activation=torch.tanh),
    "maf list": flow(maf, 2, context=1, support=[constraints.positive, constraints.unit_interval]),
    "maf list of four": flow(maf, 4, support=MIXED, activation=torch.tanh),
    "maf standardize": flow(maf, 2, support=constraints.positive, standardize=(2 * sized(20, 2) + 3).exp().float()),
    "maf normal base": over_multivariate_normal,
    "iaf": flow(iaf, 2),
    "iaf context": flow(iaf, 3, context=2),
    "iaf one feature": flow(iaf, 1, context=2, support=constraints.less_than(1.0)),
    "iaf simplex": flow(iaf, 3, context=2, support=constraints.simplex),
    "nsf": mild(f.nsf, 2, context=2, bins=3),
    "nsf inverse one feature": mild(f.nsf, 1, context=2, bins=3, inverse=True, support=constraints.positive),
    "naf": mild(f.naf, 2, units=3),
    "naf inverse one feature": mild(f.naf, 1, context=2, units=3, layers=2, inverse=True),
    "umnn one feature": mild(f.umnn, 1, context=2, transforms=1, signal=3, network=(5,)),
    "umnn inverse one feature": mild(f.umnn, 1, transforms=1, signal=3, network=(5,), inverse=True),
    "sospf": mild(f.sospf, 2, polynomials=2, degree=2),
    "sospf inverse one feature": mild(f.sospf, 1, context=2, degree=2, inverse=True),
    "bpf": mild(f.bpf, 2, context=1, degree=5, support=constraints.unit_interval),
    "bpf inverse one feature": mild(f.bpf, 1, context=2, degree=5, inverse=True),
    "bnaf": lambda: (built(f.bnaf(2, hidden=(4,), transforms=2)), None),
    "bnaf inverse": lambda: (built(f.bnaf(2, 2, hidden=(3,), transforms=1, inverse=True)), sized(3, 2, seed=1)),
    "realnvp": mild(f.realnvp, 2, context=2),
    "realnvp inverse": mild(f.realnvp, 3, inverse=True, support=constraints.simplex),
    "nice": mild(f.nice, 2, context=1),
    "glow_vector": mild(f.glow_vector, 2, context=2, transforms=1),
    "glow_vector inverse": mild(f.glow_vector, 2, inverse=True),
    "coupling_nsf": mild(f.coupling_nsf, 2, bins=3),
    "coupling_nsf inverse one feature": mild(f.coupling_nsf, 1, context=2, bins=3, inverse=True),
    "coupling": mild(partial(f.coupling, partial(h.Affine, bound=1.0)), 2, context=1),
    "autoregressive recurrent": mild(
        partial(f.autoregressive, h.Affine), 2, 1, conditioner=lambda P, C: Recurrent((), P, context=C, hidden=5)
    ),
    "tarflow": images(1, (1, 2), context=2),
    "tarflow inverse": images(1, (2, 1), inverse=True, transforms=1, support=constraints.unit_interval),
    "univariate nsf": univariate(f.nsf, 2, bins=3, support=constraints.positive),
    "univariate naf": univariate(f.naf, 1, units=3, support=constraints.less_than(1.0)),
    "univariate iaf": univariate(f.iaf, 2),
    "Flow": directly,
    "Flow generic": generic,
    "from_zuko CNF": continuous(2, context=1),
}
OUTSIDE = {  # values outside the support
    **{name: [[inf, 0.0], [-inf, inf]] for name in ("maf", "maf context", "maf normal base", "iaf", "Flow")},
    "maf positive": [[1.0, 0.0], [-1.0, 1.0]],
    "maf interval": [[-1.0], [2.0], [2.5], [-7.0]],
    "maf simplex": [[0.5, 0.5, 0.0], [0.5, 0.6, 0.2], [-0.1, 0.6, 0.5]],
    "maf list": [[0.0, 0.5], [1.0, 1.0], [1.0, 0.0], [-1.0, 0.5]],
    "maf list of four": [[0.0, 1.0, 0.0, 3.0], [0.0, -1.0, 0.0, 0.0], [0.0, 1.0, -1.0, 0.0]],
    "maf standardize": [[1.0, 0.0], [-1.0, 1.0]],
    "nsf inverse one feature": [[0.0], [-2.0]],
    "bpf": [[0.5, 1.0], [0.0, 0.5], [2.0, 0.5]],
    "realnvp inverse": [[0.5, 0.5, 0.0], [0.5, 0.6, 0.2]],
    "univariate nsf": [0.0, -2.0],
    "univariate naf": [1.0, 2.0],
    "iaf one feature": [[1.0], [2.0]],
    "iaf simplex": [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.6, 0.2]],
}
INERT = {
    name: ["*conditioner.layers.0.weight"]
    for name in DISTRIBUTIONS
    if "one feature" in name or "univariate" in name or name == "maf interval"
}
LARGE = ("maf four features", "maf list of four", "iaf context", "from_zuko CNF")  # for quadrature
# zuko makes its base on the default device, chooses steps by values, and its adjoint is none of torch.func's
SOLVED_BY_ZUKO = ("from_zuko CNF",)
