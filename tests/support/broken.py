"""Bijections that break a law, for the tests that the laws find them."""

from __future__ import annotations

from torch.distributions import constraints

from pyro_genexact.transforms import Affine


class OntoPositive(Affine):
    domain, codomain = constraints.real, constraints.positive


class WrongInverse(Affine):
    def _inverse(self, y):
        return super()._inverse(y) + 1e-3
