"""Autoregressive distributions: a fixed number of sites, or sequences of random length."""
