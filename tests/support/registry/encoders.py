"""Encoders: of sets, whose order does not matter, of series and of vectors; and those of several sites."""

from __future__ import annotations

from functools import partial

from pyro_genexact.conditioners import CausalConv, StateSpace, Transformer
from pyro_genexact.encoders import DeepSet, Joint, Series, SetTransformer, Standardized, Vector
from support.values import built, sized


def fitted(encoder, *shape):
    """Far from the start, with a shift and a scale of simulations."""
    return built(encoder).standardize(0.3 + 1.7 * sized(20, *shape, encoder.inputs, seed=1))


SETS = {
    "DeepSet": lambda: fitted(DeepSet(2, 3, width=6), 4),
    "DeepSet one entry": lambda: fitted(DeepSet(1, 4, width=5), 4),
    "SetTransformer": lambda: fitted(SetTransformer(2, 3, width=6, num_heads=2, points=3, queries=2), 4),
    "SetTransformer pooling": lambda: fitted(SetTransformer(1, 3, width=6, num_heads=1, depth=0, queries=2), 4),
}
SERIES = {
    "Series": lambda: fitted(Series(2, 3, width=6), 4),
    "Series convolution": lambda: fitted(
        Series(2, 3, conditioner=partial(CausalConv, width=6, dilations=(1, 2, 4)), width=4), 4
    ),
    "Series state space": lambda: fitted(
        Series(2, 3, conditioner=partial(StateSpace, width=6, depth=1, state=4), width=4), 4
    ),
    "Series transformer": lambda: fitted(
        Series(1, 3, conditioner=partial(Transformer, width=8, depth=1, num_heads=2), width=4), 4
    ),
}
VECTORS = {
    "Standardized": lambda: fitted(Standardized(3)),
    "Vector": lambda: fitted(Vector(3, 4, width=6)),
}
ENCODERS = SETS | SERIES | VECTORS
JOINTS = {"Joint": lambda: Joint({"y": VECTORS["Vector"](), "x.z": SETS["DeepSet"]()})}
