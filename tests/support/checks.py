"""Short checks: errors by their text, closeness, draws by their frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch


def fails(kind, text, call, *args, **options):
    """The call raises exactly this kind of error, with this text in its message, which is returned."""
    with pytest.raises(kind) as raised:
        call(*args, **options)
    assert type(raised.value) is kind and text in str(raised.value), f"{text!r} is not in {raised.value!r}"
    return str(raised.value)


def close(got, expected, tol=1e-10):
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


def goodness(values, probs, enough=5):
    """The p-value of integer draws (n,) against probabilities (L,), cells of fewer than 5 expected joined."""
    counts = np.bincount(values.long().numpy(), minlength=len(probs)).astype(float)
    assert len(counts) == len(probs)
    expected = len(values) * probs.numpy()
    rare = expected < enough
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return scipy.stats.chisquare(observed[keep], expected[keep] * observed.sum() / expected.sum()).pvalue


def has_frequencies(y, values, p):
    """Draws y (n, *batch, T) take the values (N, *batch, T) as often as their probabilities (N, *batch) say."""
    n = len(y)
    frequencies = (y[:, None] == values).all(-1).double().mean(0)
    assert ((frequencies - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()
