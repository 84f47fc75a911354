"""Heads of bijections and of distributions."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_genexact import Head, distributions, heads, testing, transforms
from support.broken import OntoPositive, WrongInverse

BIJECTION_LAWS = (
    testing.monotonicity,
    testing.round_trips,
    testing.slopes,
    testing.precision,
    testing.differentiability,
    testing.learning,
)


def test_bijection_head(head):
    testing.bijection_head(head)


@pytest.mark.parametrize("law", BIJECTION_LAWS, ids=lambda law: law.__name__)
def test_bijections(head, law):
    law(head)


def test_distribution_head(distribution_head):
    testing.distribution_head(distribution_head)


def test_copies_and_devices_of_distribution_heads(distribution_head):
    head = distribution_head
    like = next(head.parameters(), torch.empty(0, dtype=torch.float64))
    phi = torch.linspace(-1, 1, 4 * head.num_params).to(like).reshape(1, 4, -1)
    with torch.random.fork_rng():
        y = head(phi).sample()
    testing.copies(head, lambda h: h(phi).log_prob(y))
    testing.device(lambda: (head(phi).log_prob(y), head(phi[:, :1], 0).sample()))


class OfConstants(Head):
    """Without parameters and buffers, whatever the default dtype."""

    num_params = 2

    def forward(self, phi, first=0):
        self.seen = phi.dtype
        return transforms.Affine(phi[..., 0], phi[..., 1].tanh())


def test_bijection_head_asks_a_head_without_tensors_in_float64():
    head = OfConstants()
    testing.bijection_head(head)
    assert head.seen == torch.float64
    testing.bijection_head(head, tol=1e-2, dtype=torch.float32)
    assert head.seen == torch.float32


class Clamped(heads.Affine):
    def forward(self, phi, first=0):
        return super().forward(phi.clamp(-0.5, 0.5) if first else phi, first)


class Offset(heads.Affine):
    def forward(self, phi, first=0):
        return super().forward(phi + 1, first)


class Falling(Head):
    num_params = 2

    def forward(self, phi, first=0):
        return torch.distributions.AffineTransform(phi[..., 0], -1 + 0 * phi[..., 1])


class WrongDerivative(heads.Affine):
    def forward(self, phi, first=0):
        t = super().forward(phi, first)
        t.log_abs_det_jacobian = lambda x, y: 2 * t.log_scale
        return t


class Unused(Head):
    num_params = 2

    def forward(self, phi, first=0):
        return transforms.Affine(phi[..., 0], 0 * phi[..., 1])


class Sometimes(Head):
    """Falls where a number is negative."""

    num_params = 2

    def forward(self, phi, first=0):
        scale = 1 + 0 * phi[..., 1]
        return torch.distributions.AffineTransform(phi[..., 0], torch.where(phi[..., 1] < 0, -scale, scale))


class OtherDerivativeAlone(heads.Affine):
    def forward(self, phi, first=0):
        t = super().forward(phi, first)
        if first:
            t.log_abs_det_jacobian = lambda x, y: t.log_scale + 1e-3
        return t


class OfKind(Head):
    """By a transform with one thing wrong."""

    num_params = 2

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, phi, first=0):
        return self.kind(phi[..., 0], phi[..., 1].tanh())


class Cut(transforms.Affine):
    def _call(self, x):
        return super()._call(x)[..., :1]

    def log_abs_det_jacobian(self, x, y):
        return self.log_scale


class OfVectors(transforms.Affine):
    domain = codomain = constraints.real_vector


class Summed(transforms.Affine):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y).sum(-1)


class Bounded(transforms.Affine):
    def _call(self, x):
        return super()._call(20 * (x / 20).tanh())

    def _inverse(self, y):
        return 20 * (super()._inverse(y) / 20).atanh()

    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) - 2 * (x / 20).cosh().log()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (partial(OfKind, Cut), "shape of y"),
        (partial(OfKind, OfVectors), "event dims"),
        (partial(OfKind, OntoPositive), "range"),
        (partial(OfKind, Summed), "shape of log.dy/dx."),
        (partial(OfKind, WrongInverse), "inverse"),
        (Offset, "near the identity at phi = 0"),
        (Falling, "near the identity at phi = 0"),
        (Clamped, "site 1 alone"),
        (OtherDerivativeAlone, "site 1 alone, log.dy/dx."),
        (WrongDerivative, "log-derivative"),
        (Sometimes, "increasing"),
        (partial(OfKind, Bounded), "onto 10000"),
        (Unused, "every parameter matters"),
    ],
)
def test_bijection_head_has_power(head, message):
    with pytest.raises(AssertionError, match=rf"head broken \[{message}\]"):
        testing.bijection_head(head().double())


class NotStatic(Head):
    """Its support moves with phi."""

    num_params, support = 1, constraints.positive

    def forward(self, phi, first=0):
        return dist.Uniform(phi[..., 0], phi[..., 0] + 1, validate_args=False)


class ByItsNeighbours(Head):
    num_params = 1

    def forward(self, phi, first=0):
        return dist.Normal(phi[..., 0] - phi[..., 0].mean(-1, keepdim=True), 1.0, validate_args=False)


class Overflows(Head):
    num_params = 2

    def forward(self, phi, first=0):
        return dist.Normal(phi[..., 0], phi[..., 1].exp(), validate_args=False)


class Unread(Head):
    num_params = 2

    def forward(self, phi, first=0):
        return dist.Normal(phi[..., 0], 1.0, validate_args=False)


class Rooted(distributions.BetaGaussian):
    """Its gradient is NaN outside the support."""

    def log_prob(self, value):
        share = ((value - self.loc) / self.radius) ** 2
        return super().log_prob(value) + torch.where(share < 1, 0 * (1 - share).sqrt(), 0)


class UndefinedOutside(Head):
    num_params, truncates, family = 2, True, Rooted

    def forward(self, phi, first=0):
        return self.family(phi[..., 0], phi[..., 1].tanh().exp(), validate_args=False)


class Pulled(distributions.BetaGaussian):
    """Its gradient is not zero outside the support."""

    def log_prob(self, value):
        return super().log_prob(value) + self.loc - self.loc.detach()


class SteepOutside(UndefinedOutside):
    family = Pulled


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (SteepOutside, "-inf with gradient 0"),
        (UndefinedOutside, "neither finite nor -inf"),
        (NotStatic, "support holds samples"),
        (ByItsNeighbours, "site 0 alone"),
        (Overflows, "at phi = "),
        (Unread, "every parameter matters"),
    ],
)
def test_distribution_head_has_power(head, message):
    with pytest.raises(AssertionError, match=f"head broken .*{message}"):
        testing.distribution_head(head())
