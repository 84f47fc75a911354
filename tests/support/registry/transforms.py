"""Transforms and modules of such: each a factory of a module, values and a context or None."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.conditioners import MADE, Recurrent
from pyro_genexact.transforms.modules import transform_of
from support.registry.conditioners import CONDITIONERS, made
from support.values import Built, built, sized


def context_of(net, rows, sites):
    if isinstance(net.context, gx.Covariates):
        return sized(rows, sites, net.context.features, seed=1)
    return sized(rows, net.context, seed=1) if net.context else None


def autoregressive(conditioner, inverse=False, shape=(), sites=4, rows=3, head=gx.heads.Affine):
    """A module, values and a context."""

    def factory():
        net = conditioner()
        module = gx.transforms.AutoregressiveTransform(net, head(shape).double())
        return (
            module.inv if inverse else module,
            sized(rows, sites, *shape),
            context_of(net, rows, sites),
        )

    return factory


def spline(_):
    return gx.heads.RationalQuadraticSpline(3)


def torus():
    return built(gx.conditioners.Angles(MADE(2, 10, site=(2,), hidden=(12,), context=1, activation=torch.tanh)))


def bijections(head, inverse=False, sites=3):
    """An autoregressive transform with a head of bijections of numbers."""
    net = made(sites, head().num_params, hidden=(6,), activation=torch.tanh)
    return autoregressive(net, inverse, sites=sites, head=lambda _: built(head()))


class Chained(nn.Module):
    """A chain of a conditioned transform and others."""

    def __init__(self):
        super().__init__()
        net = MADE(3, 2, hidden=(8,), context=2, activation=torch.tanh)
        self.affine = gx.transforms.AutoregressiveTransform(net, gx.heads.Affine())
        self.onto = gx.Constant(gx.transforms.ToSupport(constraints.positive, 3))

    def forward(self, context):
        step = self.affine(context)
        return gx.transforms.Chain([step, gx.transforms.Reverse(), step.inv, self.onto()])


class OfPrefixes(nn.Module):
    """Transforms, or modules of such, of the first sites of each row."""

    def __init__(self, parts, lengths):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.context = next((part.context for part in parts if getattr(part, "context", 0)), 0)
        self.register_buffer("lengths", lengths)

    def forward(self, context=None):
        return gx.transforms.Prefixes([transform_of(part, context) for part in self.parts], self.lengths)


def prefixes():
    """Of full length, which the laws of determinants are about."""
    net = MADE(3, 2, hidden=(8,), context=2, activation=torch.tanh)
    affine = gx.transforms.AutoregressiveTransform(net, gx.heads.Affine())
    onto = gx.Constant(gx.transforms.ToSupport(constraints.positive, 3))
    module = OfPrefixes([affine, gx.transforms.Reverse(), affine.inv, onto], torch.tensor([3, 3, 3]))
    return built(module), sized(3, 3), sized(3, 2, seed=1)


def chain():
    return built(Chained()), sized(3, 3), sized(3, 2, seed=1)


def plain(make, *shape, **values):
    return lambda: (Built(make, **values).double(), sized(*shape), None)


def fixed(make, *shape, scale=1.0):
    return lambda: (make(), scale * sized(*shape), None)


def on_one_axis():
    affine = gx.transforms.Affine(sized(1, seed=2), 0.5 * sized(1, seed=3), 1)
    chain = gx.transforms.Chain([affine, gx.transforms.ToSupport(constraints.positive, 1)])
    return gx.Constant(gx.flows.UnivariateTransform(chain)).double()


def to_support(support, features, size=None):
    return fixed(lambda: gx.Constant(gx.transforms.ToSupport(support, features)).double(), 3, size or features)


def vectors(kind, *sizes, rows=3, context=0, inverse=False, shape=(), **options):
    """A module of vectors (rows, D), whose size comes first, and a context."""

    def factory():
        torch.manual_seed(0)
        module = built(kind(*sizes, context=context, activation=torch.tanh, **options))
        x = sized(rows, sizes[0], *shape)
        return module.inv if inverse else module, x, sized(rows, context, seed=1) if context else None

    return factory


def block(sites=3, context=0, inverse=False, **options):
    def factory():
        module = built(gx.transforms.BlockAutoregressive(sites, context=context, **{"hidden": (4, 3), **options}))
        x = sized(3, sites)
        return module.inv if inverse else module, x, sized(3, context, seed=1) if context else None

    return factory


def cubic(x, a):
    a = a[..., 0].exp()
    return x**3 + a * x, (3 * x**2 + a).log()


def of_cubics(a):
    return gx.transforms.Monotone(cubic, [a])


def knots(bound, slope):
    """Rows x, y and slope of five knots, for four values."""
    x, y, inner = [-bound, -1.5, 0.0, 1.0, bound], [-bound, -2.0, 0.5, 1.5, bound], [0.3, 2.0, 1.2]
    row = torch.tensor([x, y, [slope, *inner, slope]], dtype=torch.float64)
    return row + torch.tensor([[0], [0.1], [0.1]]) * sized(4, 1, 5).tanh() * torch.tensor([0, 1, 1, 1, 0])


MIXED = [constraints.real, constraints.positive, constraints.interval(-1.0, 2.0), constraints.less_than(3.0)]
TRANSFORMS = {
    "Autoregressive": autoregressive(CONDITIONERS["MADE tanh"]),
    "Autoregressive relu": autoregressive(made(4)),
    "Autoregressive direct": autoregressive(CONDITIONERS["MADE direct"]),
    "Autoregressive one site": autoregressive(CONDITIONERS["MADE one site, context"], sites=1),
    "Autoregressive linear": autoregressive(CONDITIONERS["MADE linear"]),
    "Autoregressive vectors": autoregressive(
        made(3, 4, site=(2,), context=1, activation=torch.sigmoid), shape=(2,), sites=3
    ),
    "Autoregressive generic": autoregressive(CONDITIONERS["RunningSum context"], shape=(2,), sites=3),
    "Autoregressive steps": autoregressive(CONDITIONERS["Recurrent lstm steps"], sites=3),
    "Autoregressive inverse": autoregressive(CONDITIONERS["MADE context"], inverse=True),
    "Autoregressive spline": autoregressive(made(3, 8, activation=torch.tanh), sites=3, head=spline),
    "Autoregressive spline inverse": autoregressive(
        made(3, 8, context=2, activation=torch.tanh), inverse=True, sites=3, head=spline
    ),
    "Autoregressive spline vectors": autoregressive(
        made(2, 16, site=(2,), activation=torch.tanh),
        shape=(2,),
        sites=2,
        head=lambda shape: gx.heads.RationalQuadraticSpline(3, shape=shape),
    ),
    "Autoregressive sum of squares": autoregressive(
        made(3, 7, activation=torch.tanh), sites=3, head=lambda _: gx.heads.SumOfSquares(2, 2)
    ),
    "Autoregressive Bernstein inverse": autoregressive(
        made(3, 6, activation=torch.tanh), inverse=True, sites=3, head=lambda _: gx.heads.Bernstein(5)
    ),
    "Autoregressive torus": autoregressive(torus, sites=2, head=lambda _: gx.heads.CircularSpline(3)),
    "Autoregressive torus inverse": autoregressive(
        torus, inverse=True, sites=2, head=lambda _: gx.heads.CircularSpline(3)
    ),
    "Autoregressive generic inverse": autoregressive(CONDITIONERS["RunningSum"], inverse=True),
    "Autoregressive DeepSigmoid": bijections(lambda: gx.heads.DeepSigmoid(3)),
    "Autoregressive DeepSigmoid layers": bijections(lambda: gx.heads.DeepSigmoid(2, layers=2)),
    "Autoregressive LogisticMixtureCDF": bijections(lambda: gx.heads.LogisticMixtureCDF(2)),
    "Autoregressive MonotoneNetwork": bijections(lambda: gx.heads.MonotoneNetwork(2, hidden=(4, 3))),
    "Autoregressive MonotoneNetwork inverse": bijections(lambda: gx.heads.MonotoneNetwork(2, hidden=(4, 3)), True),
    "Autoregressive IntegratedPositive": bijections(lambda: gx.heads.IntegratedPositive(2, hidden=(4,)), sites=2),
    "Block gated": block(context=2),
    "Block normal": block(residual="normal"),
    "Block leaky": block(residual=None),
    "Block leaky context inverse": block(residual=None, context=2, hidden=(3,), inverse=True),
    "Block one site": block(1, context=1, hidden=(3,)),
    "Block deep inverse": block(2, residual="normal", hidden=(2, 3, 2), inverse=True),
    "Coupling": vectors(gx.transforms.Coupling, 5, gx.heads.Affine(), hidden=(6,)),
    "Coupling mask": vectors(
        gx.transforms.Coupling, 4, gx.heads.Affine(), context=2, hidden=(6,), mask=torch.tensor([False, True] * 2)
    ),
    "Coupling one site": vectors(gx.transforms.Coupling, 1, gx.heads.Affine(), context=2, hidden=(6,)),
    "Coupling shift inverse": vectors(gx.transforms.Coupling, 4, gx.heads.Shift(), hidden=(6,), inverse=True),
    "Coupling vectors": vectors(
        gx.transforms.Coupling, 3, gx.heads.Affine((2,)), context=1, shape=(2,), mask=torch.tensor([True, False, True])
    ),
    "Coupling conditioner": vectors(
        gx.transforms.Coupling,
        3,
        gx.heads.Affine(),
        context=1,
        conditioner=lambda P, C: Recurrent((), P, context=C, hidden=5),
    ),
    "Planar": vectors(gx.transforms.Planar, 3),
    "Planar context inverse": vectors(gx.transforms.Planar, 4, context=2, hidden=(5,), inverse=True),
    "Planar one feature": vectors(gx.transforms.Planar, 1),
    "Radial": vectors(gx.transforms.Radial, 3),
    "Radial context inverse": vectors(gx.transforms.Radial, 4, context=2, hidden=(5,), inverse=True),
    "Sylvester": vectors(gx.transforms.Sylvester, 3, reflections=4),
    "Sylvester context inverse": vectors(
        gx.transforms.Sylvester, 4, rank=2, context=2, reflections=3, hidden=(5,), inverse=True
    ),
    "LULinear": lambda: (built(gx.transforms.LULinear(4)), sized(3, 4), None),
    "LULinear inverse": lambda: (gx.transforms.Inverse(built(gx.transforms.LULinear(3))), sized(3, 3), None),
    "Rotation": lambda: (built(gx.transforms.Rotation(4)), sized(3, 4), None),
    "Rotation inverse": lambda: (gx.transforms.Inverse(built(gx.transforms.Rotation(3))), sized(3, 3), None),
    "Householder": lambda: (built(gx.transforms.Householder(4, 3)), sized(3, 4), None),
    "Householder inverse": lambda: (gx.transforms.Inverse(built(gx.transforms.Householder(3))), sized(3, 3), None),
    "Chain": chain,
    "Prefixes": prefixes,
    "Patches": fixed(lambda: gx.transforms.Patches((2, 4, 2), 2), 3, 2, 4, 2),
    "Patches of one channel": fixed(lambda: gx.transforms.Patches((2, 3), 1), 3, 2, 3),
    "Permute": fixed(lambda: gx.transforms.Permute(torch.tensor([2, 0, 3, 1])), 3, 4),
    "Permute sites": fixed(lambda: gx.transforms.Permute(torch.tensor([2, 0, 1]), dim=-2), 2, 3, 2),
    "Reverse": fixed(gx.transforms.Reverse, 3, 4),
    "Reverse lengths": fixed(lambda: gx.transforms.Reverse(lengths=torch.tensor([4, 4, 4])), 3, 4),
    "Reverse sites": fixed(lambda: gx.transforms.Reverse(-2), 3, 2, 2),
    "Standardize": fixed(lambda: gx.transforms.Standardize.from_data(3 * sized(9, 4, seed=2) + 1), 3, 4),
    "Standardize images": fixed(lambda: gx.transforms.Standardize.from_data(3 * sized(9, 2, 2, seed=2) + 1), 3, 2, 2),
    "Inverse": fixed(
        lambda: gx.transforms.Inverse(gx.transforms.Standardize.from_data(3 * sized(9, 4, seed=2) + 1)), 3, 4
    ),
    "Affine": plain(
        partial(gx.transforms.Affine, event_dim=1), 3, 4, shift=sized(4, seed=2), log_scale=0.5 * sized(4, seed=3)
    ),
    "Monotone": plain(of_cubics, 3, 4, a=0.5 * sized(4, 1, seed=2)),
    "RationalQuadratic": plain(gx.transforms.RationalQuadratic, 3, 4, knots=knots(4.0, 1.0)),
    "CircularRationalQuadratic": plain(
        gx.transforms.CircularRationalQuadratic, 3, 4, knots=knots(torch.pi, 0.7), angle=2 * sized(4, seed=2) + 3
    ),
    "HalfLine": plain(gx.transforms.HalfLine, 5, bound=sized(seed=2)),
    "HalfLine below": plain(partial(gx.transforms.HalfLine, sign=-1), 5, bound=sized(seed=2)),
    "Interval": plain(gx.transforms.Interval, 5, low=sized(seed=2) - 2, high=sized(seed=3) + 2),
    "Simplex": fixed(gx.transforms.Simplex, 4, 2),
    "UnivariateTransform": fixed(on_one_axis, 5),
    "ToSupport real": to_support(constraints.real, 3),
    "ToSupport positive": to_support(constraints.positive, 3),
    "ToSupport interval": to_support(constraints.unit_interval, 3),
    "ToSupport simplex": to_support(constraints.simplex, 3, 2),
    "ToSupport list": to_support(MIXED, 4),
    "ToSupport images": fixed(
        lambda: gx.Constant(gx.transforms.ToSupport(constraints.unit_interval, (2, 1, 2))).double(), 3, 2, 1, 2
    ),
}
TRIANGULAR = [name for name in TRANSFORMS if name.startswith(("Autoregressive", "Block"))]
