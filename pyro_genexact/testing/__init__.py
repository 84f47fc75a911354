"""The laws of conditioners, heads, transforms and distributions, as functions to run on one's own.

Each raises an AssertionError that names the broken law, the case and the two numbers. Laws have power only where the
subject is far from the identity and in float64: call ``redraw(module.double())`` first. ``subject`` is a transform or
distribution, or a module whose call (with the context, where one is given) returns it. None changes its subject.
"""

from .conditioners import causality, chunks, consumption, context_use, reorder, sequential_gradient
from .devices import device, meta
from .distributions import agreement, extremes, freshness, gradients, mass, persistence, shapes, support
from .heads import bijection_head, distribution_head
from .helpers import conditioner_inputs, made, redraw
from .transforms import cache, copies, derivatives, inverse, log_det

__all__ = [  # noqa: RUF022 - the order of the reference page
    "redraw",
    "made",
    "conditioner_inputs",
    "causality",
    "chunks",
    "reorder",
    "consumption",
    "context_use",
    "sequential_gradient",
    "bijection_head",
    "distribution_head",
    "inverse",
    "log_det",
    "derivatives",
    "cache",
    "copies",
    "shapes",
    "support",
    "mass",
    "agreement",
    "gradients",
    "extremes",
    "persistence",
    "freshness",
    "device",
    "meta",
]
