"""The law of value dtypes: log_prob is the same for all integer dtypes, and complex values raise an error."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .helpers import close, no_error, raises

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64, torch.int64)


def kinds(distribution: Any, value: Tensor) -> None:
    """Checks that complex values raise an error, and that log_prob is the same for all integer dtypes.

    Args:
        distribution: a distribution.
        value: a value in its support.

    Example:
        >>> from pyro_genexact import Autoregressive, conditioners, heads
        >>> net = conditioners.MADE(3, 2, hidden=(8,), site=2)
        >>> d = Autoregressive(net, heads.Categorical(2), (3,))()
        >>> kinds(d, d.sample())
    """
    for case, validate in (("validating", True), ("not validating", False)):
        d = copy.copy(distribution)
        d._validate_args = validate
        with raises("kinds", f"complex values, {case}", (TypeError, ValueError)):
            d.log_prob(value.to(torch.complex128 if value.dtype == torch.float64 else torch.complex64))
        if not bool((value == value.long()).all()):
            continue
        expected = d.log_prob(value)
        for dtype in INTEGERS:
            if torch.equal(value.to(dtype).long(), value.long()):
                with no_error("kinds", f"{dtype}, {case}", TypeError, ValueError, RuntimeError, named=True):
                    got = d.log_prob(value.to(dtype))
                close("kinds", f"{dtype}, {case}", got, expected, 1e-12)
