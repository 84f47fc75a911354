"""Nothing is made on the default device, and the parallel pass runs wholly on meta."""

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import testing
from pyro_genexact.conditioners import MADE
from pyro_genexact.testing import conditioner_inputs, made
from support import registry, values
from support.values import built, sized


def parallel(value, device):
    return value if value is None else value.to(device)


def test_conditioner(conditioner):
    y, context = conditioner_inputs(conditioner)

    def run():
        phi, state = conditioner.start(context, len(y))
        return conditioner(y, context), phi, *([conditioner.extend(y[:, :-1], state)[0]] if y.shape[1] > 1 else [])

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            testing.device(run)
    testing.meta(conditioner, lambda net: net(y.to("meta"), parallel(context, "meta")))


def test_transform(transform):
    subject, x, context = transform

    def run():
        t = made(subject, context)
        y = t(x)
        return y, t.log_abs_det_jacobian(x, y), t.inv(y.clone()), t.inv.log_abs_det_jacobian(y, x)

    testing.device(run)


OURS = pytest.mark.parametrize(
    "distribution_name", [name for name in registry.DISTRIBUTIONS if name not in registry.SOLVED_BY_ZUKO]
)


@OURS
def test_distribution(distribution):
    module, context = distribution
    y = made(module, context).sample()

    def run():
        d = made(module, context)
        x = d.rsample((2,)) if d.has_rsample else d.sample((2,))
        return (
            x,
            d.log_prob(x),
            d.log_prob(y),
            *torch.autograd.grad(d.log_prob(y).sum() + x.sum(), [*module.parameters()][-1:]),
        )

    testing.device(run)
    testing.meta(module, lambda m: made(m, parallel(context, "meta")).log_prob(y.to("meta")))
    testing.meta(module, lambda m: made(m, parallel(context, "meta")).sample())
    testing.meta(module, lambda m: made(m, parallel(context, "meta")).support.check(y.to("meta")))


def test_distribution_head(distribution_head, device):
    phi = (0.5 * sized(2, 4, distribution_head.num_params)).to(device)
    y = distribution_head(phi).sample()
    testing.device(lambda: distribution_head(phi).log_prob(y))
    testing.meta(distribution_head, lambda head: head(phi.to("meta")).log_prob(y.to("meta")))
    testing.meta(distribution_head, lambda head: head.support.check(y.to("meta")))


def of_counts():
    """Whose bounds are tensors."""
    return gx.Sequence(gx.conditioners.Recurrent((), 1, hidden=5), h.Binomial(3), 0, 4)


def of_columns():
    model = gx.Autoregressive(MADE(2, 2, hidden=(8,)), h.PerSite([h.LogNormal(), h.Normal()]), (2,))
    return gx.OrderEnsemble(model, torch.tensor([[0, 1], [1, 0]], device="cpu")).eval()


def of_images():
    heads = h.PerSite([h.LogNormal(), h.Normal(), h.Gamma(), h.Normal()])
    model = gx.Autoregressive(MADE(4, 2, hidden=(8,)), heads, (2, 2))
    return gx.OrderEnsemble(model, torch.tensor([[0, 1, 2, 3], [2, 1, 0, 3]], device="cpu")).eval()


def of_bounds():
    return gx.Autoregressive(MADE(3, 4, hidden=(8,)), h.Mixture([h.Binomial(3), h.Binomial(4)]), (3,))


OTHERS = {make.__name__: make for make in (of_counts, of_columns, of_images, of_bounds)}


@pytest.mark.parametrize("name", OTHERS)
def test_others_on_meta(name):
    module = built(OTHERS[name]())
    y = module().sample()
    testing.meta(module, lambda m: m().log_prob(y.to("meta")))
    testing.meta(module, lambda m: m().support.check(y.to("meta")))
    testing.constructed(lambda: OTHERS[name]().double()())


@pytest.fixture
def plain_registry(monkeypatch):
    """Whose factories draw nothing."""
    plain = {
        "redraw": lambda module, *args, **options: module,
        "sized": lambda *shape, seed=0: torch.ones(shape, dtype=torch.float64),
    }
    for module in (values, *registry.MODULES):
        for name in plain.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, plain[name])


@pytest.mark.parametrize("table", ["CONDITIONERS", "ENCODERS", "HEADS", "DISTRIBUTION_HEADS", "TRANSFORMS", "FILTERED"])
def test_constructed_on_meta(table, plain_registry):
    for make in getattr(registry, table).values():
        testing.constructed(make)


def test_distributions_constructed_on_meta(distribution_name, plain_registry):
    def make():
        module, context = registry.DISTRIBUTIONS[distribution_name]()
        made(module.to("meta"), context)

    testing.constructed(make)


def test_gradients_of_each_example_of_conditioners(conditioner):
    y, context = conditioner_inputs(conditioner, 2)
    testing.per_example(
        conditioner,
        lambda call, y, context: call(y[None], None if context is None else context[None]).sin().sum(),
        y,
        context,
    )


@OURS
def test_gradients_of_each_example_of_distributions(distribution):
    module, context = distribution
    with torch.no_grad():
        d = made(module, context)
        y = (d.sample() if d.batch_shape else d.sample((2,)))[:2]

    def score(call, y, context):
        return (call() if context is None else call(context)).log_prob(y).sum()

    testing.per_example(module, score, y, None if context is None else context[:2])


class MakesZeros(MADE):
    def forward(self, y, context=None):
        return super().forward(y, context) + torch.zeros(2, dtype=y.dtype)


class Looks(MADE):
    """At the values."""

    def forward(self, y, context=None):
        return super().forward(y, context) * (1.0 if bool((y < 100).all()) else 0.0)


class OfAllRows(MADE):
    def forward(self, y, context=None):
        scale = 1.0 + torch._C._are_functorch_transforms_active()
        return scale * super().forward(y, context)


@pytest.mark.parametrize(
    "kind, message",
    [(Looks, r"broken \[vmap of grad\]"), (OfAllRows, r"broken \[gradient of layers.0.weight, row 0\]")],
)
def test_per_example_has_power(kind, message):
    def score(call, y):
        return call(y[None]).sum()

    testing.per_example(built(MADE(4, 2, hidden=(8,))), score, sized(3, 4))
    with pytest.raises(AssertionError, match=f"per example {message}"):
        testing.per_example(built(kind(4, 2, hidden=(8,))), score, sized(3, 4))


def test_constructed_has_power():
    testing.constructed(lambda: MADE(4, 2))
    with pytest.raises(AssertionError, match=r"device broken \[made on meta\]"):
        testing.constructed(lambda: MADE(4, 2)(torch.ones(3, 4)).sum().item())


def test_devices_have_power():
    net = built(MakesZeros(4, 2, hidden=(8,)))
    with pytest.raises(AssertionError, match=r"device broken \[the default device is meta\]"):
        testing.device(lambda: net(sized(3, 4)))
    with pytest.raises(AssertionError, match=r"device broken \[all on meta\]"):
        testing.meta(net, lambda _: torch.zeros(1))
