"""Chains of labels with sums over all their label strings, for the tests of Pyro's inference."""

from __future__ import annotations

import math

import pyro
import torch

import pyro_genexact as gx
from support.values import built, sized

ROWS, N, V, C = 6, 4, 3, 2
STRINGS = torch.cartesian_prod(*[torch.arange(V)] * N)  # (V^N, N)


def score_by_hand(parts, y, lengths=None):
    """The score of labels y (*, R, N): (*, R), site by site."""
    unary, transition, initial, final = parts
    rows = torch.arange(len(unary))
    lengths = torch.full((len(unary),), N) if lengths is None else lengths
    total = torch.zeros(torch.broadcast_shapes(y.shape[:-1], (len(unary),)), dtype=unary.dtype)
    for t in range(N):
        here, label = lengths > t, torch.where(lengths > t, y[..., t], 0)
        step = initial[label] if t == 0 else transition[before, label]  # noqa: F821
        total = total + torch.where(here, unary[rows, t, label] + step, 0.0)
        total = total + torch.where(lengths == t + 1, final[label], 0.0)
        before = label  # noqa: F841
    return total


def log_prob_by_hand(parts, y, lengths=None):
    """log p(y), (*, R); log Z is a sum over all V^N strings, of which V^(N - length) are one."""
    pad = 0 if lengths is None else (N - lengths).double() * math.log(V)
    return score_by_hand(parts, y, lengths) - score_by_hand(parts, STRINGS[:, None], lengths).logsumexp(0) + pad


def crf_of(parts, lengths=None, **options):
    return gx.LinearChainCRF(*parts[:2], initial=parts[2], final=parts[3], lengths=lengths, **options)


def gradients(loss, parts):
    return torch.autograd.grad(loss, parts, materialize_grads=True)


def as_often(draws, p):
    """Draws (K, R, N) are the strings as often as their masses (V^N, R) say: within 5 standard errors and 3 draws."""
    index = (draws * V ** torch.arange(N - 1, -1, -1)).sum(-1)
    found = torch.stack([one.bincount(minlength=len(p)) for one in index.T], 1)
    assert ((found - len(draws) * p).abs() < 5 * (len(draws) * p * (1 - p)).sqrt() + 3).all() and (
        found[p == 0] == 0
    ).all()


LENGTHS = torch.tensor([4, 2, 0, 3, 1, 4])
X = sized(ROWS, N, C, seed=1)


def potentials(rows=ROWS, seed=2, scale=1.0):
    """unary (rows, N, V), transition (V, V), initial (V), final (V), as leaves."""
    shapes = ((rows, N, V), (V, V), (V,), (V,))
    return [(scale * sized(*shape, seed=seed + i)).requires_grad_() for i, shape in enumerate(shapes)]


def labels(rows=ROWS, seed=3, lengths=LENGTHS):
    """Labels (rows, N), -100 in padding."""
    y = torch.randint(V, (rows, N), generator=torch.Generator().manual_seed(seed))
    return y if lengths is None else y.masked_fill(torch.arange(N) >= lengths[:, None], -100)


TAGS = labels()


def tagger(parts, y=TAGS, lengths=LENGTHS):
    def model():
        with pyro.plate("data", ROWS):
            return pyro.sample("tags", crf_of(parts, lengths), obs=y)

    return model


def module(**options):
    """A CRF module in float64 with parameters far from zero."""
    return built(gx.CRF(V, context=C, **options))


def parts_of(net, w, x=X):
    """What the module's potentials are, by plain tensor operations with weights ``w``."""
    return x @ w["emissions.weight"].T + w["emissions.bias"], w["transition"], w["initial"], w["final"]
