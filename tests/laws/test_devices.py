"""Nothing is made on the default device, and the parallel pass runs wholly on meta."""

import pytest
import torch
from registry import MADE, built, sized

from pyro_genexact import testing
from pyro_genexact.testing import conditioner_inputs, made


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


class MakesZeros(MADE):
    def forward(self, y, context=None):
        return super().forward(y, context) + torch.zeros(2, dtype=y.dtype)


def test_devices_have_power():
    net = built(MakesZeros(4, 2, hidden=(8,)))
    with pytest.raises(AssertionError, match=r"device broken \[the default device is meta\]"):
        testing.device(lambda: net(sized(3, 4)))
    with pytest.raises(AssertionError, match=r"device broken \[all on meta\]"):
        testing.meta(net, lambda _: torch.zeros(1))
