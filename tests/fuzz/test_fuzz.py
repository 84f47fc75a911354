"""A short seeded run over cases of every kind, and broken doubles that the checks find. The long run is ``run.py``."""

import descriptions
import pyro.distributions as dist
import pytest
import torch
from cases import KINDS
from checks import CHECKS
from descriptions import Case, Labels
from hypothesis import HealthCheck, given, settings
from run import violations
from torch import nn

import pyro_genexact as gx
from pyro_genexact.base import Head
from pyro_genexact.conditioners import MADE

EXAMPLES = {"autoregressive": 20, "sequence": 15, "flow": 15, "chain": 15, "other": 15}


@pytest.mark.parametrize("kind", KINDS)
def test_cases(kind):
    @settings(
        max_examples=EXAMPLES[kind],
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[kind]())
    def every(case):
        assert eval(repr(case)) == case
        for name, error in violations(case):
            raise AssertionError(f"{name} of {case}: {error}") from error

    every()


RIGHT = [
    Case("autoregressive", "Autoregressive(MADE(3, P, context=2, hidden=(6,)), head, (3,))", "Normal()", (2, 2)),
    Case("autoregressive", "Autoregressive(NADE(3, P, hidden=5), head, (3,))", "Bernoulli()", lengths=[3, 1]),
    Case("flow", "maf(2, transforms=1, hidden=(6,))"),
    Case("chain", "Labels((2,), 3, 2, None, True, True)", lengths=[3, 1]),
]


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_right_ones_pass(case):
    for name, error in violations(case):
        raise AssertionError(name) from error


class Heavy(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 1e-3


class Wide(dist.Normal):
    def sample(self, sample_shape=()):
        return 3 * super().sample(sample_shape)


class Outside(dist.Normal):
    support = dist.constraints.positive


class Unlike(dist.Normal):
    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape) + 1, self.scale.expand(batch_shape))


class OfFamily(gx.DistributionModule):
    """A normal distribution of a broken class, with the parameters of a module."""

    def __init__(self, family):
        super().__init__()
        self.family, self.loc = family, nn.Parameter(torch.zeros(3))

    def forward(self, context=None):
        return self.family(self.loc, self.loc.exp())


class OfClass(Head):
    """A head of a broken class."""

    num_params = 2

    def __init__(self, family):
        super().__init__()
        self.family = family

    def forward(self, phi, first=0):
        return self.family(phi[..., 0], phi[..., 1].exp())


class Peeks(MADE):
    """The parallel pass reads the present site."""

    def forward(self, y, context=None):
        return super().forward(y, context) + 0.1 * y.unsqueeze(-1)


class Mixes(MADE):
    """A row depends on the others."""

    def forward(self, y, context=None):
        phi = super().forward(y, context)
        return phi - phi.mean(0)


class Stops(MADE):
    """A part of the gradient is missing."""

    def forward(self, y, context=None):
        phi = super().forward(y, context)
        return 0.5 * phi + 0.5 * phi.detach()


class Forgets(MADE):
    """Computes with a number that no state holds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = torch.rand(()).item()

    def forward(self, y, context=None):
        return self.factor * super().forward(y, context)


class Loses(MADE):
    """Computes with a tensor that no state holds and nothing rebuilds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("factor", torch.full((), 0.5), persistent=False)

    forward = Forgets.forward


class Keeps(MADE):
    """Sees no weight that is put in place of the parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__["kept"] = self.layers[-1].bias

    def forward(self, y, context=None):
        return super().forward(y, context) + self.kept.sum()


class Refuses(MADE):
    """Takes no empty batch."""

    def start(self, context, batch_size):
        if not batch_size:
            raise RuntimeError("no rows")
        return super().start(context, batch_size)


class OffAffine(gx.transforms.Affine):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 1e-3


class Stretches(gx.heads.Affine):
    """The log-determinant is off."""

    def forward(self, phi, first=0):
        t = super().forward(phi, first)
        return OffAffine(t.shift, t.log_scale)


class OffMarginals(gx.LinearChainCRF):
    @property
    def marginals(self):
        return super().marginals + 1e-3


class Marginals(Labels):
    def forward(self, context=None, lengths=None):
        crf = super().forward(context, lengths)
        crf.__class__ = OffMarginals
        return crf


def of_net(name):
    return Case("autoregressive", f"Autoregressive({name}(3, P, hidden=(6,)), head, (3,))", "Normal()")


def of_class(name, sites):
    return Case(
        "autoregressive", f"Autoregressive(MADE({sites}, P, hidden=(6,)), head, ({sites},))", f"OfClass({name})"
    )


@pytest.mark.parametrize(
    ("check", "case"),
    [
        ("shapes", Case("other", "OfFamily(Unlike)")),
        ("support", of_class("Outside", 2)),
        ("mass", of_class("Heavy", 1)),
        ("mass", of_class("Wide", 3)),
        ("densities", of_net("Peeks")),
        ("directions", of_net("Peeks")),
        ("densities", of_net("Mixes")),
        ("densities", Case("flow", "autoregressive(Stretches, 2, transforms=1, hidden=(6,))")),
        ("gradients", of_net("Stops")),
        ("copies", of_net("Forgets")),
        ("meta", of_net("Loses")),
        ("functional", of_net("Keeps")),
        ("empty", of_net("Refuses")),
        ("queries", Case("chain", "Marginals((2,), 3, 2)")),
    ],
    ids=str,
)
def test_checks_have_power(check, case, monkeypatch):
    for name in {**descriptions.NAMES, **globals()}:
        monkeypatch.setitem(descriptions.NAMES, name, globals().get(name, descriptions.NAMES.get(name)))
    assert check in [name for name, _ in violations(case)]


def test_every_check_has_a_broken_double():
    marks = test_checks_have_power.pytestmark
    assert {check for check, _ in marks[0].args[1]} == set(CHECKS)
