"""``gx.fit``: its optimum, its gradient against Pyro's SVI, random numbers, modes, data, what it prints."""

from __future__ import annotations

import functools
import math
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, TensorDataset

import pyro_genexact as gx
from support.regressions import Gaussian, Keywords, Linear, gaussian_rows, keep_rate, quiet, regression_rows, weights


class Pairs(Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, row):
        items = [{k: v[row] for k, v in c.items()} if isinstance(c, dict) else c[row] for c in self.columns]
        return items[0] if len(items) == 1 else tuple(items)


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
    rates = []

    class Watched(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    quiet(Linear(), y, x, epochs=10, batch_size=16, optimizer=functools.partial(Watched, lr=0.1))
    rise = [max((step + 1) / 100, step / 3) for step in range(30)]
    fall = [0.5 * (1 + math.cos(math.pi * max(0, 1 - (1 - step / 30) / 0.3))) for step in range(30)]
    assert rates == pytest.approx([0.1 * min(1, a) * b for a, b in zip(rise, fall, strict=True)])
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


def test_modes_are_set_and_restored():
    y, x = regression_rows()
    module = Linear(dropout=0.1).train()
    module.dropout.eval()
    quiet(module, y, x, validation=(y, x), epochs=2, batch_size=40)
    assert module.modes == [True, False, False, True, False, False]  # the averages of its weights are validated too
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
    threads = threading.active_count()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    gx.fit(Linear(), y, x, validation=0.25, epochs=3)
    shown = capsys.readouterr().err
    assert "\r" in shown and "3/3" in shown and "validation" in shown and "epochs:" not in shown
    gx.fit(Linear(), y, x, epochs=3, progress=False)
    assert capsys.readouterr().err == "" and threading.active_count() == threads


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
