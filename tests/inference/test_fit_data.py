"""``gx.fit``: kinds of data, workers, seeds, arguments that do not fit."""

from __future__ import annotations

import functools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from support.regressions import Gaussian, Linear, keep_rate, quiet, regression_rows, weights

sgd = functools.partial(torch.optim.SGD, lr=0.1)


class Stream(IterableDataset):
    def __init__(self, *columns):
        self.columns = columns

    def __iter__(self):
        return zip(*self.columns, strict=True)


class Rows(Dataset):
    """Items as given; what an item raises it raises."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        if isinstance(self.items[row], Exception):
            raise self.items[row]
        return self.items[row]


# --- kinds of data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["array", "read-only array", "foreign array", "table", "memory map", "dict of a series"]
)
def test_arrays_and_tables_give_the_weights_of_tensors(kind, tmp_path):
    y, x = regression_rows()
    np.save(tmp_path / "x.npy", x.double().numpy().astype(">f8"))  # big-endian
    of_others, frozen = np.load(tmp_path / "x.npy", mmap_mode="r"), x.double().numpy().copy()
    frozen.flags.writeable = False
    data, context = {
        "array": (y.double().numpy(), x.double().numpy()),
        "read-only array": (y, frozen),
        "foreign array": (y.numpy()[::-1].copy()[::-1], x.numpy().astype(">f4")),
        "table": (pd.Series(y.numpy()), pd.DataFrame(x.numpy(), columns=["a", "b"])),
        "memory map": (y.numpy(), of_others),
        "dict of a series": (pd.Series(y.double().numpy()), {"x": x}),
    }[kind]
    one, other = Linear(), Linear()
    first = quiet(one, y, x, validation=0.25, epochs=3, batch_size=16)
    second = quiet(other, data, context, validation=0.25, epochs=3, batch_size=16)
    assert torch.equal(weights(one), weights(other)) and weights(one).norm() > 0
    assert first.validation == second.validation and weights(other).dtype == torch.float32


def test_integers_and_truth_values_of_arrays():
    seen = []

    class Seeing(Linear):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x.float())

    y, x = regression_rows(8)
    for kind in (np.int16, np.uint8, np.bool_):
        quiet(Seeing(), y, x.numpy().astype(kind), epochs=1)
    assert seen == [torch.int64, torch.int64, torch.bool]


def test_text_in_a_table_is_named():
    table = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
    with pytest.raises(TypeError, match=r"Expected data of numbers; got DataFrame of dtype object. Encode categories"):
        quiet(Gaussian(2), table)


def test_a_loader_is_used_as_it_is():
    y, x = regression_rows()
    one, other, third = Linear(), Linear(), Linear()
    quiet(one, DataLoader(TensorDataset(y, x), 16), epochs=2, optimizer=sgd, schedule=keep_rate)
    quiet(other, Stream(y, x), batch_size=16, epochs=2, optimizer=sgd)  # of unknown length: see the rate below
    for start in 2 * [*range(0, len(y), 16)]:
        rows = slice(start, start + 16)
        third.zero_grad()
        (-third(x[rows]).log_prob(y[rows]).mean()).backward()
        with torch.no_grad():
            for p in third.parameters():
                p -= 0.1 * p.grad
    torch.testing.assert_close(weights(one), weights(third))
    assert weights(other).norm() > 0
    result = quiet(Linear(), Stream(y, x), validation=DataLoader(TensorDataset(y, x), 7), epochs=2)
    assert len(result.validation) == 2


def test_a_loader_shuffles_by_the_seed():
    y, x = regression_rows()

    def train(seed):
        module = Linear()
        quiet(module, DataLoader(TensorDataset(y, x), 16, shuffle=True), epochs=2, seed=seed)
        return weights(module)

    assert torch.equal(train(0), train(0)) and not torch.equal(train(0), train(1))


def test_workers_give_the_same_weights():
    y, x = regression_rows()
    one, other = Linear(), Linear()
    first = quiet(one, TensorDataset(y, x), validation=0.25, epochs=2, batch_size=8)
    second = quiet(other, TensorDataset(y, x), validation=0.25, epochs=2, batch_size=8, num_workers=2)
    assert torch.equal(weights(one), weights(other)) and first.validation == second.validation


@pytest.mark.parametrize(("workers", "subset"), [(0, False), (2, False), (0, True)])
def test_a_row_that_raises_is_named(workers, subset):
    items = [*torch.zeros(12, 3, dtype=torch.float64)]
    items[7] = OSError("broken disk")
    data = Subset(Rows(items), range(1, 12)) if subset else Rows(items)  # which reads its batches itself
    with pytest.raises(OSError, match="broken disk") as error:
        quiet(Gaussian(), data, batch_size=4, num_workers=workers)
    text = str(error.value) + "".join(getattr(error.value, "__notes__", []))
    assert f"Raised by row {7 - subset} of data." in text


def test_rows_of_other_shapes_and_lists():
    ragged = Rows([torch.zeros(3), torch.zeros(4)])
    with pytest.raises(
        ValueError, match=r"Expected items of data to have the same shape; got different ones in rows \[[01], [01]\]"
    ):
        quiet(Gaussian(), ragged)
    with pytest.raises(TypeError, match=r"Expected items of data to be a row or a tuple \(row, context\); got a list."):
        quiet(Gaussian(2), Rows([[1.0, 2.0], [3.0, 4.0]]))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda y, x: quiet(Linear(), Stream(y, x), schedule=keep_rate), "Expected data of known length with schedule"),
        (lambda y, x: quiet(Linear(), Stream(y, x), x), "Expected context=None if data is a Stream; got Tensor."),
        (
            lambda y, x: quiet(Linear(), DataLoader(TensorDataset(y, x)), weights=y),
            "Expected weights=None if data is a DataLoader; got Tensor.",
        ),
        (
            lambda y, x: quiet(Linear(), Stream(y, x), validation=0.1),
            "Expected separate validation rows if data is a Stream; got 0.1.",
        ),
        (lambda y, x: quiet(Linear(), y, x, weights=y[:3]), "Expected weights.shape == (40,), one per row; got (3,)."),
        (
            lambda y, x: quiet(Linear(), y, x, weights=-y.abs()),
            "Expected weights to be finite, not negative and not all 0",
        ),
        (lambda y, x: quiet(Linear(), y, x, ema=1.0), "Expected 0 <= ema < 1; got 1.0."),
        (lambda y, x: quiet(Linear(), y, x, seconds=0), "Expected seconds to be positive and finite; got 0."),
        (
            lambda y, x: quiet(Linear(), y, x, seed=2**64),
            "Expected seed to be an integer from 0 to 2**63 - 1; got 1844674",
        ),
        (lambda y, x: quiet(Linear(), y, x, seed=-1), "Expected seed to be an integer from 0 to 2**63 - 1; got -1."),
        (lambda y, x: quiet(Linear(), y, x, num_workers=-1), "Expected num_workers to be an integer >= 0; got -1."),
        (lambda y, x: quiet(Linear(), y, x, accumulate=0), "Expected accumulate to be an integer >= 1; got 0."),
    ],
)
def test_error_texts(call, text):
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(text)):
        call(*regression_rows())


def test_a_seed_of_numpy():
    y, x = regression_rows()
    one, other = Linear(), Linear()
    quiet(one, y, x, seed=3, epochs=2, batch_size=8)
    quiet(other, y, x, seed=np.int64(3), epochs=2, batch_size=8)
    assert torch.equal(weights(one), weights(other))
