"""Checks of what conditioners are built from and given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..base import Conditioner
from ..core.checks import check_numbers


def check_callable(activation: Any) -> None:
    """Raises a ValueError unless the activation can be called."""
    if not callable(activation):
        raise ValueError(f"Expected activation to be a function; got {activation}.")


def check_rate(rate: float) -> None:
    """Raises a TypeError unless the rate of dropout is a number, a ValueError unless it is in [0, 1)."""
    check_numbers(dropout=rate)
    if not 0 <= rate < 1:
        raise ValueError(f"Expected 0 <= dropout < 1; got {rate}.")


def check_sites(conditioner: Conditioner, y: Tensor) -> None:
    """Raises a ValueError unless y is (B, T, *site_shape), of as many sites as the conditioner takes."""
    site = conditioner.site if isinstance(conditioner.site, tuple) else ()
    expected, got = ((conditioner.num_sites, *site), y.shape[1:]) if conditioner.num_sites else (site, y.shape[2:])
    if got != expected or y.dim() < 2 or not y.shape[1]:
        where = "y.shape[1:]" if conditioner.num_sites else "y.shape[2:]"
        raise ValueError(
            f"Expected {where} == {expected} (sites and site of {type(conditioner).__name__}); got {tuple(y.shape)}."
        )
    _check_length(conditioner, y, 0)


def check_chunk(conditioner: Conditioner, y: Tensor, first: int, rows: int) -> None:
    """Raises a ValueError unless y (B, S, *site_shape) may be read after ``first`` sites of as many rows."""
    _, sites, *shape = y.shape
    total, site = conditioner.num_sites, conditioner.site
    if not sites or (total is not None and sites >= total - first):
        if total is None:
            raise ValueError(f"Expected y.shape[1] >= 1 (sites to read); got {tuple(y.shape)}.")
        raise ValueError(
            f"Expected y.shape[1] between 1 and {total - 1 - first} ({first} of {total} sites were read and the last one "
            f"never is); got {tuple(y.shape)}."
        )
    expected = site if isinstance(site, tuple) else ()
    if tuple(shape) != expected:
        raise ValueError(
            f"Expected y.shape[2:] == {expected} (site of {type(conditioner).__name__}); got {tuple(y.shape)}."
        )
    check_rows("y", y, rows, "the state")
    _check_length(conditioner, y, first + 1)


def check_rows(name: str, value: Tensor, rows: int, of: str) -> None:
    """Raises a ValueError unless the value has as many rows."""
    if value.shape[0] != rows:
        raise ValueError(f"Expected {name}.shape[0] == {rows} (rows of {of}); got {tuple(value.shape)}.")


def _check_length(conditioner: Conditioner, y: Tensor, first: int) -> None:
    """Raises a ValueError if parameters of the sites of y, from ``first`` on, are more than ``conditioner.max_len``."""
    most = conditioner.max_len
    if most is not None and first + y.shape[1] > most:
        raise ValueError(
            f"Expected y.shape[1] <= {most - first} (parameters of at most max_len == {most} sites); got {tuple(y.shape)}."
        )
