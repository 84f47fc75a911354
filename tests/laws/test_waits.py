"""No value is read, for which code would wait for a device, except where the table below says why."""

import pyro
import pytest
import torch
from torch.nn import functional as F

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import testing
from pyro_genexact.conditioners import MADE
from pyro_genexact.core.functional import as_on_a_device
from pyro_genexact.testing import conditioner_inputs, made
from pyro_genexact.testing.waits import count_waits
from support import registry
from support.checks import fails
from support.values import built, sized

ROOT = 12  # per root
INTEGRAL = 2  # per integral: its error, and the number of its panels
ALLOWED = {  # log_prob, training step, sample
    "naf": (0, 0, 4 * ROOT),
    "naf inverse one feature": (2 * ROOT, 2 * ROOT, 0),
    "umnn one feature": (INTEGRAL, INTEGRAL, ROOT + 10 * INTEGRAL),
    "umnn inverse one feature": (ROOT + 10 * INTEGRAL, ROOT + 20 * INTEGRAL, INTEGRAL),
    "sospf": (0, 0, 4 * ROOT),
    "sospf inverse one feature": (2 * ROOT, 2 * ROOT, 0),
    "bpf": (0, 0, 4 * ROOT),
    "bpf inverse one feature": (2 * ROOT, 2 * ROOT, 0),
    "bnaf": (0, 0, 4 * ROOT),
    "bnaf inverse": (2 * ROOT, 2 * ROOT, 0),
    "univariate naf": (0, 0, 2 * ROOT),
    **{
        name: (1, 1, 1) for name in registry.DISTRIBUTIONS if "CRF" in name or "HiddenMarkov" in name
    },  # rows in log space
    **{name: (0, 0, 6) for name in registry.SEQUENCES},  # whether all have ended, and their rows
}
OF_HEADS = {
    "StudentT": 1,  # torch's constructor copies a number
    "Stable": 1,  # the error of an integral
    "VonMises": 10,  # rejections
    "Stopped angles": 10,
    "EntmaxCategorical searched": 4 * ROOT,  # a root by bisection
}
REASONS = "numerics/", "heads/networks.py", "chains/messages.py", "autoregressive/sequence.py"


@pytest.fixture(autouse=True)
def unvalidated():
    with pyro.validation_enabled(False):
        yield


def package(found):
    """Waits of the package, without those of the registry's own code."""
    return {place: number for place, number in found.items() if "registry/" not in place}


def alike(run):
    """Counts the waits of a run, and checks that the result is the same without values at hand."""
    kept = []
    with testing.helpers.seeded(0):
        expected = run()
    with testing.helpers.seeded(0):
        found = package(count_waits(lambda: kept.append(run())))
    for got, value in zip(testing.helpers.tensors_of(kept[0]), testing.helpers.tensors_of(expected), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-11, equal_nan=True)
    return found


def check(found, allowed):
    assert sum(found.values()) <= allowed, found
    assert all(place.split(" in ")[1].startswith(REASONS) for place in found), found


def test_distribution(distribution_name, distribution):
    if distribution_name in registry.SOLVED_BY_ZUKO:
        pytest.skip("zuko chooses the steps of its solver by values")
    module, context = distribution
    allowed = ALLOWED.get(distribution_name, (0, 0, 0))
    with torch.no_grad():
        y = made(module, context).sample()
        check(alike(lambda: made(module, context).log_prob(y)), allowed[0])
        check(alike(lambda: made(module, context).sample()), allowed[2])

    def step():
        module.zero_grad()
        made(module, context).log_prob(y).sum().backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    check(alike(step), allowed[1])
    if made(module, context).has_rsample:

        def draw():
            module.zero_grad()
            made(module, context).rsample().sum().backward()
            return [p.grad for p in module.parameters() if p.grad is not None]

        check(alike(draw), 2 * allowed[2])


@pytest.mark.parametrize("name", registry.DISTRIBUTION_HEADS)
def test_distribution_head(name, device):
    head = registry.move(built(registry.DISTRIBUTION_HEADS[name]()), device)
    phi = (0.5 * sized(2, 4, head.num_params)).to(device).requires_grad_()
    y = head(phi).sample()

    def step():
        (log_prob := head(phi).log_prob(y)).sum().backward()
        gradient, phi.grad = phi.grad, None
        return log_prob, gradient

    allowed = OF_HEADS.get(name, 0)
    assert sum(alike(step).values()) <= allowed
    assert sum(alike(lambda: head(phi).sample()).values()) <= allowed


def test_transform(transform):
    subject, x, context = transform

    def run():
        t = made(subject, context)
        y = t(x)
        back = t.inv(z := y.clone())
        return y, t.log_abs_det_jacobian(x, y), back, t.inv.log_abs_det_jacobian(z, back)

    check(alike(run), 6 * ROOT)


def test_conditioner(conditioner):
    y, context = conditioner_inputs(conditioner)

    def run():
        phi = conditioner(y, context)
        gradients = torch.autograd.grad(phi.sum(), [*conditioner.parameters()], allow_unused=True)
        with torch.no_grad():
            first, state = conditioner.start(context, len(y))
            rest = [] if y.shape[1] == 1 else [conditioner.extend(y[:, :1], state)[0]]
        return phi, [g for g in gradients if g is not None], first, rest

    check(alike(run), 0)
