"""Autoregressive distributions: over a fixed number of sites, or over sequences of random length."""
