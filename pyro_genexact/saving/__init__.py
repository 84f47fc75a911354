"""Saving modules to files and loading them."""
