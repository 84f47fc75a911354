"""Normalising flows: :class:`Flow`, which transforms a base distribution, and recipes that build common flows."""

from ..core.faces import publish
from .base import Flow
from .build import autoregressive, coupling
from .coupling_recipes import coupling_nsf, glow_vector, nice, realnvp
from .monotone_recipes import bpf, naf, sospf, umnn
from .recipes import bnaf, iaf, maf, nsf
from .tarflow import tarflow
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
    "tarflow",
    "umnn",
    "univariate",
]

publish(globals())
