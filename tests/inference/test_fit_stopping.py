"""``gx.fit``: validation, early stopping and interrupts."""

from __future__ import annotations

import pytest
import torch

from support.regressions import Gaussian, Linear, gaussian_rows, keep_rate, quiet, regression_rows, weights


def test_early_stopping_restores_the_best_weights():
    y, x = regression_rows(60)
    held_out = (y[40:] + 0.4, x[40:])  # of another bias, so that the path passes its optimum
    module = Linear()
    result = quiet(
        module, y[:40], x[:40], validation=held_out, epochs=500, patience=3, lr=0.1, batch_size=16, schedule=keep_rate
    )
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
    result = quiet(module, y[:40], x[:40], validation=held_out, lr=0.3, patience=100, batch_size=40, schedule=keep_rate)
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
