"""Zuko's flows in a small size, and ours of them."""

from __future__ import annotations

import torch
from torch import nn

import pyro_genexact as gx
from support.values import F64
from support.with_zuko import zuko

F = zuko.flows
SMALL = {"transforms": 2, "hidden_features": (6,), "activation": nn.Tanh}
FLOWS = {
    "MAF": lambda D, C: F.MAF(D, C, **SMALL),
    "NSF": lambda D, C: F.NSF(D, C, bins=4, **SMALL),
    "NAF": lambda D, C: F.NAF(D, C, signal=4, network={"hidden_features": (6,)}, **{**SMALL, "transforms": 1}),
    "UNAF": lambda D, C: F.UNAF(D, C, signal=4, network={"hidden_features": (6,)}, **{**SMALL, "transforms": 1}),
    "SOSPF": lambda D, C: F.SOSPF(D, C, degree=2, polynomials=2, **{**SMALL, "transforms": 1}),
    "BPF": lambda D, C: F.BPF(D, C, degree=6, **SMALL),
    "NICE": lambda D, C: F.NICE(D, C, **SMALL),
    "GF": lambda D, C: F.GF(D, C, transforms=1, components=3, **({"hidden_features": (6,)} if C else {})),
    "CNF": lambda D, C: F.CNF(D, C, hidden_features=(6,)),
}


def make(name, D=2, C=0, scale=1.2):
    """Zuko's module and ours of it, in float64 and away from its start."""
    module = FLOWS[name](D, C).double()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    return module, gx.flows.from_zuko(module)


def given(C, rows=3):
    return torch.randn(rows, C, dtype=F64) if C else None
