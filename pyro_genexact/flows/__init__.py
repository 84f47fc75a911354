"""Normalising flows: a base pushed through transforms, and the recipes that build them."""

from ..core.faces import publish
from .base import Flow
from .build import autoregressive, coupling
from .coupling_recipes import coupling_nsf, glow_vector, nice, realnvp
from .recipes import bnaf, bpf, iaf, maf, naf, nsf, sospf, umnn
from .univariate import UnivariateDistribution, UnivariateFlow, UnivariateTransform, univariate
from .zuko import from_zuko

__all__ = [
    "Flow",
    "UnivariateDistribution",
    "UnivariateFlow",
    "UnivariateTransform",
    "autoregressive",
    "bnaf",
    "bpf",
    "coupling",
    "coupling_nsf",
    "from_zuko",
    "glow_vector",
    "iaf",
    "maf",
    "naf",
    "nice",
    "nsf",
    "realnvp",
    "sospf",
    "umnn",
    "univariate",
]

publish(globals())
