"""Heads of bijections."""

import pytest
import torch

from pyro_genexact import Head, heads, testing, transforms


def test_bijection_head(head):
    testing.bijection_head(head)


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
