"""Distributions that a call returns, as ordinary Pyro distributions."""

from pyro.distributions import TransformedDistribution

__all__ = ["TransformedDistribution"]
