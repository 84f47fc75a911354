"""``fit_guide``: what it fits, when it stops, what it leaves alone and what it says."""

from __future__ import annotations

import math
import warnings
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_genexact as gx
from pyro_genexact.inference import variational
from pyro_genexact.inference.draws import Draws
from pyro_genexact.inference.engine import Interrupts
from pyro_genexact.inference.fit_guide import fit_guide
from pyro_genexact.inference.learning_rate import LearningRate

EVIDENCE = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)).item()


def model(y=2.0):
    """The posterior of z is N(1, 1/2)."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.as_tensor(y))


def guide(y=2.0):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


fit = partial(fit_guide, model, guide, lr=0.03, progress=False)


def test_exact_posterior():
    result = fit(steps=300)
    assert result.final == pytest.approx(EVIDENCE, abs=0.02)
    assert pyro.param("loc").item() == pytest.approx(1.0, abs=0.05)
    assert pyro.param("scale").item() == pytest.approx(0.5**0.5, abs=0.05)
    assert (len(result.elbo), result.steps, result.stopped, result.skipped) == (300, 300, "steps", {})
    assert result.elbo[0] < result.final and result.seconds > 0


def test_stops_when_flat(monkeypatch):
    monkeypatch.setattr(variational, "WINDOWS", (25, 25))
    result = fit(num_particles=2)
    assert result.stopped == "flat" and 25 * 3 * 4 <= result.steps < 2500
    assert result.final == pytest.approx(EVIDENCE, abs=0.03)


def test_arguments_reach_model_and_guide():
    fit(-2.0, steps=200)
    assert pyro.param("loc").item() == pytest.approx(-1.0, abs=0.1)
    pyro.clear_param_store()
    fit(y=-2.0, steps=200)
    assert pyro.param("loc").item() == pytest.approx(-1.0, abs=0.1)


def test_same_seed_same_weights_and_random_state_given_back():
    before = torch.get_rng_state()
    elbos = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        elbos.append(fit(steps=10, seed=seed).elbo)
        assert torch.equal(torch.get_rng_state(), before)
    assert elbos[0] == elbos[1] != elbos[2]


def test_two_guides_of_one_name_are_both_fitted():
    for _ in range(2):
        q = AutoNormal(model)
        fit_guide(model, q, steps=150, lr=0.03, progress=False)
        assert q.median()["z"].item() == pytest.approx(1.0, abs=0.1)


def test_the_best_weights_are_kept():
    """With steps far too long the averages are far better than the last weights."""
    result = fit(steps=60, optimizer=partial(torch.optim.SGD, lr=0.6), num_particles=1)
    assert result.final > sum(result.elbo[-30:]) / 30


def test_only_the_given_parameters_move():
    q = gx.guides.AutoFlow(model, hidden=(4,), warm_start=0)
    q()
    before = {name: p.detach().clone() for name, p in q.named_parameters()}
    fit_guide(model, q, steps=5, parameters=list(q.flow.transforms[-1].parameters()), progress=False)
    moved = {name.rpartition(".")[2] for name, p in q.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"loc", "log_scale"}  # L of one latent is its scale


def test_long_gradients_are_cut():
    """One step is ten thousand times as steep as the others."""
    norms = []

    class Watched(torch.optim.SGD):
        def step(self):
            norms.append(math.hypot(*(p.grad.item() for group in self.param_groups for p in group["params"])))
            super().step()

    def spiked():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("spike", 1e4 * z if len(norms) == 39 else 0 * z)

    ends = []
    for ratio in (10.0, math.inf):
        norms.clear()
        pyro.clear_param_store()
        fit_guide(
            spiked,
            guide,
            steps=40,
            optimizer=partial(Watched, lr=0.01),
            max_grad_ratio=ratio,
            num_particles=1,
            progress=False,
        )
        ends.append(norms[-1])
    assert max(norms[:-1]) < ends[0] < 100 < 9000 < ends[1]


def non_finite(when):
    """Whose site "bad" is infinite in the given steps."""
    calls = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls.append(1)
        pyro.factor("bad", z * 0 - (math.inf if when(len(calls)) else 0.0))

    return model


def test_first_step_that_is_not_finite():
    with pytest.raises(FloatingPointError, match=r"finite loss; got inf at step 0, at \['bad \(model\)'\]"):
        fit_guide(non_finite(lambda n: True), guide, steps=10, num_particles=1, progress=False)


def test_steps_that_are_not_finite_are_skipped_and_reported():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("bad", torch.where(z > 1.5, -torch.inf, 0.0))

    result = fit_guide(model, lambda: guide(), steps=40, num_particles=1, seed=3, progress=False)
    assert result.skipped and set(map(tuple, result.skipped.values())) == {("bad (model)",)}
    assert all(not math.isfinite(result.elbo[step]) for step in result.skipped)
    assert pyro.param("loc").isfinite()


def test_steps_that_stay_non_finite_raise():
    with pytest.raises(FloatingPointError, match=r"at step 5[0-9]"):
        fit_guide(non_finite(lambda n: n > 15), guide, steps=80, num_particles=1, progress=False)
    assert pyro.param("loc").isfinite()


def test_steps_that_are_not_finite_now_and_then_do_no_harm():
    model_ = non_finite(lambda n: n > 15 and n % 3 == 0)  # a bad step runs the model twice
    result = fit_guide(model_, guide, steps=150, num_particles=1, progress=False)
    assert 50 < len(result.skipped) < 80 and result.stopped == "steps"


def test_behind_a_wall_the_fit_goes_back():
    def model():
        z = pyro.sample("z", dist.Normal(0.95, 0.01))
        pyro.factor("wall", torch.where(z > 1, -torch.inf, 0.0))

    def narrow():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.001))

    result = fit_guide(model, narrow, steps=400, lr=0.1, num_particles=1, progress=False)
    assert 10 <= len(result.skipped) < 40 and 0.93 < pyro.param("loc").item() < 0.97


def test_interrupt():
    calls = []

    def model_():
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        model()

    result = fit_guide(model_, lambda: guide(), steps=100, num_particles=1, progress=False)
    assert result.stopped == "interrupted" and 0 < result.steps < 30
    assert math.isfinite(result.final)


def test_draws_at_once_only_where_that_is_right():
    def wrong():
        """Sums over whatever there is, particles included."""
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(2.0))

    def hidden():
        """As above, at a site whose error is small in the sum of all."""
        wrong()
        with pyro.plate("rows", 10):
            pyro.sample("many", dist.Normal(0.0, 1e-30), obs=torch.full((10,), 1e-28))

    def right():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(2.0))

    def plated():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=2) as rows, pyro.plate("inner", 2):
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor([1.0, 10.0, 100.0, 1000.0])[rows])

    def stacked():
        """Broadcasts several draws against the plate, where a single one is a scalar."""
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(torch.stack([z, z + 1, z - 1]), 1.0), obs=torch.tensor(2.0))

    for f, expected, nesting in (
        (wrong, False, 0),
        (hidden, False, 1),
        (right, True, 0),
        (plated, True, 2),
        (stacked, False, 1),
    ):
        q = gx.guides.AutoFlow(f, hidden=(4,))
        sites = poutine.trace(q).get_trace().nodes.items()
        shapes = {name: site["value"].shape for name, site in sites if site["type"] == "sample"}
        assert (Draws.checked(f, q, 8, nesting, shapes).way == "plated") is expected


def test_given_loss_is_used():
    seen = []

    class Counted(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            seen.append(args)
            return super().loss_and_grads(*args, **kwargs)

    assert fit(steps=3, loss=Counted(num_particles=2)).steps == len(seen) == 3


def test_progress(capsys):
    fit_guide(model, guide, steps=20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1].startswith("20/20 steps: ELBO -")


def test_the_first_progress_line_of_a_long_fit_says_how_long_and_why(capsys, monkeypatch):
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(variational.time, "perf_counter", lambda: float(next(clock)))

    def branching():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if z > 0 else -z, 1.0), obs=torch.tensor(2.0))

    with pytest.warns(UserWarning, match="one by one"):
        fit_guide(branching, AutoNormal(branching), steps=20)
    first, *others = capsys.readouterr().err.splitlines()
    assert first.endswith("a step takes 20 s, as draws are evaluated one by one, and all steps at most 6 min more")
    assert not any("takes" in line for line in others)


def test_plot():
    import matplotlib

    matplotlib.use("Agg")
    result = fit(steps=20)
    ax = result.plot()
    assert ax.get_xlabel() == "step" and list(ax.lines[0].get_ydata()) == result.elbo


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"steps": 0}, ValueError, "Expected steps"),
        ({"lr": -1.0}, ValueError, "Expected lr to be positive and finite; got -1.0"),
        ({"num_particles": 0}, ValueError, "Expected num_particles"),
        ({"max_grad_ratio": 0.0}, ValueError, "Expected max_grad_ratio > 0; got 0.0"),
        ({"loss": 3}, TypeError, "Expected loss to be a Pyro ELBO"),
    ],
)
def test_errors(options, error, text):
    with pytest.raises(error, match=text):
        fit(**options)


def test_errors_of_model_and_guide():
    with pytest.raises(TypeError, match="Expected guide to be callable; got int"):
        fit_guide(model, 3)
    with pytest.raises(ValueError, match="Expected model or guide to have parameters; got none"):
        fit_guide(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), steps=3, progress=False)


@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_latents_of_some_runs_only_raise(bound):
    def sometimes():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > bound:
            pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = gx.guides.AutoFlow(sometimes, hidden=(8,))
    with pytest.raises(
        ValueError,
        match=r"(?s)same latents in every run of model and guide; Found vars in model but not guide: \{'w'\}",
    ):
        fit_guide(sometimes, guide, steps=50, progress=False)
    guide = gx.guides.AutoFlow(model, hidden=(8,))
    with pytest.raises(ValueError, match=r"same latents in every run.*\n.*z"):
        fit_guide(lambda: pyro.factor("nothing", torch.zeros(())), guide, steps=5, progress=False)


def test_warnings_of_the_model_stay_warnings():
    def warns():
        warnings.warn("hello", stacklevel=1)
        model()

    with pytest.warns(UserWarning, match="hello"):
        fit_guide(warns, guide, steps=2, progress=False)


def test_the_first_weights_are_kept_if_none_are_better():
    q = gx.guides.AutoFlow(model, hidden=(4,))
    q()
    start = {name: value.clone() for name, value in q.state_dict().items()}
    result = fit_guide(model, q, steps=3, lr=0.5, progress=False)
    assert result.final > EVIDENCE - 0.1
    assert all(torch.equal(value, start[name]) for name, value in q.state_dict().items())


def test_gradients_of_other_parameters_are_left_empty():
    q = gx.guides.AutoFlow(model, hidden=(4,), warm_start=5)
    q()
    assert all(p.grad is None for p in q.parameters())


def test_parameters_under_a_name_that_is_taken_raise():
    def twin():
        pyro.module("q", q, update_module_params=False)
        z = pyro.sample("z", q())
        return z

    def model_():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.factor("y", -(z**2).sum())

    q = gx.flows.iaf(1, hidden=(4,))
    fit_guide(model_, twin, steps=2, progress=False)
    q = gx.flows.iaf(1, hidden=(4,))
    with pytest.raises(ValueError, match="Expected the loss to depend on parameters; it depends on none of"):
        fit_guide(model_, twin, steps=2, progress=False)


def test_the_learning_rate_drops_whenever_the_elbo_is_flat():
    rate, factors = LearningRate(10, (1.0, 0.3, 0.1), 0.0), []
    while not rate.flat:
        factors.append(rate.factor(len(factors), 0.0))
        dropped = rate.read(len(factors) == 1, 1 / 3)  # the first is the best
        assert dropped == (len(factors) in (4, 7, 10))
    assert factors == pytest.approx([0.1, 0.2, 0.3, 0.4, *[0.3 * x for x in (0.5, 0.6, 0.7)], 0.08, 0.09, 0.1])
    cooling = LearningRate(1, (1.0,), 0.5)
    assert [cooling.factor(9, spent) for spent in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.5, 0])


def test_an_elbo_that_is_better_within_its_error_is_remembered_and_no_progress():
    remembered = []
    descent = SimpleNamespace(remember=lambda: remembered.append(task.steps // task.read_every))
    objective = SimpleNamespace(loss=Trace_ELBO(num_particles=16))
    task = variational.Variational(objective, descent, None, torch.device("cpu"), torch.nn.ModuleList(), Interrupts())
    for middle in (0.0, 0.4, 0.8, 1.2):  # the medians of windows, each known to 0.47
        for step in range(task.read_every):
            task.elbo.append(middle + 4 * (-1) ** step)
            task._end_window()
    assert remembered == [1, 2, 3, 4] and task.rate.dropped == 1 and task.stopped is None


def test_windows_with_tempered_steps_do_not_count():
    remembered = []
    descent = SimpleNamespace(remember=lambda: remembered.append(task.steps))
    objective, modules = SimpleNamespace(loss=Trace_ELBO(num_particles=256)), torch.nn.ModuleList()
    task = variational.Variational(objective, descent, None, torch.device("cpu"), modules, Interrupts(), 120)
    for _ in range(250):
        task.elbo.append(task.steps)
        task._end_window()
    assert task.read_every == 50 and remembered == [200, 250]  # the window from 100 to 150 is tempered too


@pytest.mark.parametrize("how", ["right", "left", "branch"])
def test_draws_that_are_evaluated_one_by_one_warn(how):
    groups = torch.arange(3).repeat_interleave(2)

    def model():
        with pyro.plate("groups", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        mean = a[..., groups] if how == "right" or (how == "branch" and a[0] > 0) else a[groups]
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(6))

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit_guide(model, AutoNormal(model), steps=1, progress=False)
    texts = [str(warning.message) for warning in found]
    assert any("evaluated one by one" in text and "alpha[..., group]" in text for text in texts) == (how == "branch")
