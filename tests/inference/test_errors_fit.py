"""``gx.fit`` on data, steps and arguments that are wrong."""

from __future__ import annotations

import math
import re

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.utils.data import IterableDataset, TensorDataset

from support.regressions import Gaussian, Keywords, Linear, keep_rate, quiet, regression_rows, weights

# --- numbers that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("where", "label"),
    [
        ("data", "data"),
        ("context", "context"),
        ("named", "context['x']"),
        ("validation", "validation"),
        ("held out", "validation context"),
        ("dataset", "context"),
    ],
)
def test_infinite_input_is_named(bad, where, label):
    y, x = regression_rows()
    broken_y, broken_x = y.clone(), x.clone()
    broken_y[[5, 9]], broken_x[[5, 9], 1] = bad, bad
    call = {
        "data": lambda: quiet(Linear(), broken_y, x),
        "context": lambda: quiet(Linear(), y, broken_x),
        "named": lambda: quiet(Keywords(), y, {"x": broken_x, "lengths": torch.ones(40)}),
        "validation": lambda: quiet(Linear(), y, x, validation=(broken_y, x)),
        "held out": lambda: quiet(Linear(), y, x, validation=(y, broken_x)),
        "dataset": lambda: quiet(Linear(), TensorDataset(y, broken_x)),
    }[where]
    with pytest.raises(ValueError) as error:
        call()
    rows = re.fullmatch(
        rf"Expected {re.escape(label)} to be finite; got NaN or infinity, first in rows \[(.*)\]\.",
        str(error.value),
    )
    assert rows and sorted(rows[1].split(", ")) == ["5", "9"]


class Breaking(Linear):
    """Fails for context rows that start with 100: in the loss, in its gradient alone, or in validate_args."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.before = []

    def forward(self, x):
        self.before.append(weights(self))
        marked = x[:, 0] == 100
        loc = super().forward(x.masked_fill(marked[:, None], 0.0)).loc
        # the square root of 0 is finite, its derivative is not: 0 times infinity
        value = (0 * loc[marked]).sqrt() if self.how == "gradient" else loc[marked] * math.nan
        loc = loc.masked_scatter(marked, value)
        return dist.Normal(loc, 1.0, validate_args=self.how == "parameter")


@pytest.mark.parametrize("how", ["loss", "gradient", "parameter"])
def test_a_non_finite_step_is_never_taken(how):
    y, x = regression_rows()
    x[17, 0] = 100
    module = Breaking(how).eval()
    with pytest.raises(ValueError if how == "parameter" else FloatingPointError) as error:
        quiet(module, y, x, epochs=3, batch_size=4, lr=0.1)
    text = str(error.value)
    batch = re.search(r"at epoch 0, batch (\d), first in rows \[17\]\.$", text)
    assert batch, text
    assert {"loss": "finite loss; got nan", "gradient": "finite gradient; got nan", "parameter": "loc"}[how] in text
    assert weights(module).isfinite().all()
    assert torch.equal(weights(module), module.before[int(batch[1])])
    assert not module.training


def test_minus_infinity_in_validation_is_never_the_best():
    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = nn.Parameter(torch.tensor(2.0))

        def forward(self):
            return dist.Uniform(0.0, self.width, validate_args=False)

    result = quiet(
        Uniform(), torch.rand(8), validation=torch.full((4,), 5.0), epochs=30, patience=4, schedule=keep_rate
    )
    assert result.validation == [-math.inf] * 4 and result.best_epoch == -1


# --- errors -----------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result, self.scale = result, nn.Parameter(torch.ones(()))

    def forward(self):
        return self.result(self.scale)


class Empty(IterableDataset):
    def __iter__(self):
        return iter(())


Y, X = torch.zeros(8), torch.zeros(8, 2)
ROWS = torch.zeros(8, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: quiet(Gaussian(), ROWS, epochs=0), "Expected epochs to be an integer >= 1; got 0."),
        (lambda: quiet(Gaussian(), ROWS, batch_size=0), "Expected batch_size to be an integer >= 1; got 0."),
        (lambda: quiet(Gaussian(), ROWS, batch_size=2.5), "Expected batch_size to be an integer >= 1; got 2.5."),
        (lambda: quiet(Gaussian(), ROWS, patience=0), "Expected patience to be an integer >= 1; got 0."),
        (lambda: quiet(Gaussian(), ROWS, lr=0.0), "Expected lr to be positive and finite; got 0.0."),
        (lambda: quiet(Gaussian(), ROWS, lr=math.nan), "Expected lr to be positive and finite; got nan."),
        (lambda: quiet(Gaussian(), ROWS, lr=math.inf), "Expected lr to be positive and finite; got inf."),
        (
            lambda: quiet(Gaussian(), ROWS, lr=0.1, optimizer=torch.optim.SGD),
            "Expected lr=None with an optimizer, which has its own learning rate; got 0.1.",
        ),
        (lambda: quiet(Gaussian(), ROWS, max_grad_norm=0), "Expected max_grad_norm > 0; got 0."),
        (lambda: quiet(lambda: None, ROWS), "Expected module to be a torch.nn.Module; got function."),
        (lambda: quiet(nn.Identity(), ROWS), "Expected module to have trainable parameters; got none."),
        (
            lambda: quiet(nn.LazyLinear(3), ROWS),
            "Expected module with initialised parameters; got lazy ones. Call it once on a few rows first.",
        ),
        (
            lambda: quiet(Gaussian().requires_grad_(False), ROWS),
            "Expected module to have trainable parameters; got none.",
        ),
        (
            lambda: quiet(Gaussian(), ROWS.tolist()),
            "Expected data to be a tensor, an array, a table, a Dataset or a DataLoader; got list.",
        ),
        (
            lambda: quiet(Gaussian(), Empty()),
            "Expected data with at least one row; got a loader without batches.",
        ),
        (lambda: quiet(Gaussian(), ROWS[:0]), "Expected data with at least one row; got shape (0, 3)."),
        (lambda: quiet(Gaussian(), ROWS[0, 0]), "Expected data with at least one row; got shape ()."),
        (
            lambda: quiet(Gaussian(), TensorDataset(ROWS[:0])),
            "Expected data with at least one row; got an empty Dataset.",
        ),
        (
            lambda: quiet(Gaussian(), TensorDataset(ROWS, ROWS, ROWS)),
            "Expected items of data to be a row or (row, context); got 3 parts.",
        ),
        (lambda: quiet(Linear(), Y, X[:7]), "Expected context.shape[0] == 8 (rows of data); got (7, 2)."),
        (
            lambda: quiet(Keywords(), Y, {"x": X, "lengths": Y[:5]}),
            "Expected context['lengths'].shape[0] == 8 (rows of data); got (5,).",
        ),
        (lambda: quiet(Linear(), Y, X.tolist()), "Expected context to be a tensor; got list."),
        (
            lambda: quiet(Linear(), TensorDataset(Y, X), X),
            "Expected context=None with a Dataset, whose items may be (row, context); got Tensor.",
        ),
        (
            lambda: quiet(Gaussian(), ROWS, validation=torch.zeros(5, 4)),
            "Expected validation.shape[1:] == (3,) (that of data); got (4,).",
        ),
        (
            lambda: quiet(Linear(), Y, X, validation=Y),
            "Expected validation with a context (as data has), e.g. as (data, context); got no context.",
        ),
        (
            lambda: quiet(Gaussian(), ROWS, validation=(ROWS, X)),
            "Expected validation with no context (as data has), e.g. as (data, context); got a context.",
        ),
        (
            lambda: quiet(Linear(), Y, X, validation=(Y, X[:3])),
            "Expected validation context.shape[0] == 8 (rows of validation); got (3, 2).",
        ),
        (
            lambda: quiet(Linear(), Y, X, validation=(Y, X, X)),
            "Expected validation to be a (data, context) pair; got 3 parts.",
        ),
        (
            lambda: quiet(Gaussian(), ROWS, validation=1.5),
            "Expected 0 < validation < 1 (a fraction of data); got 1.5.",
        ),
        (
            lambda: quiet(Gaussian(), ROWS, validation=0),
            "Expected 0 < validation < 1 (a fraction of data); got 0.",
        ),
        (
            lambda: quiet(Gaussian(), ROWS, validation=0.01),
            "Expected validation to leave rows in both parts; got 0.01 of 8 rows.",
        ),
        (lambda: quiet(Wrong(lambda s: s), ROWS), "Expected module to return a distribution; got Parameter."),
        (
            lambda: quiet(Wrong(lambda s: dist.Normal(0.0, s)), ROWS),
            "Expected log_prob.shape == (8,), one value per row; got (8, 3). Declare event dims with .to_event; "
            "a distribution over scalars takes data of shape (N,).",
        ),
    ],
)
def test_error_texts(call, text):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == text


def test_rows_are_named_only_where_one_alone_fails():
    class Normed(Linear):
        def forward(self, x):
            return super().forward(nn.functional.batch_norm(x, None, None, training=True) if self.training else x)

    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel.*\nRaised at epoch 0, batch 1\.$"):
        quiet(Normed(), Y[:3], X[:3], batch_size=2)


def test_a_value_outside_the_support_is_named():
    class Positive(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones(()))

        def forward(self):
            return dist.Exponential(self.rate, validate_args=True)

    assert Positive()().support is constraints.nonnegative
    data = torch.ones(20)
    data[13] = -1
    with pytest.raises(ValueError, match=r"Raised at epoch 0, batch \d, first in rows \[13\]\.$"):
        quiet(Positive(), data, batch_size=8)
    with pytest.raises(ValueError, match=r"Raised at epoch 0, validation, first in rows \[13\]\.$"):
        quiet(Positive(), data.abs(), validation=data, batch_size=8)
