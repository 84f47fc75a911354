"""Heads of bijections."""

import pytest
import torch

from pyro_genexact import Head, heads, testing, transforms


def test_bijection_head(head):
    testing.bijection_head(head)


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
