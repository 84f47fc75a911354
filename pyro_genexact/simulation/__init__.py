"""Posteriors and likelihoods that are learned from simulations of a model."""
