"""Laws of encoders: the order of items, padding, missing entries and the number of items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contexts import PaddedSequence
from ..encoders.base import Encoder
from .helpers import broken, close, gradients_of, noise_like


def encoder_inputs(encoder: Encoder, rows: int = 6, items: int = 5, seed: int = 0) -> Tensor:
    """Returns random vectors (rows, F), or random sets or series (rows, N, F), for an encoder.

    Args:
        encoder: the encoder.
        rows: the number of rows.
        items: N, the number of items or steps.
        seed: the seed of the numbers.
    """
    shape = (rows, encoder.inputs) if encoder.event_dim == 1 else (rows, items, encoder.inputs)
    return noise_like(encoder.shift.new_empty(shape), seed)


def permutation(encoder: Encoder, items: int = 7, seed: int = 0, tol: float = 1e-12) -> None:
    """Checks that neither the features of sets nor their gradients depend on the order of the items.

    Args:
        encoder: an encoder of sets.
        items: N, the number of items.
        seed: the seed of the items and of the order.
        tol: the tolerance, relative to 1 + |value|.

    Example:
        >>> from pyro_genexact import encoders
        >>> permutation(encoders.DeepSet(2, 4).double())
    """
    x = encoder_inputs(encoder, 4, items, seed)
    x[1, 2, 0] = x[2, 1] = torch.nan
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed), device="cpu").to(x.device)
    (c, grad), (other, of_other) = (_with_gradient(encoder, values, None, seed) for values in (x, x[:, order]))
    close("permutation", "features", other, c, tol)
    close("permutation", "gradient", of_other, grad[:, order], tol)


def padding(encoder: Encoder, items: int = 5, seed: int = 0, tol: float = 1e-12) -> None:
    """Checks that each row has the features of its items alone, and that padding has gradients of zero.

    The lengths include 0. The padding is infinite, NaN or large.

    Args:
        encoder: an encoder of sets or series.
        items: N, the number of items or steps.
        seed: the seed of the items.
        tol: the tolerance, relative to 1 + |value|.

    Example:
        >>> from pyro_genexact import encoders
        >>> padding(encoders.Series(2, 4).double())
    """
    x = encoder_inputs(encoder, items + 1, items, seed)
    lengths = torch.arange(items + 1, device=x.device)
    beyond = (torch.arange(items, device=x.device) >= lengths.unsqueeze(1)).unsqueeze(2)
    found = torch.cat([encoder(x[n : n + 1, :n]) for n in range(items + 1)])
    if not found.isfinite().all():
        broken("padding", "features of each row alone", "not finite")
    for case, fill in (("NaN", torch.nan), ("infinity", torch.inf), ("a number", 7.0)):
        c, grad = _with_gradient(encoder, x.masked_fill(beyond, fill), lengths, seed)
        close("padding", f"{case}, features", c, found, tol)
        close("padding", f"{case}, gradient of padding", torch.where(beyond, grad, 0.0), 0.0, 0.0)
        if not (grad[1:].abs().amax((1, 2)) > 0).all():
            broken("padding", f"{case}, gradient of items", "zero in a row")


def missing(encoder: Encoder, seed: int = 0) -> None:
    """Checks that missing entries (NaN) give finite features, which differ from those of the mean in their place.

    The gradient in a missing entry is zero.

    Args:
        encoder: the encoder.
        seed: the seed of the values.
    """
    x = encoder_inputs(encoder, 4, seed=seed)
    gone = torch.zeros_like(x, dtype=torch.bool)
    gone[..., 0] = torch.arange(x[..., 0].numel(), device=x.device).reshape(x.shape[:-1]) % 3 == 0
    gone[0] = True
    c, grad = _with_gradient(encoder, x.masked_fill(gone, torch.nan), None, seed)
    if not (c.isfinite().all() and grad.isfinite().all()):
        broken("missing", "features and gradients", "not finite")
    close("missing", "gradient of missing entries", torch.where(gone, grad, 0.0), 0.0, 0.0)
    by = (c - encoder(torch.where(gone, encoder.shift, x))).abs().amax(-1)[gone.flatten(1).any(1)].min()
    if not by > 1e-9:
        broken("missing", "the mean in their place", f"changes the features by {by:.3g}, which must not be 0")


def size(encoder: Encoder, seed: int = 0, tol: float = 1e-12) -> None:
    """Checks that the features of a set depend on the number of its items, though not by way of absent ones.

    A set in which each item occurs twice has the same means, and must have other features. Items without any observed entry
    must not change the features.

    Args:
        encoder: an encoder of sets.
        seed: the seed of the items.
        tol: the tolerance, relative to 1 + |value|.
    """
    x = encoder_inputs(encoder, 4, seed=seed)
    c = encoder(x)
    by = (encoder(torch.cat([x, x], 1)) - c).abs().amax(-1).min()
    if not by > 1e-6:
        broken("size", "each item twice", f"changes the features by {by:.3g}, which must not be 0")
    absent = torch.full_like(x[:, :2], torch.nan)
    close("size", "absent items", encoder(torch.cat([absent, x[:, :3], absent, x[:, 3:]], 1)), c, tol)


def _with_gradient(encoder: Encoder, x: Tensor, lengths: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the features and the gradient of a random weighted sum of them in the values."""
    x = x.detach().clone().requires_grad_()
    values: Any = x if lengths is None else PaddedSequence(x, lengths)
    c = encoder(values)
    return c.detach(), gradients_of((c * noise_like(c, seed)).sum(), [x])[0]
