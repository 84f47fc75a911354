"""A factory for every public class: built in float64, parameters re-drawn far from the identity. Every law runs on all."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact.conditioners import MADE, NADE, Independent, Markov, Recurrent, Transformer
from pyro_genexact.contexts import Source
from pyro_genexact.testing import redraw
from pyro_genexact.transforms.base import transform_of


class RunningSum(gx.Conditioner):
    """A conditioner of any length with nothing but ``start`` and ``extend``: a small net of sums of what it read."""

    class State(NamedTuple):
        position: int
        clock: list[int]
        total: Tensor
        context: Tensor | None

    def __init__(self, num_params, context=0, k=1):
        super().__init__()
        self.num_params, self.context, self.site = num_params, context, (k,) if k > 1 else ()
        self.read = nn.Linear(k, 6)
        self.write = nn.Linear(6 + context, num_params)

    def start(self, context, batch_size):
        total = self.read.weight.new_zeros(batch_size, 1, 6)
        return self._phi(total, context).squeeze(1), self.State(0, self.clock(), total, context)

    def extend(self, y, state):
        if len(y) != len(state.total):
            raise ValueError(f"Expected y.shape[0] == {len(state.total)} (rows of the state); got {tuple(y.shape)}.")
        features = torch.tanh(self.read(y if y.dim() == 3 else y.unsqueeze(-1)))
        total = state.total + features.cumsum(1)
        return self._phi(total, state.context), self.advance(state, y.shape[1])._replace(total=total[:, -1:])

    def _phi(self, total, context):
        parts = [total] if context is None else [total, context.unsqueeze(1).expand(-1, total.shape[1], -1)]
        return torch.sin(self.write(torch.cat(parts, -1)))


class Built(nn.Module):
    """A transform made of parameters, as a module."""

    def __init__(self, make, **values):
        super().__init__()
        self.make, self.values = make, nn.ParameterDict(values)

    def forward(self):
        return self.make(**self.values)


def sized(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(module):
    return redraw(module.double())


def made(sites, params=2, hidden=(12, 10), direct=False, **options):
    return lambda: built(MADE(sites, params, hidden=hidden, direct=direct, **options))


def factory(kind, *sizes, **options):
    return lambda: built(kind(*sizes, **options))


def transformer(site=(), params=2, width=8, num_heads=2, depth=2, **options):
    return factory(Transformer, site, params, width=width, num_heads=num_heads, depth=depth, **options)


NONE = torch.zeros(5, 5, dtype=torch.bool)
BAND = torch.ones(6, 6, dtype=torch.bool).tril(-1).triu(-2)

CONDITIONERS = {
    "MADE": made(5),
    "MADE context": made(4, context=3),
    "MADE band": made(6, hidden=(16,), adjacency=BAND),
    "MADE direct": made(4, direct=True, context=2),
    "MADE linear": made(4, hidden=()),
    "MADE narrow": made(6, hidden=(3, 4)),
    "MADE narrow direct": made(6, hidden=(2,), direct=True),
    "MADE one site": made(1),
    "MADE one site, context": made(1, context=3),
    "MADE two sites": made(2, context=1),
    "MADE vectors": made(4, 6, site=(3,)),
    "MADE categories": made(5, 3, site=3, context=2),
    "MADE mixed": made(4, 2, site=[(), 3, (), 2]),
    "MADE tanh": made(4, activation=torch.tanh, context=2),
    "MADE silu": made(4, activation=nn.functional.silu),
    "MADE module activation": made(4, activation=nn.ELU()),
    "MADE panels": made(35, hidden=(40,), context=1, activation=torch.tanh),
    "Recurrent gru": factory(Recurrent, (), 2, hidden=6),
    "Recurrent gru context": factory(Recurrent, (), 2, hidden=6, context=2),
    "Recurrent gru layers": factory(Recurrent, (3,), 6, hidden=5, layers=2),
    "Recurrent gru steps": factory(Recurrent, 3, 3, hidden=6, context=gx.Steps(2)),
    "Recurrent lstm": factory(Recurrent, (2,), 4, hidden=6, cell="lstm", layers=2, context=1),
    "Recurrent lstm steps": factory(Recurrent, (), 2, hidden=6, cell="lstm", context=gx.Steps(3)),
    "Recurrent elman": factory(Recurrent, 4, 4, hidden=6, cell="elman", width=3),
    "Recurrent gru source": factory(Recurrent, (), 2, hidden=6, context=Source(2)),
    "Recurrent lstm categories, source padded": factory(Recurrent, 3, 3, hidden=6, cell="lstm", context=Source(2)),
    "Transformer": transformer(),
    "Transformer context": transformer((2,), 4, context=3),
    "Transformer steps": transformer(context=gx.Steps(2), depth=1),
    "Transformer categories": transformer(3, 3),
    "Transformer source": transformer(context=Source(2)),
    "Transformer categories, source padded": transformer(3, 3, context=Source(2)),
    "Transformer window": transformer(window=2),
    "Transformer categories, window": transformer(4, 3, window=2, depth=1, max_len=6),
    "Independent": factory(Independent, 5, 2),
    "Independent context": factory(Independent, 4, 3, site=3, context=2, hidden=(6,)),
    "Independent steps": factory(Independent, 5, 2, context=gx.Steps(2), hidden=(6,), activation=torch.tanh),
    "Independent one site": factory(Independent, 1, 2, context=2, hidden=(6,)),
    "Markov": factory(Markov, (), 2, order=2, hidden=(8,), activation=torch.tanh),
    "Markov context": factory(Markov, 3, 3, order=2, hidden=(8,), context=2, activation=torch.tanh),
    "Markov steps": factory(Markov, (2,), 4, order=2, hidden=(8,), context=gx.Steps(2), activation=torch.tanh),
    "Markov order beyond": factory(Markov, (), 2, order=7, hidden=(8,), activation=torch.tanh, context=1),
    "NADE": factory(NADE, 5, 2, hidden=7),
    "NADE context": factory(NADE, 5, 2, hidden=7, context=3, activation=torch.tanh),
    "NADE vectors": factory(NADE, 4, 6, site=(3,), hidden=7, context=1),
    "NADE categories": factory(NADE, 5, 3, site=3, hidden=7, context=2),
    "NADE mixed": factory(NADE, 4, 2, site=[(), 3, (), 2], hidden=7),
    "NADE one site": factory(NADE, 1, 2, context=2, hidden=7),
    "NADE two sites": factory(NADE, 2, 2, hidden=7),
    "Angles": lambda: built(gx.conditioners.Angles(MADE(4, 2, site=(2,), hidden=(12, 10), context=2))),
    "RunningSum": lambda: built(RunningSum(2)),
    "RunningSum context": lambda: built(RunningSum(4, context=2, k=2)),
}
READS = {
    "MADE band": BAND,
    "Independent": NONE,
    "Independent context": NONE[:4, :4],
    "Independent steps": NONE,
    "Markov": BAND[:5, :5],
    "Markov context": BAND[:5, :5],
    "Markov steps": BAND[:5, :5],
    "Transformer window": torch.ones(5, 5, dtype=torch.bool).tril(-1).triu(-3),  # depth * (window - 1) + 1 sites
    "Transformer categories, window": BAND[:5, :5],
}
MUST_READ = {  # narrow hidden layers reach fewer sites
    "MADE narrow": torch.zeros(6, 6, dtype=torch.bool),
}

HEADS = {
    "Affine": lambda: built(gx.heads.Affine()),
    "Affine tight": lambda: built(gx.heads.Affine(bound=1.0)),
    "Affine vectors": lambda: built(gx.heads.Affine((3,))),
    "RationalQuadraticSpline": lambda: built(gx.heads.RationalQuadraticSpline(3)),
    "RationalQuadraticSpline two bins": lambda: built(gx.heads.RationalQuadraticSpline(2, bound=3.0)),
    "CircularSpline": lambda: gx.heads.CircularSpline(3),
    "SumOfSquares": lambda: built(gx.heads.SumOfSquares()),
    "SumOfSquares one polynomial": lambda: built(gx.heads.SumOfSquares(1, 3, bound=3.0)),
    "SumOfSquares degree 0": lambda: built(gx.heads.SumOfSquares(degree=0)),
    "Bernstein": lambda: built(gx.heads.Bernstein()),
    "Bernstein degree 1": lambda: built(gx.heads.Bernstein(1, bound=3.0)),
    "Shift": gx.heads.Shift,
    "Shift vectors": lambda: gx.heads.Shift((3,)),
    "DeepSigmoid": lambda: built(gx.heads.DeepSigmoid(4)),
    "DeepSigmoid layers": lambda: built(gx.heads.DeepSigmoid(3, layers=2)),
    "LogisticMixtureCDF": lambda: built(gx.heads.LogisticMixtureCDF(3)),
    "MonotoneNetwork": lambda: built(gx.heads.MonotoneNetwork(3, hidden=(6, 5))),
    "IntegratedPositive": lambda: built(gx.heads.IntegratedPositive(3, hidden=(6, 5))),
}


def per_site():
    return gx.heads.PerSite([gx.heads.Bernoulli(), gx.heads.Normal(), gx.heads.Gamma(), gx.heads.Bernoulli()])


def nested():
    """A NADE as the conditional of a site of three binary numbers."""
    net = gx.conditioners.NADE(3, 1, context=4, hidden=5)
    return gx.heads.ConditionalHead(gx.Autoregressive(net, gx.heads.Bernoulli(), (3,)))


def flow_head():
    return gx.heads.ConditionalHead(gx.flows.maf(2, context=3, transforms=1, hidden=(6,), activation=torch.tanh))


h = gx.heads
DISTRIBUTION_HEADS = {
    "Bernoulli": h.Bernoulli,
    "Categorical": lambda: h.Categorical(3),
    "Binomial": lambda: h.Binomial(4),
    "Poisson": h.Poisson,
    "NegativeBinomial": h.NegativeBinomial,
    "Normal": h.Normal,
    "Normal vectors": lambda: h.Normal(shape=(2,)),
    "StudentT": h.StudentT,
    "Gamma": h.Gamma,
    "Stable": lambda: h.Parametric(dist.Stable),
    "Beta": h.Beta,
    "VonMises": h.VonMises,
    "MultivariateNormal": lambda: h.MultivariateNormal(2),
    "Dirichlet": lambda: h.Dirichlet(3),
    "OneHotCategorical": lambda: h.OneHotCategorical(3),
    "Mixture": lambda: h.Mixture(h.Normal(), 2),
    "Mixture of heads": lambda: h.Mixture([h.Normal(), h.Laplace()]),
    "Mixture of supports": lambda: h.Mixture([h.Gamma(), h.Beta()]),
    "Mixture of vectors": lambda: h.Mixture(h.MultivariateNormal(2), 2),
    "DiscretizedLogistic": lambda: h.DiscretizedLogistic(5, 2),
    "ContinuousCategorical": lambda: h.ContinuousCategorical(3),
    "PerSite": per_site,
    "ConditionalHead": nested,
    "ConditionalHead flow": flow_head,
    "Tempered": lambda: h.Tempered(h.Categorical(3), 0.7),
    "TopK": lambda: h.TopK(h.Categorical(3), 2),
    "TopP": lambda: h.TopP(h.Tempered(h.Categorical(3), 0.7), 0.9),
    "MinP": lambda: h.MinP(h.Categorical(3), 0.3),
    "Forbid": lambda: h.Forbid(h.Mixture(h.Categorical(3), 2), [1]),
    "MinLength": lambda: h.MinLength(h.Categorical(3), 2, eos=0),
    "Stopped": lambda: h.Stopped(h.Normal()),
    "Stopped angles": lambda: h.Stopped(h.VonMises()),
    "Stopped vectors": lambda: h.Stopped(h.MultivariateNormal(2)),
    "Stopped categories": lambda: h.Stopped(h.Categorical(3)),
}
PAIRED = {  # a conditioner of any kind for a head, over four sites
    "MADE": lambda site, P: MADE(4, P, site=site, hidden=(12,), activation=torch.tanh),
    "NADE": lambda site, P: gx.conditioners.NADE(4, P, site=site, hidden=8),
    "Recurrent": lambda site, P: gx.conditioners.Recurrent(site, P, hidden=8),
    "Markov": lambda site, P: gx.conditioners.Markov(site, P, order=2, hidden=(8,), activation=torch.tanh),
    "Independent": lambda site, P: gx.conditioners.Independent(4, P, site=site),
}


def paired(head, net):
    """An autoregressive model of four sites."""
    head = DISTRIBUTION_HEADS[head]()
    site = 3 if getattr(head.support, "upper_bound", None) == 2 else head.site_shape
    return built(gx.Autoregressive(PAIRED[net](site, head.num_params), head, (4, *head.site_shape)))


def context_of(net, rows, sites):
    if isinstance(net.context, gx.Steps):
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
    return gx.Constant(gx.flows.OnOneAxis(chain)).double()


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
    "Permute": fixed(lambda: gx.transforms.Permute(torch.tensor([2, 0, 3, 1])), 3, 4),
    "Permute sites": fixed(lambda: gx.transforms.Permute(torch.tensor([2, 0, 1]), dim=-2), 2, 3, 2),
    "Reverse": fixed(gx.transforms.Reverse, 3, 4),
    "Reverse lengths": fixed(lambda: gx.transforms.Reverse(lengths=torch.tensor([4, 4, 4])), 3, 4),
    "Reverse sites": fixed(lambda: gx.transforms.Reverse(-2), 3, 2, 2),
    "Standardize": fixed(lambda: gx.transforms.Standardize.from_data(3 * sized(9, 4, seed=2) + 1), 3, 4),
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
    "OnOneAxis": fixed(on_one_axis, 5),
    "ToSupport real": to_support(constraints.real, 3),
    "ToSupport positive": to_support(constraints.positive, 3),
    "ToSupport interval": to_support(constraints.unit_interval, 3),
    "ToSupport simplex": to_support(constraints.simplex, 3, 2),
    "ToSupport list": to_support(MIXED, 4),
}
TRIANGULAR = [name for name in TRANSFORMS if name.startswith(("Autoregressive", "Block"))]


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


def univariate(recipe, context=0, **options):
    return mild(
        lambda features, context, **options: gx.flows.univariate(recipe, context, **options), 1, context, **options
    )


def over_multivariate_normal():
    base = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    return built(gx.flows.maf(2, base=base, hidden=(8,), transforms=1)), None


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


def conditional(head):
    def factory():
        it = head()
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, it.num_params))
        return built(gx.Conditional(net, it)), sized(3, 3, seed=1)

    return factory


def steps():
    net = gx.conditioners.Recurrent((), 2, hidden=5, context=gx.Steps(2))
    return built(gx.Autoregressive(net, h.Laplace(), (2,))), sized(3, 2, 2, seed=1)


def of_potentials(unary, transition, lengths=None, forbidden=(), **ends):
    """A CRF, in which some steps are forbidden, and label 0 at both ends."""
    if forbidden:
        transition = transition.index_put(tuple(torch.tensor(forbidden, device=unary.device).T), unary.new_tensor(-inf))
        ends = {name: p.index_fill(-1, unary.new_zeros(1, dtype=torch.long), -inf) for name, p in ends.items()}
    lengths = None if lengths is None else unary.new_tensor(lengths, dtype=torch.long)
    return gx.LinearChainCRF(unary, transition, lengths=lengths, **ends)


def labels(unary, transition, initial=None, final=None, **options):
    """A CRF of potentials of these shapes."""
    shapes = {"unary": unary, "transition": transition, "initial": initial, "final": final}

    def factory():
        values = {name: 1.5 * sized(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items()) if shape}
        return Built(partial(of_potentials, **options), **values).double(), None

    return factory


def of_states(initial, transition, phi, observed, sites, lengths=None):
    """A hidden Markov model whose observations a head makes of phi (*batch, N or 1, V, P)."""
    lengths = None if lengths is None else initial.new_tensor(lengths, dtype=torch.long)
    return gx.HiddenMarkov(initial, transition, observed(phi), lengths, duration=sites)


def hidden(observed, sites, batch=(), steps=None, **options):
    """A hidden Markov model of two states; observations differ by site where steps do."""

    def factory():
        head, own = observed(), (1 if steps is None else sites)
        initial, phi = sized(*batch, 2), sized(*batch, own, 2, head.num_params, seed=2)
        transition = 1.5 * sized(*((2, 2) if steps is None else (*batch, steps, 2, 2)), seed=1)
        make = partial(of_states, observed=head, sites=sites, **options)
        return Built(make, initial=initial, transition=transition, phi=phi).double(), None

    return factory


def tagger(context, **options):
    """A learnable CRF over three sites with two features each."""
    return lambda: (built(gx.CRF(3, context(), **options)), sized(2, 3, 2, seed=1))


def reader():
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))


def small_transformer(num_params, site=3, **options):
    return gx.conditioners.Transformer(site, num_params, width=8, depth=1, num_heads=2, **options)


def strings(net, head=lambda: h.Categorical(3), eos=0, max_len=6, context=None):
    """A model of strings, and a context of the shape (*batch, ...)."""

    def factory():
        it = head()
        module = gx.Sequence(net(it.num_params), it, eos, max_len)
        return built(module), None if context is None else sized(*context, seed=1)

    return factory


inf = float("inf")
f = gx.flows
maf, iaf = f.maf, f.iaf
DISTRIBUTIONS = {
    "Autoregressive binary": chained(h.Bernoulli, 4, context=2),
    "Autoregressive image": chained(h.Bernoulli, 6, order=[3, 1, 0, 2, 5, 4], event_shape=(2, 3)),
    "Autoregressive categories": chained(
        lambda: h.Categorical(3), 4, lambda P: gx.conditioners.NADE(4, P, site=3, hidden=6)
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
    "Autoregressive mixture": chained(lambda: h.Mixture(h.Normal(), 2)),
    "Autoregressive columns": chained(lambda: h.PerSite([h.LogNormal(), h.Normal()]), order=[1, 0]),
    "Autoregressive flow": chained(flow_head, 1),
    "OrderEnsemble": over_orders,
    "Conditional": conditional(lambda: h.MultivariateNormal(2)),
    "Conditional positive": conditional(h.LogNormal),
    "Conditional interval": conditional(lambda: h.Parametric(dist.Kumaraswamy)),
    "Conditional discrete": conditional(lambda: h.Categorical(3)),
    "Conditional nested": conditional(nested),
    "Conditional twice": conditional(lambda: h.ConditionalHead(gx.Conditional(nn.Linear(4, 1), h.Bernoulli()))),
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
    "univariate nsf": univariate(f.nsf, 2, bins=3, support=constraints.positive),
    "univariate naf": univariate(f.naf, 1, units=3, support=constraints.less_than(1.0)),
    "univariate iaf": univariate(f.iaf, 2),
    "Flow": directly,
    "Flow generic": generic,
    "LinearChainCRF": labels((3, 4, 3), (3, 3)),
    "LinearChainCRF ends": labels((5, 2), (2, 2), (2,), (2,)),
    "LinearChainCRF steps": labels((2, 4, 3), (2, 3, 3, 3), (3,), (2, 3)),
    "LinearChainCRF one site": labels((3, 1, 3), (3, 3), (3,), (3,)),
    "LinearChainCRF lengths": labels((2, 4, 3), (3, 3, 3), (3,), (3,), lengths=[3, 3]),
    "LinearChainCRF ragged": labels((4, 4, 3), (4, 1, 3, 3), (3,), (3,), lengths=[4, 2, 0, 1]),
    "LinearChainCRF zeros": labels((3, 4, 3), (3, 3), (3,), (3,), forbidden=[(0, 1), (2, 2)]),
    "HiddenMarkov": hidden(h.Normal, 2),
    "HiddenMarkov categories": hidden(lambda: h.Categorical(3), 4, (3,), 3),
    "HiddenMarkov positive": hidden(h.LogNormal, 2, (2,), 1),
    "HiddenMarkov vectors": hidden(lambda: h.MultivariateNormal(2), 1, (2,)),
    "HiddenMarkov ragged": hidden(h.Bernoulli, 4, (4,), 3, lengths=[4, 2, 0, 1]),
    "CRF": tagger(lambda: 2),
    "CRF module": tagger(
        reader,
        allowed=torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 0]]).bool(),
        allowed_initial=torch.tensor([True, False, True]),
        allowed_final=torch.tensor([True, True, False]),
    ),
    "Sequence made": strings(lambda P: MADE(6, P, site=3, hidden=(8,), activation=torch.tanh)),
    "Sequence nade": strings(lambda P: NADE(6, P, site=3, hidden=6, context=2), context=(2, 2)),
    "Sequence recurrent": strings(lambda P: Recurrent(3, P, hidden=5, context=2), eos=2, context=(2, 2)),
    "Sequence steps": strings(lambda P: Recurrent(3, P, hidden=5, context=gx.Steps(2)), context=(2, 6, 2)),
    "Sequence markov": strings(lambda P: Markov(3, P, order=2, hidden=(6,), activation=torch.tanh), eos=1),
    "Sequence independent": strings(lambda P: Independent(6, P, site=3)),
    "Sequence transformer": strings(small_transformer),
    "Sequence source": strings(partial(small_transformer, context=gx.Source(2)), context=(2, 3, 2)),
    "Sequence binary": strings(lambda P: Markov((), P, order=1, hidden=(6,), activation=torch.tanh), h.Bernoulli, 1),
    "Sequence filtered": strings(
        lambda P: Recurrent(3, P, hidden=5), lambda: h.TopK(h.MinLength(h.Tempered(h.Categorical(3), 0.7), 1, eos=0), 2)
    ),
    "Sequence stopped": strings(lambda P: Recurrent((2,), P, hidden=6), lambda: h.Stopped(h.Bernoulli()), None, 4),
}
FILTERED = {  # every filter, over other conditioners
    "Sequence Tempered": strings(small_transformer, lambda: h.Tempered(h.Categorical(3), 1.5)),
    "Sequence TopK": strings(lambda P: Markov(3, P, order=2, hidden=(6,)), lambda: h.TopK(h.Categorical(3), 2), 1),
    "Sequence TopP": strings(
        lambda P: Recurrent(3, P, hidden=5, context=2), lambda: h.TopP(h.Categorical(3), 0.8), context=(2, 2)
    ),
    "Sequence MinP": strings(lambda P: NADE(6, P, site=3, hidden=6), lambda: h.MinP(h.Categorical(3), 0.5)),
    "Sequence Forbid": strings(lambda P: Recurrent(3, P, hidden=5), lambda: h.Forbid(h.Categorical(3), [1])),
    "Sequence MinLength": strings(
        lambda P: MADE(6, P, site=3, hidden=(8,)), lambda: h.MinLength(h.Categorical(3), 2, eos=2), 2
    ),
}
SEQUENCES = [name for name in DISTRIBUTIONS if name.startswith("Sequence")]
CHAINS = [name for name in DISTRIBUTIONS if "CRF" in name]
OUTSIDE = {  # values outside the support
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
    "HiddenMarkov categories": [[0.0, 3.0, 1.0, 1.0], [0.0, 0.5, 1.0, 1.0], [-1.0, 0.0, 1.0, 1.0]],
    "HiddenMarkov positive": [[1.0, -1.0], [0.0, -1.0]],
    "Sequence made": [[1.0, 0.0, 2.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 0.0, 0.0, 0.0], [-1.0, 0.5, 0.0, 0.0, 0.0, 0.0]],
    "Sequence recurrent": [[0.0, 1.0, 2.0, 2.0, 2.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0, 3.0]],
    "Sequence binary": [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0, 1.0, 1.0]],
    "Sequence stopped": [
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]],
        [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]],
        [[1.0, 0.0], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]],
    ],
    "LinearChainCRF": [[0.0, 3.0, 1.0, 1.0], [0.0, 0.5, 1.0, 1.0], [-1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, -100.0]],
    "LinearChainCRF lengths": [[0.0, 0.0, 3.0, 0.0], [0.0, 0.0, -100.0, 0.0], [0.5, 0.0, 0.0, -100.0]],
    "CRF": [[0.0, 1.0, 3.0], [-1.0, 0.0, 0.0]],
}
INERT = {
    name: ["*conditioner.layers.0.weight"]
    for name in DISTRIBUTIONS
    if "one feature" in name or "univariate" in name or name == "maf interval"
}


REAL_SITES = [  # of conditioners that a transform takes
    name
    for name in CONDITIONERS
    if not any(word in name for word in ("categories", "mixed"))
    and name not in ("Recurrent elman", "Recurrent gru steps", "Markov context", "Independent context")
]
INERT |= {  # nothing precedes the only site
    name: ["*conditioner.layers.0.weight"]
    for name in ("Autoregressive vectors", "Autoregressive simplex", "Autoregressive flow")
}
INERT["LinearChainCRF one site"] = ["*transition"]
INERT["HiddenMarkov vectors"] = ["*transition"]
LARGE = ("maf four features", "maf list of four", "iaf context")  # for quadrature
# supports that are infinite, or differ by row
UNLISTED = ("Autoregressive counts", "HiddenMarkov ragged", "LinearChainCRF ragged")


def move(value: Any, device: str) -> Any:
    """Modules, transforms and tensors of a factory on a device."""
    if isinstance(value, tuple):
        return tuple(move(part, device) for part in value)
    if isinstance(value, (nn.Module, Tensor)):
        return value.to(device)
    return value if value is None else gx.Constant(value).to(device)()
