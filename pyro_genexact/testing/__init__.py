"""Laws of conditioners, heads, transforms and distributions, which you can run on your own classes.

A law is a function that raises an AssertionError if its subject breaks the law; the message has the law, the case and the
two numbers. Near the identity, many laws hold trivially, and their tolerances are those of float64, so call
``redraw(module.double())`` first. The argument ``subject`` is a transform or a distribution, or a module whose call (with the
context, if one is given) returns it. Laws do not change their subject.
"""

from ..core.faces import publish
from .bijections import bijection_head, differentiability, learning, monotonicity, precision, round_trips, slopes
from .chains import chain
from .compilation import compiled
from .conditioners import causality, chunks, consumption, context_use, reorder, sequential_gradient
from .conventions import as_distribution, conventions
from .devices import constructed, device, meta, per_example
from .distributions import agreement, extremes, freshness, gradients, mass, persistence, saturation, shapes, support
from .empty_batches import empty, queries
from .encoders import encoder_inputs, missing, padding, permutation, size
from .heads import distribution_head
from .helpers import conditioner_inputs, made, redraw
from .kinds import kinds
from .lines import line_mass
from .protocol import inferred_shapes, quantities, settable
from .sequences import sequence
from .states import reloading
from .threads import threads
from .transforms import cache, copies, derivatives, inverse, log_det
from .waits import count_waits, waits

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
    "encoder_inputs",
    "permutation",
    "padding",
    "missing",
    "size",
    "bijection_head",
    "monotonicity",
    "round_trips",
    "slopes",
    "precision",
    "differentiability",
    "learning",
    "distribution_head",
    "inverse",
    "log_det",
    "derivatives",
    "cache",
    "conventions",
    "as_distribution",
    "copies",
    "shapes",
    "support",
    "mass",
    "line_mass",
    "chain",
    "sequence",
    "agreement",
    "gradients",
    "extremes",
    "saturation",
    "persistence",
    "reloading",
    "freshness",
    "kinds",
    "threads",
    "quantities",
    "settable",
    "inferred_shapes",
    "device",
    "constructed",
    "meta",
    "per_example",
    "count_waits",
    "waits",
    "compiled",
    "empty",
    "queries",
]

publish(globals())
