"""Checks of the arguments of conditioners."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..base import Conditioner
from ..core.checks import check_numbers


def check_callable(activation: Any) -> None:
    """Raises a ValueError if the activation is not callable."""
    if not callable(activation):
        raise ValueError(f"Expected activation to be a function; got {activation}.")


def check_rate(rate: float) -> None:
    """Raises a TypeError if the dropout rate is not a number, and a ValueError if it is outside [0, 1)."""
    check_numbers(dropout=rate)
    if not 0 <= rate < 1:
        raise ValueError(f"Expected 0 <= dropout < 1; got {rate}.")


def check_sites(conditioner: Conditioner, y: Tensor) -> None:
    """Raises a ValueError if y is not of shape (B, T, *site_shape) with a valid number of sites."""
    site = conditioner.site if isinstance(conditioner.site, tuple) else ()
    expected, got = ((conditioner.num_sites, *site), y.shape[1:]) if conditioner.num_sites else (site, y.shape[2:])
    if got != expected or y.dim() < 2 or not y.shape[1]:
        where = "y.shape[1:]" if conditioner.num_sites else "y.shape[2:]"
        raise ValueError(
            f"Expected {where} == {expected} (sites and site shape of {type(conditioner).__name__}); got {tuple(y.shape)}."
        )
    _check_length(conditioner, y, 0)


def check_chunk(conditioner: Conditioner, y: Tensor, first: int, rows: int) -> None:
    """Raises a ValueError if y is not of shape (B, S, *site_shape), a valid chunk after ``first`` sites of B rows."""
    _, sites, *shape = y.shape
    total, site = conditioner.num_sites, conditioner.site
    if not sites or (total is not None and sites >= total - first):
        if total is None:
            raise ValueError(f"Expected y.shape[1] >= 1 (sites to read); got {tuple(y.shape)}.")
        raise ValueError(
            f"Expected y.shape[1] between 1 and {total - 1 - first} ({first} of {total} sites have been read, and the "
            f"last site is never read); got {tuple(y.shape)}."
        )
    expected = site if isinstance(site, tuple) else ()
    if tuple(shape) != expected:
        raise ValueError(
            f"Expected y.shape[2:] == {expected} (site shape of {type(conditioner).__name__}); got {tuple(y.shape)}."
        )
    check_rows("y", y, rows, "the state")
    _check_length(conditioner, y, first + 1)


def check_rows(name: str, value: Tensor, rows: int, of: str) -> None:
    """Raises a ValueError if the value has another number of rows."""
    if value.shape[0] != rows:
        raise ValueError(f"Expected {name}.shape[0] == {rows} (rows of {of}); got {tuple(value.shape)}.")


def _check_length(conditioner: Conditioner, y: Tensor, first: int) -> None:
    """Raises a ValueError if the sites of y, from ``first`` on, exceed ``conditioner.max_len``."""
    most = conditioner.max_len
    if most is not None and first + y.shape[1] > most:
        raise ValueError(
            f"Expected y.shape[1] <= {most - first} (the conditioner has max_len == {most}); got {tuple(y.shape)}."
        )
