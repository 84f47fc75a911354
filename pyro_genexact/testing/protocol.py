"""Laws of optional methods of distributions (mean, entropy, cdf, ...) and of Pyro's protocol."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from .helpers import broken, made, no_error, same


def quantities(subject: Any, context: Tensor | None = None) -> None:
    """Checks that each optional quantity of torch's distributions has the right shape or raises a NotImplementedError.

    The quantities are ``mean``, ``variance``, ``stddev``, ``mode``, ``entropy``, ``perplexity``, ``rsample``,
    ``enumerate_support`` with and without ``expand``, and ``cdf`` and ``icdf``. ``rsample`` must exist if ``has_rsample`` is
    True.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> quantities(dist.Normal(torch.zeros(3), 1.0))
    """
    d = made(subject, context)
    batch, event = tuple(d.batch_shape), tuple(d.event_shape)
    value, narrow = batch + event, (1,) * len(batch) + event
    expected: dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]] = {
        **{name: (partial(getattr, d, name), value) for name in ("mean", "variance", "stddev", "mode")},
        "entropy": (d.entropy, batch),
        "perplexity": (d.perplexity, batch),
        "rsample": (lambda: d.rsample((2,)), (2, *value)),
        "enumerate_support": (lambda: d.enumerate_support()[0], value),
        "enumerate_support without expand": (lambda: d.enumerate_support(expand=False)[0], narrow),
        "cdf": (lambda: d.cdf(d.sample()), batch),
        "icdf": (lambda: d.icdf(torch.full_like(d.log_prob(d.sample()), 0.3)), batch),
    }
    for name, (quantity, shape) in expected.items():
        try:
            found = quantity()
        except NotImplementedError:
            if name == "rsample" and d.has_rsample:
                broken("quantities", name, "not implemented, though has_rsample is True")
            continue
        except Exception as error:
            raise AssertionError(f"quantities broken [{name}]: {type(error).__name__}: {error}") from error
        same("quantities", name, tuple(found.shape), shape)


def settable(subject: Any, context: Tensor | None = None) -> None:
    """Checks that Pyro's ``has_rsample_`` sets ``has_rsample`` of one distribution and returns this distribution.

    The setting decides how sample sites draw. Copies and expansions by plates keep it; other distributions of the same class
    do not have it.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.
    """
    one = made(subject, context)
    before, smooth = one.has_rsample, one.has_rsample and one.rsample().requires_grad
    for value in (True, False):
        d = copy.copy(made(subject, context))
        with no_error("settable", f"has_rsample_({value})", AttributeError):
            returned = d.has_rsample_(value)
        if returned is not d:
            broken("settable", f"has_rsample_({value})", "returns another object")
        same("settable", f"has_rsample after has_rsample_({value})", d.has_rsample, value)
        same("settable", f"has_rsample of a copy after has_rsample_({value})", copy.copy(d).has_rsample, value)
    with poutine.trace() as traced:
        pyro.sample("alone", d)
        with pyro.plate("rows", 2, dim=-1 - len(d.batch_shape)):
            pyro.sample("in a plate", d)
    for name in ("alone", "in a plate"):
        site: Any = traced.trace.nodes[name]
        same("settable", f"has_rsample of a site, {name}", site["fn"].has_rsample, False)
        same("settable", f"gradient of a draw at a site, {name}", site["value"].requires_grad, False)
    if before:
        same("settable", "gradient of rsample after has_rsample_(False)", d.rsample().requires_grad, smooth)
    same("settable", "has_rsample of another distribution", made(subject, context).has_rsample, before)


def inferred_shapes(subject: Any, context: Tensor | None = None) -> None:
    """Checks that the class has a ``support`` and that ``infer_shapes`` returns the right shapes.

    ``infer_shapes`` may raise a NotImplementedError unless the support of the class implies scalar events.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.
    """
    d = made(subject, context)
    kind = type(d)
    if not isinstance(kind.support, constraints.Constraint):
        broken("inferred shapes", "support of the class", f"{type(kind.support).__name__}, not a constraint")
    values = {name: getattr(d, name, None) for name in d.arg_constraints}
    given = {name: value.shape for name, value in values.items() if isinstance(value, Tensor)}
    try:
        found = kind.infer_shapes(**given)
    except NotImplementedError:
        with suppress(NotImplementedError):
            if not kind.support.event_dim:
                broken("inferred shapes", f"parameters {sorted(given)}", "not implemented")
        return
    if given:
        same("inferred shapes", f"parameters {sorted(given)}", found, (d.batch_shape, d.event_shape))
