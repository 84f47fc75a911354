"""``fit`` and ``fit_guide`` with ``compile=True``: the same numbers, checks, errors, names and files; few compilations."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact import heads as h
from support.values import built, sized

fit = functools.partial(gx.fit, progress=False)


@pytest.fixture(autouse=True)
def counter(monkeypatch):
    """Traces and differentiates, but takes torch's operations as they are, which compiles in little time; counts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield lambda: torch._dynamo.utils.counters["aot_autograd"]["ok"]
    torch._dynamo.reset()


def model(dropout=0.0):
    head = h.Categorical(4)
    net = gx.conditioners.Recurrent(4, head.num_params, hidden=5, context=2, dropout=dropout)
    return built(gx.Autoregressive(net, head, (3,)))


def rows(count=50):
    return torch.randint(4, (count, 3), generator=torch.Generator().manual_seed(0)), sized(count, 2, seed=1)


def test_a_fit_has_the_same_nats_weights_and_names(counter):
    y, x = rows()
    options = {
        "validation": 0.2,
        "epochs": 3,
        "batch_size": 16,
        "penalty": lambda module: 1e-3 * module.head.num_params,
    }
    options["penalty"] = lambda module: 1e-3 * sum(p.square().sum() for p in module.parameters())
    plain, other = model(), model()
    expected, got = fit(plain, y, x, **options), fit(other, y, x, compile=True, **options)
    assert counter() == 2  # one for 16 rows, one for another number of rows
    assert got.train == pytest.approx(expected.train, rel=1e-12)
    assert got.validation == pytest.approx(expected.validation, rel=1e-12)
    assert [*other.state_dict()] == [*plain.state_dict()]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_a_fit_continues_from_its_checkpoint(tmp_path):
    y, x = rows()
    options = {"epochs": 4, "batch_size": 25, "compile": True}
    whole, part = model(), model()
    fit(whole, y, x, **options)

    class Killed(BaseException):
        pass

    def stop(module):
        stop.left -= 1
        if not stop.left:
            raise Killed
        return torch.zeros(())

    def go(module):
        return torch.zeros(())

    stop.__qualname__ = go.__qualname__ = "nothing"
    stop.left = 6
    with pytest.raises(Killed):
        fit(part, y, x, penalty=stop, checkpoint=tmp_path / "fit", every=1, **options)
    part = model()
    fit(part, y, x, penalty=go, checkpoint=tmp_path / "fit", every=1, **options)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(part.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_each_row_is_checked_once():
    y, x = rows()
    y[40, 1] = 9
    with pytest.raises(ValueError, match=r"within the support[\s\S]*first in rows \[40\]"):
        fit(model(), y, x, compile=True, batch_size=10)


def test_what_cannot_be_compiled_raises_with_a_note():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self):
            return dist.Normal(self.loc if self.loc < 9 else -self.loc, 1.0)

    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as caught:
        fit(Looks(), torch.ones(4), compile=True, epochs=2, batch_size=2)
    assert "compile=True" in "".join(caught.value.__notes__)
    assert torch.distributions.Distribution._validate_args


@pytest.mark.parametrize("call", [lambda: fit(model(), *rows(), compile=1), lambda: gx.fit_guide(len, len, compile=1)])
def test_compile_is_a_flag(call):
    with pytest.raises(TypeError, match="Expected compile to be True or False; got 1"):
        call()


class Centre(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self):
        return dist.Normal(self.loc, 1.0)


def test_many_fits_in_one_process():
    """Torch limits the compilations of one function, but each fit has its own."""
    for _ in range(10):
        fit(Centre(), torch.ones(8), compile=True, epochs=1, batch_size=4)


def test_a_changing_number_raises_with_a_note():
    class Annealed(Centre):
        beta = 0.0

        def forward(self):
            self.beta += 0.01
            return dist.Normal(self.loc * self.beta, 1.0)

    with pytest.raises(Exception, match="fullgraph") as caught:
        fit(Annealed(), torch.ones(40), compile=True, epochs=1, batch_size=2)
    assert "compile=True" in "".join(caught.value.__notes__)
    assert torch.distributions.Distribution._validate_args


def test_threads_leave_validation_on():
    y = torch.ones(8)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(fit, Centre(), y, compile=True, epochs=2, batch_size=4) for _ in range(3)]
        assert all(len(job.result().train) == 2 for job in jobs)
    assert torch.distributions.Distribution._validate_args


# --- guides -----------------------------------------------------------------------------------------------

Y = sized(12, 3, seed=3)


def programs():
    pyro.clear_param_store()
    encoder, q = built(nn.Linear(3, 4)), built(gx.flows.iaf(2, context=4, hidden=(6,)))
    decoder = built(nn.Linear(2, 3))

    def model(y):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.ones((), dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("rows", 12, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), scale).to_event(1), obs=y[index])

    def guide(y):
        pyro.module("encoder", encoder)
        pyro.module("q", q)
        with pyro.plate("rows", 12, subsample_size=5) as index:
            pyro.sample("z", q(encoder(y[index])))

    return model, guide


@pytest.mark.parametrize("particles", [1, 3])
def test_a_guide_has_the_same_elbo(counter, particles):
    options = {"steps": 8, "num_particles": particles, "progress": False}
    expected = gx.fit_guide(*programs(), Y, **options)
    got = gx.fit_guide(*programs(), Y, compile=True, **options)
    assert counter() == 1
    assert got.elbo == pytest.approx(expected.elbo, rel=1e-9)
    assert got.final == pytest.approx(expected.final, rel=1e-9)


def test_enumeration_is_recorded():
    def model(y):
        p = pyro.param("p", torch.tensor(0.3).double(), constraint=dist.constraints.unit_interval)
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def run(**options):
        pyro.clear_param_store()
        return gx.fit_guide(model, lambda y: None, Y[:, 0], steps=5, num_particles=1, progress=False, **options).elbo

    assert run(compile=True) == pytest.approx(run(), rel=1e-9)


def test_a_model_that_branches_on_values_raises_with_a_note():
    def model(y):
        loc = pyro.param("loc", torch.zeros(()).double())
        pyro.sample("y", dist.Normal(loc if loc > -1e9 else -loc, 1.0).expand([12]).to_event(1), obs=y)

    with pytest.raises(RuntimeError) as caught:
        gx.fit_guide(model, lambda y: None, Y[:, 0], steps=3, num_particles=1, progress=False, compile=True)
    assert "compile=True" in "".join(caught.value.__notes__)


def test_a_loss_must_be_differentiable():
    loss = pyro.infer.RenyiELBO()
    with pytest.raises(ValueError, match=r"Expected loss with a method differentiable_loss .*; got RenyiELBO"):
        gx.fit_guide(*programs(), Y, loss=loss, compile=True)


def test_a_loss_whose_compiled_form_is_that_of_its_base_class_raises():
    class Scaled(pyro.infer.Trace_ELBO):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            return 3 * super().loss_and_grads(model, guide, *args, **kwargs)

    with pytest.raises(ValueError, match=r"Expected loss with a method differentiable_loss .*; got Scaled"):
        gx.fit_guide(*programs(), Y, steps=3, loss=Scaled(), compile=True, progress=False)
    for loss in pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO():
        gx.fit_guide(*programs(), Y, steps=1, loss=loss, compile=True, progress=False)


def test_minibatches_from_outside_raise():
    """The record would use those of its own step for ever."""
    batches = iter(torch.randn(100, 4, dtype=torch.float64))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(z, 1.0), obs=next(batches))

    def guide():
        loc = pyro.param("loc", torch.zeros((), dtype=torch.float64))
        pyro.sample("z", dist.Normal(loc, 1.0))

    pyro.clear_param_store()
    with pytest.raises(ValueError, match="same operations on the same tensors"):
        gx.fit_guide(model, guide, steps=5, num_particles=1, compile=True, progress=False)


def test_running_averages_change_once_a_step():
    def counts(compile):
        pyro.clear_param_store()
        norm = nn.BatchNorm1d(3).double()

        def model(y):
            z = pyro.sample("z", dist.Normal(y.new_zeros(3), 1.0).to_event(1))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

        def guide(y):
            pyro.module("norm", norm)
            pyro.sample("z", dist.Normal(norm(y).mean(0), 1.0).to_event(1))

        options = {"steps": 6, "num_particles": 1, "loss": pyro.infer.Trace_ELBO(), "progress": False}
        gx.fit_guide(model, guide, Y, compile=compile, **options)
        return norm.num_batches_tracked.item(), norm.running_mean

    (number, mean), (expected, other) = counts(True), counts(False)
    assert number == expected
    torch.testing.assert_close(mean, other)
