"""Distributions of one site, and what they are made of: closed forms, exact supports, repaired families."""
