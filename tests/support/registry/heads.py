"""Heads of bijections and of distributions, and models of four sites with each of the latter."""

from __future__ import annotations

import pyro.distributions as dist
import torch

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact.conditioners import MADE
from support.values import built

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
    "Geometric": h.Geometric,
    "ZeroInflatedPoisson": h.ZeroInflatedPoisson,
    "Exponential": h.Exponential,
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
    "BetaGaussian": h.BetaGaussian,
    "BetaGaussian vectors": lambda: h.BetaGaussian((2,), alpha=1.5),
    "MultivariateBetaGaussian": lambda: h.MultivariateBetaGaussian(2, alpha=1.5),
    "EntmaxCategorical": lambda: h.EntmaxCategorical(3),
    "EntmaxCategorical searched": lambda: h.EntmaxCategorical(3, alpha=1.3),
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
