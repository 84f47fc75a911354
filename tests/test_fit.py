"""``gx.fit``: its optimum, its gradient against Pyro's SVI, its promises, its error texts."""

from __future__ import annotations

import functools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import pyro_genexact as gx


class Gaussian(nn.Module):
    """Full-covariance Gaussian over rows of D numbers."""

    def __init__(self, features=3):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(features, dtype=torch.float64))
        self.raw = nn.Parameter(torch.zeros(features, features, dtype=torch.float64))

    def forward(self):
        return dist.MultivariateNormal(self.loc, scale_tril=self.raw.tril(-1) + self.raw.diagonal().exp().diag())


class Linear(nn.Module):
    """y ~ Normal(x w + b, 1), with dropout where asked; remembers the contexts it was called with."""

    def __init__(self, features=2, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return dist.Normal(self.dropout(x) @ self.weight + self.bias, 1.0, validate_args=False)


class Keywords(Linear):
    """The same with a second input that says how many entries of x count."""

    def forward(self, x, lengths):
        return super().forward(x * (torch.arange(x.shape[-1]) < lengths[:, None]))


class Pairs(Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, row):
        items = [{k: v[row] for k, v in c.items()} if isinstance(c, dict) else c[row] for c in self.columns]
        return items[0] if len(items) == 1 else tuple(items)


quiet = functools.partial(gx.fit, progress=False)


def keep_rate(optimizer, total_steps):
    return LambdaLR(optimizer, lambda step: 1.0)


def gaussian_rows(n=200, features=3):
    torch.manual_seed(1)
    mix = torch.randn(features, features, dtype=torch.float64) + 2 * torch.eye(features)
    return torch.randn(n, features, dtype=torch.float64) @ mix.T + torch.arange(features)


def regression_rows(n=40):
    torch.manual_seed(2)
    x = torch.randn(n, 2)
    return x @ torch.tensor([1.0, -2.0]) + 0.5 + torch.randn(n), x


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def assert_optimum(module, data, tolerance):
    """Mean and covariance of the data are the maximum-likelihood ones."""
    torch.testing.assert_close(module().mean.detach(), data.mean(0), rtol=0, atol=tolerance)
    covariance = torch.cov(data.T, correction=0)
    torch.testing.assert_close(module().covariance_matrix.detach(), covariance, rtol=0, atol=tolerance)


# --- what is maximised ------------------------------------------------------------------------------------


def test_reaches_the_closed_form_optimum():
    data, module = gaussian_rows(), Gaussian()
    result = quiet(module, data, epochs=400, lr=0.1, batch_size=len(data))
    assert_optimum(module, data, 1e-4)
    assert result.train[-1] == pytest.approx(module().log_prob(data).mean().item(), abs=1e-6)


def test_reaches_the_optimum_by_minibatches():
    data, module = gaussian_rows(), Gaussian()
    quiet(module, data, epochs=100, lr=0.05, batch_size=40)
    assert_optimum(module, data, 0.15)


def test_gradient_is_that_of_svi():
    """A step of SGD with rate 1 moves the weights by the gradient of the ELBO of a subsampled plate."""
    data, ours, theirs = gaussian_rows(), Gaussian(), Gaussian()
    for module in (ours, theirs):
        nn.init.constant_(module.raw, 0.2)
    before = weights(ours)
    order = []

    class Watched(Pairs):
        def __getitem__(self, row):
            order.append(row)
            return super().__getitem__(row)

    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    quiet(
        ours,
        Watched(data),
        epochs=1,
        batch_size=120,
        optimizer=sgd,
        schedule=keep_rate,
        max_grad_norm=math.inf,
    )
    for rows in (torch.tensor(order[:120]), torch.tensor(order[120:])):

        def model(rows=rows):
            pyro.module("theirs", theirs)
            with pyro.plate("data", len(data), subsample=rows):
                pyro.sample("y", theirs(), obs=data[rows])

        theirs.zero_grad()
        pyro.clear_param_store()
        pyro.infer.Trace_ELBO().loss_and_grads(model, lambda: None)
        with torch.no_grad():
            for p in theirs.parameters():
                p -= p.grad / len(data)
    assert sorted(order) == list(range(len(data))) and order != sorted(order)
    assert (weights(theirs) - before).norm() > 0.1
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_svi_reaches_the_same_optimum():
    data, ours, theirs = gaussian_rows(), Gaussian(), Gaussian()
    quiet(ours, data, epochs=300, lr=0.1, batch_size=len(data))

    def model():
        pyro.module("theirs", theirs)
        with pyro.plate("data", len(data)):
            pyro.sample("y", theirs(), obs=data)

    pyro.clear_param_store()
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99, "clip_norm": 1e9})
    svi = pyro.infer.SVI(model, lambda: None, optimizer, pyro.infer.Trace_ELBO())
    for _ in range(500):
        svi.step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=5e-3)


def test_clips_the_gradient():
    data, module = gaussian_rows(), Gaussian()
    sgd = functools.partial(torch.optim.SGD, lr=1.0)
    quiet(module, data, epochs=1, optimizer=sgd, schedule=keep_rate, max_grad_norm=0.01)
    assert weights(module).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_schedule_is_stepped_once_a_batch_and_anneals_to_zero():
    y, x = regression_rows(40)
    made = []

    def sgd(params):
        made.append(torch.optim.SGD(params, lr=0.1))
        return made[-1]

    quiet(Linear(), y, x, epochs=3, batch_size=16, optimizer=sgd)
    assert made[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    totals, steps = [], []

    def schedule(optimizer, total):
        totals.append(total)
        return LambdaLR(optimizer, lambda step: steps.append(step) or 1.0)

    quiet(Linear(), y, x, epochs=3, batch_size=16, schedule=schedule)
    assert totals == [9] and steps == list(range(10))


# --- seeds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_seed_fixes_the_weights_and_leaves_the_global_state(dropout):
    y, x = regression_rows()

    def train(seed):
        module = Linear(dropout=dropout)
        quiet(module, y, x, epochs=3, lr=0.1, batch_size=8, seed=seed, validation=0.25)
        return weights(module)

    first = train(0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(train(0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(train(1), first)


def test_default_device_does_not_matter():
    y, x = regression_rows()
    plain, other = Linear(), Linear()
    train = functools.partial(quiet, data=y, context=x, validation=0.25, epochs=2, batch_size=16)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    train(plain, optimizer=sgd)
    with torch.device("meta"):  # a factory call that names no device would meet real tensors, and raise
        train(other, optimizer=sgd)
    assert torch.equal(weights(plain), weights(other))


def test_fit_restores_the_random_state_of_its_device(device):
    y, x = regression_rows()
    modules = [Linear(dropout=0.5).to(device) for _ in range(2)]
    read = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    state = read()
    for module, rows in zip(modules, [(y, x), (y.to(device), x)], strict=True):
        quiet(module, *rows, epochs=2, batch_size=16, validation=0.25)
    assert torch.equal(read(), state)
    assert torch.equal(weights(modules[0]), weights(modules[1]))


# --- validation, early stopping, interruption -------------------------------------------------------------


def test_early_stopping_restores_the_best_weights():
    y, x = regression_rows(60)
    held_out = (y[40:] + 0.4, x[40:])  # of another bias, so that the path passes its optimum
    module = Linear()
    result = quiet(module, y[:40], x[:40], validation=held_out, epochs=500, patience=3, lr=0.1, batch_size=16)
    assert len(result.train) == len(result.validation) < 500
    assert len(result.validation) == result.best_epoch + 1 + 3
    assert result.validation[result.best_epoch] == max(result.validation) > result.validation[-1]
    again = module(held_out[1]).log_prob(held_out[0]).mean().item()
    assert again == pytest.approx(max(result.validation), abs=1e-6)


def test_without_validation_the_last_weights_stay():
    data = gaussian_rows()
    result = quiet(Gaussian(), data, epochs=30, patience=1)
    assert len(result.train) == 30 and result.validation == [] and result.best_epoch == 29
    assert result.seconds > 0 and not result.interrupted


def test_fraction_holds_rows_out():
    seen = {True: set(), False: set()}

    class Watching(Linear):
        def forward(self, x):
            seen[self.training].update(x[:, 0].tolist())
            return super().forward(x)

    x = torch.stack([torch.arange(20.0), torch.zeros(20)], -1)
    quiet(Watching(), torch.zeros(20), x, validation=0.3, epochs=2, batch_size=4)
    assert len(seen[False]) == 6 and len(seen[True]) == 14 and not seen[True] & seen[False]
    assert sorted(seen[False]) != list(range(6)) and sorted(seen[False]) != list(range(14, 20))


class Interrupted(Linear):
    """Moves away from its best at a known call, then is interrupted."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 25:
            raise KeyboardInterrupt
        return super().forward(x)


def test_interrupt_keeps_the_best_weights():
    y, x = regression_rows(60)
    module = Interrupted()
    held_out = (y[40:] + 0.4, x[40:])
    result = quiet(module, y[:40], x[:40], validation=held_out, lr=0.3, patience=100, schedule=keep_rate)
    assert result.interrupted and len(result.train) == len(result.validation) == 12
    assert result.best_epoch < 11
    again = Linear.forward(module, held_out[1]).log_prob(held_out[0]).mean().item()
    assert again == pytest.approx(max(result.validation), abs=1e-6)


def test_interrupt_without_validation_keeps_the_last_weights():
    y, x = regression_rows()
    module, whole = Interrupted(), Linear()
    result = quiet(module, y, x, epochs=40, batch_size=len(y), schedule=keep_rate)
    quiet(whole, y, x, epochs=25, batch_size=len(y), schedule=keep_rate)
    assert result.interrupted and len(result.train) == 25 and result.best_epoch == 24
    assert torch.equal(weights(module), weights(whole))
    assert module.training


def test_modes_are_set_and_restored():
    y, x = regression_rows()
    module = Linear(dropout=0.1).train()
    module.dropout.eval()
    quiet(module, y, x, validation=(y, x), epochs=2)
    assert module.modes == [True, False, True, False]
    assert module.training and not module.dropout.training
    quiet(module.eval(), y, x, epochs=1)
    assert not module.training


def test_frozen_parameters_stay():
    y, x = regression_rows()
    module = Linear()
    module.bias.requires_grad_(False)
    quiet(module, y, x, epochs=2)
    assert module.bias.item() == 0 and module.weight.abs().min() > 0
    assert all(p.grad is None for p in module.parameters())


# --- data, context ----------------------------------------------------------------------------------------


def test_batch_larger_than_data():
    y, x = regression_rows(5)
    module = Linear()
    quiet(module, y, x, epochs=4, batch_size=1000)
    assert len(module.modes) == 4


def test_dict_context_is_passed_row_by_row():
    y, x = regression_rows()
    lengths = torch.arange(len(y)) % 3
    masked = x * (torch.arange(2) < lengths[:, None])
    by_name, by_hand = Keywords(), Linear()
    quiet(by_name, y, {"x": x, "lengths": lengths}, epochs=3, batch_size=16, validation=0.25)
    quiet(by_hand, y, masked, epochs=3, batch_size=16, validation=0.25)
    assert torch.equal(weights(by_name), weights(by_hand)) and weights(by_hand).abs().min() > 0


@pytest.mark.parametrize("kind", ["rows", "TensorDataset", "tensor context", "dict context"])
def test_datasets_give_the_weights_of_tensors(kind):
    y, x = regression_rows()
    named = {"x": x, "lengths": torch.arange(len(y)) % 3}
    make, columns, dataset = {
        "rows": (Gaussian, (gaussian_rows(),), Pairs(gaussian_rows())),
        "TensorDataset": (Gaussian, (gaussian_rows(),), TensorDataset(gaussian_rows())),
        "tensor context": (Linear, (y, x), TensorDataset(y, x)),
        "dict context": (Keywords, (y, named), Pairs(y, named)),
    }[kind]
    one, other = make(), make()
    first = quiet(one, *columns, epochs=3, batch_size=16, validation=0.25)
    second = quiet(other, dataset, epochs=3, batch_size=16, validation=0.25)
    assert torch.equal(weights(one), weights(other)) and weights(one).norm() > 0
    assert first.validation == second.validation
    held_out = columns if len(columns) == 2 else columns[0]
    assert (
        quiet(make(), *columns, validation=held_out, epochs=2).validation
        == quiet(make(), dataset, validation=dataset, epochs=2).validation
    )


def test_integer_data():
    class Coin(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(2))

        def forward(self):
            return dist.Categorical(logits=self.logits)

    module = Coin()
    quiet(module, torch.tensor([1, 1, 1, 0]), lr=0.1)
    assert module().probs[1].item() == pytest.approx(0.75, abs=0.01)


def test_context_with_a_graph_is_not_trained_through():
    y, x = regression_rows()
    encoder = nn.Linear(2, 2)
    module = Linear()
    quiet(module, y, encoder(x), epochs=2)
    assert encoder.weight.grad is None and module.weight.abs().min() > 0


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

    result = quiet(Uniform(), torch.rand(8), validation=torch.full((4,), 5.0), epochs=30, patience=4)
    assert result.validation == [-math.inf] * 4 and result.best_epoch == -1


# --- errors -----------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result, self.scale = result, nn.Parameter(torch.ones(()))

    def forward(self):
        return self.result(self.scale)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


Y, X = torch.zeros(8), torch.zeros(8, 2)
ROWS = torch.zeros(8, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: quiet(Gaussian(), ROWS, epochs=0), "Expected epochs >= 1; got 0."),
        (lambda: quiet(Gaussian(), ROWS, batch_size=0), "Expected batch_size >= 1; got 0."),
        (lambda: quiet(Gaussian(), ROWS, patience=0), "Expected patience >= 1; got 0."),
        (lambda: quiet(Gaussian(), ROWS, lr=0.0), "Expected lr positive and finite; got 0.0."),
        (lambda: quiet(Gaussian(), ROWS, lr=math.nan), "Expected lr positive and finite; got nan."),
        (lambda: quiet(Gaussian(), ROWS, lr=math.inf), "Expected lr positive and finite; got inf."),
        (
            lambda: quiet(Gaussian(), ROWS, lr=0.1, optimizer=torch.optim.SGD),
            "Expected lr=None with an optimizer (which brings its own); got 0.1.",
        ),
        (lambda: quiet(Gaussian(), ROWS, max_grad_norm=0), "Expected max_grad_norm > 0; got 0."),
        (lambda: quiet(lambda: None, ROWS), "Expected module to be a torch.nn.Module; got function."),
        (lambda: quiet(nn.Identity(), ROWS), "Expected module to have trainable parameters; got none."),
        (
            lambda: quiet(Gaussian().requires_grad_(False), ROWS),
            "Expected module to have trainable parameters; got none.",
        ),
        (
            lambda: quiet(Gaussian(), ROWS.tolist()),
            "Expected data to be a tensor or a map-style Dataset; got list.",
        ),
        (
            lambda: quiet(Gaussian(), Endless()),
            "Expected data to be a tensor or a map-style Dataset; got Endless.",
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
            "Expected context=None with a Dataset (its items may be (row, context)); got one.",
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
            "Expected validation to leave rows on both sides; got 0.01 of 8 rows.",
        ),
        (lambda: quiet(Wrong(lambda s: s), ROWS), "Expected module to return a distribution; got Parameter."),
        (
            lambda: quiet(Wrong(lambda s: dist.Normal(0.0, s)), ROWS),
            "Expected log_prob.shape == (8,), a value a row (do event dims lack .to_event?); got (8, 3).",
        ),
    ],
)
def test_error_texts(call, text):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == text


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
    with pytest.raises(ValueError, match=r"Met at epoch 0, batch \d, first in rows \[13\]\.$"):
        quiet(Positive(), data, batch_size=8)
    with pytest.raises(ValueError, match=r"Met at epoch 0, validation, first in rows \[13\]\.$"):
        quiet(Positive(), data.abs(), validation=data, batch_size=8)


# --- what is shown ----------------------------------------------------------------------------------------


def test_log_lines(capsys):
    y, x = regression_rows()
    result = gx.fit(Linear(), y, x, validation=0.25, epochs=50, patience=50)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 10
    assert lines[-1] == (
        f"50/50 epochs: train {result.train[-1]:.4f} nats, validation {result.validation[-1]:.4f} nats"
    )
    gx.fit(Linear(), y, x, epochs=5, progress=False)
    assert capsys.readouterr().err == ""


def test_bar_in_a_terminal(capsys, monkeypatch):
    y, x = regression_rows()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    gx.fit(Linear(), y, x, validation=0.25, epochs=3)
    shown = capsys.readouterr().err
    assert "\r" in shown and "3/3" in shown and "validation" in shown and "epochs:" not in shown
    gx.fit(Linear(), y, x, epochs=3, progress=False)
    assert capsys.readouterr().err == ""


def test_plot_is_labelled():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    y, x = regression_rows()
    result = quiet(Linear(), y, x, validation=0.25, epochs=4)
    own = plt.figure().add_subplot()
    assert result.plot(own) is own and result.plot() is not own
    assert (own.get_xlabel(), own.get_ylabel()) == ("epoch", "nats")
    labels = [text.get_text() for text in own.get_legend().get_texts()]
    assert labels == ["train", "validation", f"best epoch: {result.best_epoch}"]
    assert own.lines[0].get_ydata() == pytest.approx(result.train)
    assert own.lines[1].get_ydata() == pytest.approx(result.validation)
    plt.close("all")
