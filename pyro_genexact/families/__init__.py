"""Distributions of one site: new families, corrected versions of Pyro's families, exact supports, cdfs and quantiles."""
