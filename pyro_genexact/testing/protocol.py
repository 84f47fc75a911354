"""What torch and Pyro expect of every distribution beside its density and its samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .helpers import _broken, _same, made


def quantities(subject: Any, context: Tensor | None = None) -> None:
    """Each quantity that torch names has the right shape; a distribution without it raises a NotImplementedError.

    Those are ``mean``, ``variance``, ``stddev``, ``mode``, ``rsample`` and ``enumerate_support``, with and without
    ``expand``; ``entropy`` and ``perplexity``; and ``cdf`` and ``icdf`` of scalar events. ``rsample`` exists wherever ``has_rsample`` is True.

    Args:
        subject: a distribution, or a module whose call returns one.
        context: (*batch, C) or None.
    """
    d = made(subject, context)
    batch, value = tuple(d.batch_shape), (*d.batch_shape, *d.event_shape)
    expected: dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]] = {
        **{name: (partial(getattr, d, name), value) for name in ("mean", "variance", "stddev", "mode")},
        "entropy": (d.entropy, batch),
        "perplexity": (d.perplexity, batch),
        "rsample": (lambda: d.rsample((2,)), (2, *value)),
        "enumerate_support": (lambda: d.enumerate_support()[0], value),
        "enumerate_support without expand": (
            lambda: d.enumerate_support(expand=False)[0],
            (*[1] * len(batch), *d.event_shape),
        ),
        "cdf": (lambda: d.cdf(d.sample()), batch),
        "icdf": (lambda: d.icdf(torch.full_like(d.log_prob(d.sample()), 0.3)), batch),
    }
    for name, (quantity, shape) in expected.items():
        try:
            found = quantity()
        except NotImplementedError:
            if name == "rsample" and d.has_rsample:
                _broken("quantities", name, "not implemented, though has_rsample is True")
            continue
        except Exception as error:
            raise AssertionError(f"quantities broken [{name}]: {type(error).__name__}: {error}") from error
        _same("quantities", name, tuple(found.shape), shape)
