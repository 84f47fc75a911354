"""The law of empty batches, whose shapes, dtypes and gradients follow from those of one and two rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..decoding.branch_and_bound import exact_mode
from ..decoding.search import beam_search, greedy
from ..decoding.stochastic import stochastic_beam_search
from ..diagnostics.calibration import pit
from ..families.in_support import contains
from .helpers import broken, no_error, same, seeded, tensors_of

Quantities = Mapping[str, Callable[[], Any]]

OF_CHAINS = ("score", "risk", "log_marginal_of", "filter")
OF_VALUES = ("log_prob", "log_prob_sites", "lengths_of", "cdf", "to_uniform", *OF_CHAINS)
OF_UNIFORMS = ("icdf", "from_uniform")
SEARCHES: dict[str, Callable[[Any], Any]] = {
    "greedy": greedy,
    "beam_search": partial(beam_search, width=2, k=2, unfinished=True),
    "stochastic_beam_search": partial(stochastic_beam_search, k=2),
    "exact_mode": exact_mode,
}


def empty(run: Callable[[int], Quantities], leaves: Sequence[Tensor] = ()) -> None:
    """Checks shapes, dtypes and gradients for an empty batch.

    A dim with size a for one row and b for two rows must have size 2a - b for no rows. If the sum over one row has a gradient
    in a leaf, the sum over no rows has a gradient of zeros.

    Args:
        run: a function from a number of rows to quantities by name, each a function that returns tensors (and possibly other
            objects). Quantities that raise for one row are left out.
        leaves: the leaves of the gradients.

    Example:
        >>> import torch, pyro_genexact as gx
        >>> flow = gx.flows.maf(3, context=2, hidden=(8,))
        >>> empty(lambda rows: queries(flow(torch.zeros(rows, 2))))
    """
    with seeded(0):
        none, one, two = (run(rows) for rows in range(3))
        for name in one:
            try:
                pair = [list(tensors_of(of[name]())) for of in (one, two)]
            except (AttributeError, NotImplementedError, TypeError, ValueError):
                continue  # the distribution does not have this quantity
            with no_error("empty", name, Exception, named=True):
                found = list(tensors_of(none[name]()))
            for got, first, second in zip(found, *pair, strict=True):
                expected = tuple(2 * a - b for a, b in zip(first.shape, second.shape, strict=True))
                same("empty", f"{name}, shape", tuple(got.shape), expected)
                same("empty", f"{name}, dtype", got.dtype, first.dtype)
                _vanishing(name, got, first, leaves)


def queries(d: Distribution) -> Quantities:
    """Returns all quantities of a distribution for :func:`empty`: attributes, methods of samples, and searches."""
    found: dict[str, Callable[[], Any]] = {
        name: partial(_public, d, name) for name in dir(type(d)) if not name.startswith("_") and name != "reshape"
    }
    found |= {name: partial(search, d) for name, search in SEARCHES.items()}
    found["enumerate_support, not expanded"] = lambda: d.enumerate_support(expand=False)
    return {**found, **of_samples(d)}


def of_samples(d: Distribution, sample_shape: tuple[int, ...] = ()) -> Quantities:
    """Returns the quantities of a distribution for samples of this shape, and for uniform numbers, for :func:`empty`."""
    value = d.sample(torch.Size(sample_shape))
    u = torch.full_like(value, 0.4, dtype=None if value.is_floating_point() else torch.get_default_dtype())
    return {
        "sample": lambda: d.sample(torch.Size(sample_shape)),
        "rsample": lambda: d.rsample(torch.Size(sample_shape)),
        "support.check": lambda: contains(d.support, value),
        "pit": lambda: pit(d, value),
        **{f"{name} of values": partial(_public, d, name, value) for name in OF_VALUES},
        **{f"{name} of uniforms": partial(_public, d, name, u) for name in OF_UNIFORMS},
    }


def _public(d: Distribution, name: str, *values: Tensor) -> Any:
    attribute = getattr(d, name)
    if callable(attribute):
        required = inspect.signature(attribute).bind(*values)  # raises a TypeError if there are further arguments
        return attribute(*required.args)
    return attribute


def _vanishing(name: str, got: Tensor, like: Tensor, leaves: Sequence[Tensor]) -> None:
    same("empty", f"{name}, requires_grad", got.requires_grad, like.requires_grad)
    if not (like.requires_grad and leaves):
        return
    pairs = [torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True) for value in (got, like)]
    for i, (grad, full) in enumerate(zip(*pairs, strict=True)):
        same("empty", f"{name}, whether leaf {i} has a gradient", grad is None, full is None)
        if grad is not None and grad.any():
            broken("empty", f"{name}, gradient of leaf {i}", f"{grad[grad != 0][0]}, not 0")
