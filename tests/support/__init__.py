"""Helpers that several tests share: checks, models with their densities by hand, the registry of all public classes."""
