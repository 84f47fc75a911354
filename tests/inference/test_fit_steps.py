"""``gx.fit``: row weights, accumulated gradients, averaged weights, the default rule, budgets, penalties, L-BFGS."""

from __future__ import annotations

import functools
import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_genexact as gx
from support.regressions import Gaussian, Linear, gaussian_rows, keep_rate, quiet, regression_rows, weights

sgd = functools.partial(torch.optim.SGD, lr=0.1)


# --- weights, steps, averages -----------------------------------------------------------------------------


def test_weights_of_rows_are_numbers_of_copies():
    data = gaussian_rows(60)
    counts = torch.arange(60) % 3
    one, other = Gaussian(), Gaussian()
    quiet(one, data, weights=counts, epochs=200, lr=0.05)
    quiet(other, data.repeat_interleave(counts, 0), epochs=200, lr=0.05)
    torch.testing.assert_close(weights(one), weights(other))


def test_nats_with_weights_are_weighted_means_on_both_sides_of_a_split():
    data = torch.ones(40, 3, dtype=torch.float64)
    nats = Gaussian()().log_prob(data[0]).item()
    result = quiet(
        Gaussian(),
        data,
        weights=torch.arange(40) ** 4,
        validation=0.5,
        epochs=1,
        optimizer=functools.partial(torch.optim.SGD, lr=1e-9),
    )
    assert (result.train[0], result.validation[0]) == pytest.approx((nats, nats), rel=1e-6)
    with pytest.raises(
        ValueError,
        match=r"^Expected positive weights in both parts of the split; got a part with weights 0 alone for validation=0.5.",
    ):
        quiet(Gaussian(), data, weights=torch.arange(40) == 3, validation=0.5)


def test_nats_are_not_rounded_to_the_dtype_of_the_weights():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))

        def forward(self):
            return dist.Normal(self.loc.float(), 1.0)

    data = torch.linspace(0.0, 1.0, 7)
    result = quiet(Half(), data, epochs=1)
    assert result.train[0] == pytest.approx(dist.Normal(0.0, 1.0).log_prob(data).mean().item(), abs=1e-6)


def test_rows_of_weight_zero_may_be_impossible():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones(()))

        def forward(self):
            return dist.Uniform(0.0, 4.0 * self.rate, validate_args=False)

    module = Half()
    result = quiet(module, torch.tensor([1.0, 9.0]), weights=[1.0, 0.0], epochs=1, optimizer=sgd)
    assert result.train[0] == pytest.approx(-math.log(4.0))


def test_accumulated_batches_are_one_step():
    data = gaussian_rows()
    one, other = Gaussian(), Gaussian()
    options = {
        "epochs": 3,
        "optimizer": sgd,
        "schedule": keep_rate,
        "penalty": lambda module: 0.1 * module.loc.square().sum(),
    }
    result = quiet(one, data, batch_size=30, accumulate=3, **options)
    assert quiet(other, data, batch_size=90, **options).steps == result.steps == 9
    torch.testing.assert_close(weights(one), weights(other))


def test_averages_are_validated_too_and_the_better_weights_kept():
    data, decay = gaussian_rows(), 0.8
    path, module = [], Gaussian()

    class Watched(torch.optim.SGD):
        def step(self):
            super().step()
            path.append(torch.cat([p.detach().flatten().clone() for g in self.param_groups for p in g["params"]]))

    options = {"epochs": 8, "batch_size": 20, "optimizer": functools.partial(Watched, lr=0.7), "schedule": keep_rate}
    result = quiet(module, data, validation=data, ema=decay, **options)
    average, candidates = path[0], []
    for step, values in enumerate(path, start=1):
        average = average.lerp(values, max(1 - decay, 1 / step))
        if step % 10 == 0:
            candidates += [values, average]
    other, nats = Gaussian(), []
    for values in candidates:
        nn.utils.vector_to_parameters(values, other.parameters())
        nats.append(other().log_prob(data).mean().item())
    best = max(range(16), key=nats.__getitem__)
    assert result.validation == pytest.approx([max(pair) for pair in zip(nats[::2], nats[1::2], strict=True)])
    torch.testing.assert_close(weights(module), candidates[best])
    assert result.best_epoch == best // 2 and any(b > a for a, b in zip(nats[::2], nats[1::2], strict=True))
    plain = Gaussian()
    quiet(plain, data, ema=decay, **options)  # without validation the last averages are kept
    torch.testing.assert_close(weights(plain), candidates[-1])


class Scaled(PyroModule):
    """Normal with a PyroParam, which Pyro's store knows by name."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        self.count = nn.Parameter(torch.tensor(3), requires_grad=False)

    def forward(self):
        return dist.Normal(0.0, self.scale)


def test_averages_of_pyro_parameters():
    pyro.clear_param_store()
    path, data = [], 1.3 * torch.tensor([-1.0, 1.0])

    class Watched(torch.optim.SGD):
        def step(self):
            super().step()
            path.append(self.param_groups[0]["params"][0].item())

    options = {"optimizer": functools.partial(Watched, lr=1.0), "schedule": keep_rate}
    result = quiet(Scaled(), data, epochs=4, validation=data, ema=0.9, **options)
    means = [sum(path[:n]) / n for n in range(1, 5)]
    nats = [[dist.Normal(0.0, math.exp(u)).log_prob(data).mean().item() for u in us] for us in (path, means)]
    assert result.validation == pytest.approx([max(pair) for pair in zip(*nats, strict=True)], abs=1e-6)
    assert nats[1][-1] > nats[0][-1] + 0.01
    with pytest.raises(
        ValueError, match=r"^Expected module to keep its parameters; its forward created or replaced \['scale"
    ):
        quiet(Scaled(), data)  # Pyro's store gives it the scale of the first
    pyro.clear_param_store()


def test_the_rule_goes_back_to_the_best_drops_once_and_ends():
    y, x = regression_rows()
    rates, seen = [], []

    class Watched(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            seen.append(torch.cat([p.detach().flatten().clone() for g in self.param_groups for p in g["params"]]))
            super().step()

    module = Linear()
    far, nearer = (y + 2.0, x), y + 4.0  # the optimum of the validation is on the way of the bias
    options = {"optimizer": functools.partial(Watched, lr=0.1), "patience": 30, "batch_size": 40}
    result = quiet(module, nearer, x, validation=far, **options)
    assert result.stopped == "flat" and result.best_epoch < 150
    drops = [step for step in range(1, len(rates)) if rates[step] < rates[step - 1]]
    assert len(drops) == 1 and rates[drops[0]] == pytest.approx(0.01) and rates[99] == pytest.approx(0.1)
    again = module(x).log_prob(far[0]).mean().item()
    assert again == pytest.approx(max(result.validation))
    assert (seen[drops[0]] - weights(module)).norm() < (seen[drops[0] - 1] - weights(module)).norm()


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"patience": 10}, 21),  # the first epoch, and the patience at each of two rates
        ({"batch_size": 2}, 21),  # 20 steps an epoch: ten epochs by default
        ({"batch_size": 10}, 101),  # 4 steps an epoch: 200 steps
        ({"batch_size": 10, "schedule": keep_rate}, 21),  # twenty epochs at the user's rate
    ],
)
def test_patience(options, epochs):
    y, x = regression_rows()
    never = functools.partial(torch.optim.SGD, lr=1e-30)
    with pytest.warns(UserWarning, match=r"did not improve after the first epoch. Check the scales"):
        result = quiet(Linear(), y, x, validation=(y, x), optimizer=never, **options)
    assert (result.stopped, len(result.validation), result.best_epoch) == ("flat", epochs, 0)


def test_default_rates():
    """Adam's first step is as long as its rate, which then is a hundredth of the full one."""
    y, x = regression_rows()
    for validation, rate in ((None, 1e-3), ((y, x), 3e-3)):
        module = Linear()
        assert quiet(module, y, x, validation=validation, epochs=1, batch_size=40).steps == 1
        torch.testing.assert_close(weights(module).abs(), torch.full((3,), rate / 100), rtol=1e-3, atol=0)


def test_small_data_with_validation_get_small_batches():
    sizes, validated = [], []

    class Seeing(Linear):
        def forward(self, x):
            (sizes if self.training else validated).append(len(x))
            return super().forward(x)

    for rows, options, expected in [
        (100, {"validation": 0.2}, 32),
        (2048, {"validation": 0.5}, 32),
        (4096, {"validation": 0.5}, 64),
        (20000, {"validation": 0.1}, 256),
        (1000, {}, 256),
        (1000, {"validation": 0.2, "batch_size": 7}, 7),
    ]:
        quiet(Seeing(), torch.zeros(rows), torch.zeros(rows, 2), epochs=1, **options)
        assert sizes[0] == expected
        if options.get("validation"):
            assert validated[0] == min(round(rows * options["validation"]), options.get("batch_size", 256))
        sizes.clear()
        validated.clear()


def test_seconds_end_a_fit_and_its_rate():
    rates = []

    class Slow(torch.optim.SGD):
        def step(self):
            time.sleep(0.01)
            rates.append(self.param_groups[0]["lr"])
            super().step()

    y, x = regression_rows()
    result = quiet(
        Linear(), y, x, validation=(y, x), seconds=0.5, batch_size=8, optimizer=functools.partial(Slow, lr=0.1)
    )
    assert result.stopped == "seconds" and 0.5 <= result.seconds < 1.5
    assert max(rates) == 0.1 and rates[-1] < 0.01 and len(result.train) == len(result.validation)


def test_seconds_of_validation_count():
    class Slow(Linear):
        def forward(self, x):
            time.sleep(0.0 if self.training else 0.1)
            return super().forward(x)

    y, x = regression_rows()
    result = quiet(Slow(), y, x, validation=(y, x), seconds=0.09, ema=0)
    assert (result.stopped, len(result.validation), result.best_epoch) == ("seconds", 1, 0)


def test_progress_within_an_epoch(capsys, monkeypatch):
    monkeypatch.setattr("pyro_genexact.inference.fitting.PATIENCE", 0.0)
    y, x = regression_rows()
    gx.fit(Linear(), y, x, epochs=1, batch_size=10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["0.25/1", "0.50/1", "0.75/1", "1/1"]
    assert all(line.endswith("nats so far") for line in lines[:3])


# --- L-BFGS, penalties ------------------------------------------------------------------------------------

lbfgs = functools.partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=50)


def test_lbfgs_reaches_the_optimum_over_batches_of_one_step():
    data, module = gaussian_rows(), Gaussian()
    result = quiet(module, data, batch_size=64, accumulate=4, optimizer=lbfgs)
    assert result.stopped == "flat" and result.steps < 10
    torch.testing.assert_close(module().mean.detach(), data.mean(0), rtol=0, atol=1e-4)
    covariance = torch.cov(data.T, correction=0)
    torch.testing.assert_close(module().covariance_matrix.detach(), covariance, rtol=0, atol=1e-3)


def test_penalty_is_the_prior_of_ridge_regression():
    y, x = (t.double() for t in regression_rows())
    module = Linear().double()
    quiet(module, y, x, optimizer=lbfgs, penalty=lambda m: 3.0 * (m.weight @ m.weight) / (2 * len(y)))
    ones = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    ridge = torch.linalg.solve(ones.T @ ones + torch.diag(torch.tensor([3.0, 3.0, 0.0])), ones.T @ y)
    torch.testing.assert_close(torch.cat([module.weight, module.bias[None]]).detach(), ridge, rtol=0, atol=1e-5)


def test_lbfgs_leaves_the_weights_of_a_step_that_is_not_finite():
    y, x = regression_rows()

    class Broken(Linear):
        def forward(self, x):
            loc = super().forward(x).loc
            return dist.Normal(loc * math.nan if self.weight.norm() > 0 else loc, 1.0, validate_args=False)

    module = Broken()
    with pytest.raises(FloatingPointError, match="Expected a finite loss; got nan at epoch 0, batch 0"):
        quiet(module, y, x, optimizer=lbfgs)
    assert weights(module).norm() == 0


@pytest.mark.parametrize("max_grad_norm", [math.inf, 0.01])
def test_sparse_gradients_are_those_of_dense_ones(max_grad_norm):
    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.loc = nn.Embedding.from_pretrained(torch.zeros(5, 1), freeze=False, sparse=sparse)

        def forward(self, word):
            return dist.Normal(self.loc(word)[:, 0], 1.0)

    word = torch.arange(40) % 4
    ends = []
    for sparse in (True, False):
        module = Words(sparse)
        quiet(module, torch.arange(40.0), word, epochs=3, batch_size=16, optimizer=sgd, max_grad_norm=max_grad_norm)
        ends.append(weights(module))
    torch.testing.assert_close(*ends)
    assert ends[0].norm() > 0


def test_a_log_prob_without_parameters():
    class Fixed(Linear):
        def forward(self, x):
            return dist.Normal(x.sum(-1), 1.0)

    with pytest.raises(ValueError, match="Expected log_prob to depend on parameters of module"):
        quiet(Fixed(), *regression_rows())


def test_a_fit_that_diverges_warns():
    y, x = regression_rows()
    with pytest.warns(UserWarning, match=r"The fit diverged: -.* nats in the last epoch, -.* nats in the first step"):
        quiet(Linear(), y, x, optimizer=functools.partial(torch.optim.SGD, lr=3.0), schedule=keep_rate, epochs=5)
