"""Conditioners, and which earlier sites each may read."""

from __future__ import annotations

import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact.conditioners import (
    MADE,
    NADE,
    CausalConv,
    Independent,
    Markov,
    PixelCNN,
    Recurrent,
    StateSpace,
    Transformer,
)
from pyro_genexact.conditioners.guided import GuidedConditioner
from pyro_genexact.contexts import Source
from support.small_conditioners import RunningSum
from support.values import built


def made(sites, params=2, hidden=(12, 10), direct=False, **options):
    return lambda: built(MADE(sites, params, hidden=hidden, direct=direct, **options))


def factory(network, *sizes, **options):
    return lambda: built(network(*sizes, **options))


def transformer(site=(), params=2, width=8, num_heads=2, depth=2, **options):
    return factory(Transformer, site, params, width=width, num_heads=num_heads, depth=depth, **options)


def small_transformer(num_params, site=3, **options):
    return gx.conditioners.Transformer(site, num_params, width=8, depth=1, num_heads=2, **options)


def pixelcnn(shape, params=2, **options):
    sizes = {"width": 5, "depth": 2, "first_kernel": 5}
    return factory(PixelCNN, shape, params, **(sizes | options))


NONE = torch.zeros(5, 5, dtype=torch.bool)
BAND = torch.ones(6, 6, dtype=torch.bool).tril(-1).triu(-2)
BAND_3 = torch.ones(5, 5, dtype=torch.bool).tril(-1).triu(-3)

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
    "Recurrent gru steps": factory(Recurrent, 3, 3, hidden=6, context=gx.Covariates(2)),
    "Recurrent lstm": factory(Recurrent, (2,), 4, hidden=6, cell="lstm", layers=2, context=1),
    "Recurrent lstm steps": factory(Recurrent, (), 2, hidden=6, cell="lstm", context=gx.Covariates(3)),
    "Recurrent elman": factory(Recurrent, 4, 4, hidden=6, cell="elman", width=3),
    "Recurrent gru source": factory(Recurrent, (), 2, hidden=6, context=Source(2)),
    "Recurrent lstm categories, source padded": factory(Recurrent, 3, 3, hidden=6, cell="lstm", context=Source(2)),
    "Transformer": transformer(),
    "Transformer context": transformer((2,), 4, context=3),
    "Transformer steps": transformer(context=gx.Covariates(2), depth=1),
    "Transformer categories": transformer(3, 3),
    "Transformer source": transformer(context=Source(2)),
    "Transformer categories, source padded": transformer(3, 3, context=Source(2)),
    "Transformer window": transformer(window=2),
    "Transformer categories, window": transformer(4, 3, window=2, depth=1, max_len=6),
    "Transformer grid": transformer((2,), 4, grid=(2, 3)),
    "Transformer categories, grid, context": transformer(3, 3, grid=(3, 2), depth=1, context=2),
    "CausalConv": factory(CausalConv, (), 2, width=6, dilations=(1, 1)),
    "CausalConv context": factory(CausalConv, (2,), 4, width=6, kernel=3, dilations=(1, 2), context=2),
    "CausalConv steps": factory(CausalConv, (), 2, width=6, kernel=3, dilations=(2, 1), context=gx.Covariates(2)),
    "CausalConv categories, source padded": factory(CausalConv, 3, 3, width=6, dilations=(2, 1), context=Source(2)),
    "StateSpace diagonal": factory(StateSpace, (), 2, width=6, depth=2, state=6),
    "StateSpace diagonal context": factory(StateSpace, (2,), 4, width=6, depth=1, state=5, context=2),
    "StateSpace diagonal categories, source padded": factory(
        StateSpace, 3, 3, width=6, depth=1, state=4, frequencies="inverse", context=Source(2)
    ),
    "StateSpace selective": factory(StateSpace, (), 2, kind="selective", width=6, depth=2, state=3),
    "StateSpace selective steps": factory(
        StateSpace, (2,), 4, kind="selective", width=32, depth=1, state=2, context=gx.Covariates(2)
    ),
    "StateSpace selective categories, source padded": factory(
        StateSpace, 3, 3, kind="selective", width=6, depth=1, state=3, context=Source(2)
    ),
    "PixelCNN": pixelcnn((1, 3, 3), context=2),
    "PixelCNN channels": pixelcnn((2, 2, 3), 4, site=(2,)),
    "PixelCNN categories, channels, context": pixelcnn((3, 2, 2), 4, site=4, kernel=5, depth=1, context=2),
    "PixelCNN source": pixelcnn((1, 2, 4), kernel=1, first_kernel=7, depth=1, context=Source(2)),
    "PixelCNN categories, source padded": pixelcnn((2, 2, 2), 3, site=3, depth=1, context=Source(2)),
    "Independent": factory(Independent, 5, 2),
    "Independent context": factory(Independent, 4, 3, site=3, context=2, hidden=(6,)),
    "Independent steps": factory(Independent, 5, 2, context=gx.Covariates(2), hidden=(6,), activation=torch.tanh),
    "Independent one site": factory(Independent, 1, 2, context=2, hidden=(6,)),
    "Markov": factory(Markov, (), 2, order=2, hidden=(8,), activation=torch.tanh),
    "Markov context": factory(Markov, 3, 3, order=2, hidden=(8,), context=2, activation=torch.tanh),
    "Markov steps": factory(Markov, (2,), 4, order=2, hidden=(8,), context=gx.Covariates(2), activation=torch.tanh),
    "Markov order beyond": factory(Markov, (), 2, order=7, hidden=(8,), activation=torch.tanh, context=1),
    "NADE": factory(NADE, 5, 2, hidden=7),
    "NADE context": factory(NADE, 5, 2, hidden=7, context=3, activation=torch.tanh),
    "NADE vectors": factory(NADE, 4, 6, site=(3,), hidden=7, context=1),
    "NADE categories": factory(NADE, 5, 3, site=3, hidden=7, context=2),
    "NADE mixed": factory(NADE, 4, 2, site=[(), 3, (), 2], hidden=7),
    "NADE one site": factory(NADE, 1, 2, context=2, hidden=7),
    "NADE two sites": factory(NADE, 2, 2, hidden=7),
    "Angles": lambda: built(gx.conditioners.Angles(MADE(4, 2, site=(2,), hidden=(12, 10), context=2))),
    "Guided MADE": lambda: built(GuidedConditioner(MADE(4, 2, hidden=(12, 10), context=2), 0.7)),
    "Guided Transformer": lambda: built(GuidedConditioner(transformer((2,), 4, context=3, grid=(2, 3))(), -0.4)),
    "RunningSum": lambda: built(RunningSum(2)),
    "RunningSum context": lambda: built(RunningSum(4, context=2, k=2)),
}
READS = {
    "MADE band": BAND,
    "CausalConv": BAND_3,
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
REAL_SITES = [  # of conditioners that a transform takes
    name
    for name in CONDITIONERS
    if not any(word in name for word in ("categories", "mixed"))
    and name not in ("Recurrent elman", "Recurrent gru steps", "Markov context", "Independent context")
]
