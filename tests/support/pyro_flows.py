"""Affine autoregressive flows with their densities in plain matrix products, for the tests of Pyro's inference."""

from __future__ import annotations

import math

import pytest
import torch

import pyro_genexact as gx

D, ROWS = 2, 12


def redraw(recipe, *args, scale=0.4, **options):
    """A flow in float64 whose weights are far from the identity."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        flow = recipe(*args, **options)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_(0.0, scale)
    return flow


def affine_by_hand(flow, index, params, x, context=None):
    """Shift and log-scale of transform ``index``, by plain matrix products with ``params``."""
    part = flow.transforms[index]
    maf = isinstance(part, gx.transforms.Inverse)
    path = f"transforms.{index}." + ("transform." if maf else "")
    layers = getattr(part, "transform", part).conditioner.layers
    h = x
    for i, layer in enumerate(layers):
        weight, bias = (
            params[f"{path}conditioner.layers.{i}.weight"] * layer.mask,
            params[f"{path}conditioner.layers.{i}.bias"],
        )
        h = h[..., : weight.shape[1]] @ weight.mT + bias
        if context is not None:
            h = h + context @ params[f"{path}conditioner.layers.{i}.context_weight"].mT
        if i + 1 < len(layers):
            h = h.relu() if maf else h * h.sigmoid()
    shift, raw = h.unflatten(-1, (-1, 2)).unbind(-1)
    return shift, 7 * torch.tanh(raw / 7)


def noise_by_hand(flow, params, y, context=None):
    """The base noise of y and log|dnoise/dy|, from plain matrix products with ``params``; no code of the package runs."""
    total = torch.zeros(y.shape[:-1], dtype=y.dtype)
    for index in range(len(flow.transforms) - 1, -1, -1):
        part = flow.transforms[index]
        if isinstance(part, gx.transforms.Reverse):
            y = y.flip(-1)
        elif isinstance(part, gx.transforms.Inverse):
            shift, s = affine_by_hand(flow, index, params, y, context)
            y, total = y * s.exp() + shift, total + s.sum(-1)
        elif isinstance(part, gx.transforms.AutoregressiveTransform):
            x = y
            for _ in range(y.shape[-1]):  # a triangular system: as many substitutions as sites are exact
                shift, s = affine_by_hand(flow, index, params, x, context)
                x = (y - shift) * (-s).exp()
            y, total = x, total - affine_by_hand(flow, index, params, x, context)[1].sum(-1)
    return y, total


def log_prob_by_hand(flow, params, y, context=None):
    z, ladj = noise_by_hand(flow, params, y, context)
    return -0.5 * (z**2).sum(-1) - D / 2 * math.log(2 * math.pi) + ladj


KINDS = {
    "conditional maf": (gx.flows.maf, 3),
    "conditional iaf": (gx.flows.iaf, 3),
    "maf": (gx.flows.maf, 0),
}


def build(kind, seed=0, transforms=2, scale=0.4):
    torch.manual_seed(seed)
    recipe, context = KINDS[kind]
    return redraw(recipe, D, context, scale=scale, transforms=transforms, hidden=(8,))


def rows(kind, n=ROWS):
    context = KINDS[kind][1]
    return torch.randn(n, context, dtype=torch.float64) if context else None


def call(flow, x):
    return flow() if x is None else flow(x)


kinds = pytest.mark.parametrize("kind", KINDS)
