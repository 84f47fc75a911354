"""CRFs and hidden Markov models: each a factory of a module and a context or None."""

from __future__ import annotations

from functools import partial
from math import inf

import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact import heads as h
from support.values import Built, built, sized


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


DISTRIBUTIONS = {
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
}
OUTSIDE = {  # values outside the support
    "HiddenMarkov categories": [[0.0, 3.0, 1.0, 1.0], [0.0, 0.5, 1.0, 1.0], [-1.0, 0.0, 1.0, 1.0]],
    "HiddenMarkov positive": [[1.0, -1.0], [0.0, -1.0]],
    "LinearChainCRF": [[0.0, 3.0, 1.0, 1.0], [0.0, 0.5, 1.0, 1.0], [-1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, -100.0]],
    "LinearChainCRF lengths": [[0.0, 0.0, 3.0, 0.0], [0.0, 0.0, -100.0, 0.0], [0.5, 0.0, 0.0, -100.0]],
    "CRF": [[0.0, 1.0, 3.0], [-1.0, 0.0, 0.0]],
}
INERT = {"LinearChainCRF one site": ["*transition"], "HiddenMarkov vectors": ["*transition"]}
