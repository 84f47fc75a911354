"""Flows and conditioners over sequences of varying length."""

from __future__ import annotations

import torch

import pyro_genexact as gx
from pyro_genexact import conditioners
from support.values import sized

T = 5
LENGTHS = torch.tensor([3, 0, 5, 1, 4, 2])
MASK = torch.arange(T) < LENGTHS.unsqueeze(1)


def recurrent(P, C):
    return conditioners.Recurrent((), P, context=C, hidden=6)


def markov(P, C):
    return conditioners.Markov((), P, order=2, hidden=(8,), context=C, activation=torch.tanh)


def context_of(flow, rows=6):
    context = flow.context
    if isinstance(context, (gx.Covariates, gx.Source)):
        return sized(rows, T, context.features, seed=1)
    return sized(rows, context, seed=1) if context else None


def transformer(P, C):
    return conditioners.Transformer((), P, context=C, width=8, depth=2, num_heads=2)
