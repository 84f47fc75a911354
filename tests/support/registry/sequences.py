"""Models of strings of random length: each a factory of a module and a context or None."""

from __future__ import annotations

from functools import partial

import torch

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact.conditioners import MADE, NADE, Independent, Markov, Recurrent
from support.registry.conditioners import small_transformer
from support.values import built, sized


def strings(net, head=lambda: h.Categorical(3), eos=0, max_len=6, context=None):
    """A model of strings, and a context of the shape (*batch, ...)."""

    def factory():
        it = head()
        module = gx.Sequence(net(it.num_params), it, eos, max_len)
        return built(module), None if context is None else sized(*context, seed=1)

    return factory


DISTRIBUTIONS = {
    "Sequence made": strings(lambda P: MADE(6, P, site=3, hidden=(8,), activation=torch.tanh)),
    "Sequence nade": strings(lambda P: NADE(6, P, site=3, hidden=6, context=2), context=(2, 2)),
    "Sequence recurrent": strings(lambda P: Recurrent(3, P, hidden=5, context=2), eos=2, context=(2, 2)),
    "Sequence steps": strings(lambda P: Recurrent(3, P, hidden=5, context=gx.Covariates(2)), context=(2, 6, 2)),
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
OUTSIDE = {  # values outside the support
    "Sequence made": [[1.0, 0.0, 2.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 0.0, 0.0, 0.0], [-1.0, 0.5, 0.0, 0.0, 0.0, 0.0]],
    "Sequence recurrent": [[0.0, 1.0, 2.0, 2.0, 2.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0, 3.0]],
    "Sequence binary": [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0, 1.0, 1.0]],
    "Sequence stopped": [
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]],
        [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]],
        [[1.0, 0.0], [0.0, 0.5], [0.0, 0.0], [0.0, 0.0]],
    ],
}
