"""Exact distributions as ordinary Pyro distributions."""
