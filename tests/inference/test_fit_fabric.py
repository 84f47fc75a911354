"""``gx.fit`` and ``gx.fit_guide`` with a Fabric of one device: precision, loggers, callbacks, errors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning_fabric import Fabric

import pyro_genexact as gx
from support.regressions import Linear, quiet, regression_rows, weights


class Notes:
    """A logger and a callback that remembers."""

    def __init__(self):
        self.logged, self.steps, self.epochs = [], [], []

    def log_metrics(self, metrics, step):
        self.logged.append((metrics, step))

    def on_train_batch_end(self, module, step, nats):
        self.steps.append((step, nats))

    def on_train_epoch_end(self, module, epoch, **nats):
        self.epochs.append((epoch, nats))


def test_a_fabric_of_one_device_changes_nothing_and_is_told():
    y, x = regression_rows()
    notes, one, other = Notes(), Linear(), Linear()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=notes, callbacks=notes)
    result = quiet(one, y, x, validation=0.25, epochs=3, batch_size=10, fabric=fabric)
    quiet(other, y, x, validation=0.25, epochs=3, batch_size=10)
    assert torch.equal(weights(one), weights(other))
    named = [{"train": a, "validation": b} for a, b in zip(result.train, result.validation, strict=True)]
    assert notes.epochs == list(enumerate(named))
    assert notes.logged == [(nats, 3 * (epoch + 1)) for epoch, nats in enumerate(named)]
    assert [step for step, _ in notes.steps] == list(range(1, 10))


def test_bfloat16_runs_the_network_and_keeps_the_density():
    seen = {}
    torch.manual_seed(0)
    flow = gx.flows.maf(3, transforms=2, hidden=(16,))
    x = torch.randn(256, 3)
    net = next(m for m in flow.modules() if isinstance(m, gx.conditioners.MADE))

    def note(module, args, output):
        seen["network"] = torch.is_autocast_enabled("cpu")

    net.register_forward_hook(note)

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self):
            found = self.flow()
            seen["density"] = found.log_prob(x[:5]).dtype
            return found

    result = quiet(Watched(), x, epochs=2, fabric=Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"))
    assert seen == {"network": True, "density": torch.float32} and all(
        p.dtype == torch.float32 for p in flow.parameters()
    )
    assert result.train[-1] > -10


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"devices": 2, "strategy": "ddp"},
            "Expected a fabric with several devices to be launched; call fabric.launch()",
        ),
        ({"devices": 1, "precision": "bf16-true"}, r"Expected fabric with precision '32-true' or .*; got 'bf16-true'"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        quiet(Linear(), *regression_rows(), fabric=Fabric(accelerator="cpu", **options))


def test_sharded_parameters_raise():
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric._strategy = type("FSDPStrategy", (type(fabric.strategy),), {})()
    with pytest.raises(ValueError, match=r"Expected fabric with one device or strategy 'ddp' .*; got FSDPStrategy"):
        quiet(Linear(), *regression_rows(), fabric=fabric)


def test_what_is_no_fabric():
    with pytest.raises(TypeError, match="Expected fabric to be a lightning Fabric; got str"):
        quiet(Linear(), *regression_rows(), fabric="cpu")


def model():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(2.0))


def test_guides_in_bfloat16_and_on_one_device_only():
    guide = gx.guides.AutoFlow(model, hidden=(8,))
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    result = gx.fit_guide(model, guide, steps=150, lr=0.03, progress=False, fabric=fabric)
    evidence = dist.Normal(0.0, 3**0.5).log_prob(torch.tensor(2.0)).item()
    assert result.final == pytest.approx(evidence, abs=0.1)
    with pytest.raises(ValueError, match=r"Expected fabric with one device .*; got 2 processes"):
        gx.fit_guide(model, guide, steps=5, fabric=Fabric(accelerator="cpu", devices=2, strategy="ddp"))


def test_steps_far_too_long_go_back_under_validation():
    """Pyro's validation raises where parameters are NaN; the fit goes back, as it does without validation."""

    def narrow():
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))

    def steep():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(True), pytest.raises(FloatingPointError, match="Expected a finite"):
        gx.fit_guide(steep, narrow, lr=1e5, steps=400, progress=False)
    assert pyro.param("loc").item() == 0.5 and pyro.param("scale").item() == pytest.approx(0.1)  # those of the start


def test_a_few_steps_too_long_do_no_harm_under_validation():
    def walled():
        z = pyro.sample("z", dist.Normal(0.95, 0.01))
        pyro.sample("y", dist.Uniform(0.0, 1.0), obs=z)  # validation raises beyond 1

    def narrow():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.001))

    with pyro.validation_enabled(True):
        result = gx.fit_guide(walled, narrow, steps=400, lr=0.1, num_particles=1, progress=False)
    assert 10 <= len(result.skipped) < 40 and 0.93 < pyro.param("loc").item() < 0.97
