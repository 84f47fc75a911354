"""Heads of bijections and of distributions."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_genexact import Head, heads, testing, transforms

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


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Clamped, "site 1 alone"),
        (Offset, "near the identity"),
        (Falling, "near the identity|increasing"),
        (WrongDerivative, "log-derivative"),
        (Unused, "every parameter matters"),
    ],
)
def test_bijection_head_has_power(head, message):
    with pytest.raises(AssertionError, match=f"head broken .*({message})"):
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


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (NotStatic, "support holds samples"),
        (ByItsNeighbours, "site 0 alone"),
        (Overflows, "at phi = "),
        (Unread, "every parameter matters"),
    ],
)
def test_distribution_head_has_power(head, message):
    with pytest.raises(AssertionError, match=f"head broken .*{message}"):
        testing.distribution_head(head())
