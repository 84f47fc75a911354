"""Interrupts of ``gx.fit`` and ``gx.fit_guide``, by SIGINT and by KeyboardInterrupt, wherever they come.

A fit returns its history, with the weights that it promises, or raises before anything has changed.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.optim import SGD
from torch.utils.data import Dataset, get_worker_info

import pyro_genexact as gx
from pyro_genexact.inference import elbo, likelihood
from support.regressions import Linear, keep_rate, quiet, regression_rows, weights

Y, X = regression_rows(40)


def raised():
    raise KeyboardInterrupt


def signalled():
    signal.raise_signal(signal.SIGINT)


class At:
    """Interrupts at a call, counted from 1."""

    def __init__(self, call, how):
        self.call, self.how, self.calls = call, how, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.call:
            self.how()


def before(at, function):
    """The function, interrupted before it runs."""

    def run(*args, **kwargs):
        at()
        return function(*args, **kwargs)

    return run


def within(at, function):
    """The function, interrupted when it has run."""

    def run(*args, **kwargs):
        result = function(*args, **kwargs)
        at()
        return result

    return run


# --- fit --------------------------------------------------------------------------------------------------

OPTIONS = {"epochs": 8, "batch_size": 16, "optimizer": partial(SGD, lr=0.5), "schedule": keep_rate}  # 3 steps an epoch
VALIDATION = (Y + 1.0, X)


class Recording(SGD):
    """Remembers the weights after each step."""

    def __init__(self, params, lr, at=lambda: None):
        super().__init__(params, lr)
        self.at, self.seen = at, []

    def step(self, closure=None):
        super().step(closure)
        self.at()
        self.seen.append(torch.cat([p.detach().flatten() for p in self.param_groups[0]["params"]]).clone())


class Watched(Dataset):
    """Calls ``at`` for each row that is read."""

    def __init__(self, at):
        self.at = at

    def __len__(self):
        return 40

    def __getitem__(self, row):
        self.at()
        return Y[row], X[row]


def fit(module, at=lambda: None, data=(Y, X), **options):
    """The result of a fit, and the weights from the start on, step by step."""
    made = []

    def make(params):
        made.append(Recording(params, 0.5, at))
        return made[0]

    start = weights(module)
    result = quiet(module, *data, **{**OPTIONS, "optimizer": make, **options})
    return result, [start, *(made[0].seen if made else [])]


@pytest.mark.parametrize("how", [raised, signalled])
@pytest.mark.parametrize("call", [1, 2, 11])
@pytest.mark.parametrize("place", ["forward", "backward", "accumulate", "dataset", "closure"])
def test_in_a_step(place, call, how):
    """The weights are those of the last step."""
    module, at, options, data = Linear(), At(call, how), {}, (Y, X)
    if place == "backward":
        module.weight.register_hook(at)
    elif place == "dataset":
        data, at.call = (Watched(at),), 24 * call - 23
    else:
        module.register_forward_pre_hook(at)
    if place == "accumulate":
        options["accumulate"] = 2
    if place == "closure":
        options["optimizer"] = partial(torch.optim.LBFGS, max_iter=2)
    result, seen = fit(module, data=data, **options)
    assert result.interrupted and result.stopped == "interrupted"
    if place != "closure":
        assert len(seen) == result.steps + 1 and torch.equal(weights(module), seen[-1])
        each = 2 if place == "accumulate" else 3
        assert len(result.train) == result.steps // each and result.best_epoch == len(result.train) - 1
    assert all(p.grad is None for p in module.parameters()) and module.training


@pytest.mark.parametrize("call", [1, 2, 3, 11])
def test_within_the_step_of_the_optimizer(call):
    """It is taken to its end."""
    module = Linear()
    result, seen = fit(module, At(call, signalled))
    assert result.interrupted and result.steps == call and torch.equal(weights(module), seen[call])


@pytest.mark.parametrize("how", [raised, signalled])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_in_validation(call, how, monkeypatch):
    """The weights are the best of those that were validated, or those of the last step if none were."""
    module, whole, score = Linear(), Linear(), likelihood.MaximumLikelihood._score
    expected, _ = fit(whole, validation=VALIDATION)
    monkeypatch.setattr(likelihood.MaximumLikelihood, "_score", before(At(call, how), score))
    result, seen = fit(module, validation=VALIDATION)
    assert result.interrupted and result.steps == 3 * call
    assert result.train == expected.train[: call - 1] and result.validation == expected.validation[: call - 1]
    assert torch.equal(weights(module), seen[3 * (result.best_epoch + 1) if call > 1 else -1]) and module.training


@pytest.mark.parametrize("how", [raised, signalled])
def test_in_the_set_up_it_raises_and_nothing_changes(how):
    module = Linear()
    with pytest.raises(KeyboardInterrupt):
        quiet(module, Watched(how), validation=Watched(how), epochs=1)
    with pytest.raises(KeyboardInterrupt):
        quiet(module, Y, X, optimizer=lambda params: how())
    assert torch.equal(weights(module), torch.zeros(3)) and module.training


@pytest.mark.parametrize("wrap", [before, within])
@pytest.mark.parametrize("how", [raised, signalled])
def test_while_the_best_weights_are_loaded(how, wrap, monkeypatch):
    module = Linear()
    monkeypatch.setattr(module, "load_state_dict", wrap(At(1, how), module.load_state_dict))
    result, seen = fit(module, validation=VALIDATION)
    assert result.interrupted and 0 <= result.best_epoch < 7 and len(result.train) == 8
    assert torch.equal(weights(module), seen[3 * (result.best_epoch + 1)])


@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("how", [raised, signalled])
def test_while_a_checkpoint_is_written(how, call, tmp_path, monkeypatch):
    """The last one too: 4 of every 6 steps, and that of the end."""
    path, module, whole = tmp_path / "fit", Linear(), Linear()
    expected, _ = fit(whole)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", before(At(call, how), torch.save))
        result, seen = fit(module, checkpoint=path, every=6)
    assert result.interrupted and result.steps == 6 * call and torch.equal(weights(module), seen[-1])
    assert [file.name for file in tmp_path.iterdir()] == ["fit"] * (call > 1)
    again = Linear()
    result, _ = fit(again, checkpoint=path, every=6)
    assert result.train == expected.train and torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("how", [raised, signalled])
def test_while_a_checkpoint_is_loaded(how, tmp_path, monkeypatch):
    path, whole, module = tmp_path / "fit", Linear(), Linear()
    fit(whole, checkpoint=path)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", before(At(1, how), torch.load))
        with pytest.raises(KeyboardInterrupt):
            fit(module, checkpoint=path)
    assert torch.equal(weights(module), torch.zeros(3))
    if how is signalled:  # within the restoring, which is not cut in two
        monkeypatch.setattr(module, "load_state_dict", before(At(1, how), module.load_state_dict))
        result, _ = fit(module, checkpoint=path)
        assert result.interrupted and result.steps == 24 and torch.equal(weights(module), weights(whole))


def test_an_own_handler_is_called_and_an_ignored_signal_stays_ignored():
    came = []
    expected, _ = fit(Linear())
    for handler, calls in ((lambda number, frame: came.append(number), 1), (signal.SIG_IGN, 0)):
        old = signal.signal(signal.SIGINT, handler)
        try:
            result, _ = fit(Linear(), At(2, signalled))
        finally:
            signal.signal(signal.SIGINT, old)
        assert result.train == expected.train and len(came) == 1 and (calls or handler is signal.SIG_IGN)


def test_in_another_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(Linear(), checkpoint=tmp_path / "fit", every=2)))
    thread.start()
    thread.join()
    assert results[0][0].train == fit(Linear())[0].train


# --- fit_guide --------------------------------------------------------------------------------------------


def model(y=2.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.as_tensor(y))


def guide(y=2.0):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(1.0), dist.constraints.positive)))


guided = partial(gx.fit_guide, lr=0.03, steps=30, num_particles=2, progress=False)


@pytest.mark.parametrize("how", [raised, signalled])
@pytest.mark.parametrize("call", [1, 2, 12])
def test_in_a_step_of_fit_guide(how, call, monkeypatch):
    at = At(call, how)
    monkeypatch.setattr(elbo.Objective, "gradients", within(at, elbo.Objective.gradients))
    result = guided(model, guide)
    assert result.stopped == "interrupted" and result.steps == len(result.elbo) == call - 1
    kept = pyro.param("loc").item()
    assert kept == 0.0 if call == 1 else 0 < kept < 0.4


@pytest.mark.parametrize("how", [raised, signalled])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_in_the_final_scoring_of_fit_guide(how, call, monkeypatch):
    """The scores of the weights that are kept are estimated anew, by fewer draws."""
    expected = guided(model, guide)
    kept = pyro.param("loc").item()
    pyro.clear_param_store()
    monkeypatch.setattr(elbo.Objective, "elbo", before(At(call, how), elbo.Objective.elbo))
    result = guided(model, guide)
    assert result.stopped == "interrupted" and result.elbo == expected.elbo
    assert result.final == pytest.approx(expected.final, abs=0.5) and pyro.param("loc").item() == pytest.approx(
        kept, abs=0.2
    )


@pytest.mark.parametrize("how", [raised, signalled])
def test_in_the_set_up_of_fit_guide(how):
    def interrupted(y=2.0):
        how()
        guide(y)

    with pytest.raises(KeyboardInterrupt):
        guided(model, interrupted)
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("call", [1, 4])
def test_while_a_checkpoint_of_fit_guide_is_written(call, tmp_path, monkeypatch):
    expected = guided(model, guide)
    kept = pyro.param("loc").item()
    pyro.clear_param_store()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", before(At(call, signalled), torch.save))
        result = guided(model, guide, checkpoint=tmp_path / "guide", every=9)
    assert result.stopped == "interrupted" and result.steps == (9 if call == 1 else 30)
    pyro.clear_param_store()
    again = guided(model, guide, checkpoint=tmp_path / "guide", every=9)
    assert (again.elbo, again.final, pyro.param("loc").item()) == (expected.elbo, expected.final, kept)


# --- what else fits meet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [30.0, 1e5])
def test_steps_that_are_far_too_long_are_skipped(lr):
    """With Pyro's validation, scales of 0 raise in place of making a loss that is not finite: that changes nothing."""
    ends = []
    for validated in (True, False):
        pyro.clear_param_store()
        with pyro.validation_enabled(validated):
            try:
                result = guided(model, guide, lr=lr, steps=60)
                ends.append((result.skipped, result.final))
            except FloatingPointError as error:  # ten steps, and ten after each of three returns
                ends.append(str(error))
        assert pyro.param("loc").isfinite()
    assert ends[0] == ends[1]
    assert "at step 43, at ['z (model)" in ends[0] if lr == 1e5 else len(ends[0][0]) == 10 and -10 < ends[0][1] < -2


def test_a_fit_that_diverges_without_ever_being_infinite_warns():
    with pytest.warns(
        UserWarning, match="The fit diverged: -.* nats in the last epoch, -.* nats in the first step. Try a smaller lr"
    ):
        quiet(Linear(), Y, X, optimizer=partial(SGD, lr=1e4), schedule=keep_rate, epochs=3)


def unreadable():
    raise OSError("unreadable")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [(unreadable, OSError, "(?s)worker process 3.*OSError: unreadable.*Raised by row"), (dies, RuntimeError, "worker")],
)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # DataLoader's own __del__ hears of it too
def test_a_worker_that_fails(what, error, text):
    """Three batches of others come before."""
    module, made = Linear(), []

    def make(params):
        made.append(Recording(params, 0.5))
        return made[0]

    data = Watched(lambda: get_worker_info().id == 3 and what())
    with pytest.raises(error, match=text), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        quiet(module, data, num_workers=4, batch_size=8, optimizer=make)
    assert len(made[0].seen) <= 3 and module.training
    assert torch.equal(weights(module), made[0].seen[-1] if made[0].seen else torch.zeros(3))


def test_word_of_a_dead_worker_cuts_no_step_in_two():
    def handler(*_):
        raise RuntimeError("DataLoader worker is killed")

    module, made = Linear(), []

    def make(params):
        made.append(Recording(params, 0.5, At(2, lambda: signal.raise_signal(signal.SIGCHLD))))
        return made[0]

    old = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(RuntimeError, match="worker is killed"):
            quiet(module, Y, X, optimizer=make, epochs=5)
    finally:
        signal.signal(signal.SIGCHLD, old)
    assert len(made[0].seen) == 2 and torch.equal(weights(module), made[0].seen[1])


def test_a_loss_without_parameters():
    class Constant(Linear):
        def forward(self, x):
            return dist.Normal(x[:, 0], 1.0)

    with pytest.raises(ValueError, match="Expected log_prob to depend on parameters of module"):
        quiet(Constant(), Y, X)
    with pytest.raises(ValueError, match="Expected model or guide to have parameters; got none"):
        guided(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
