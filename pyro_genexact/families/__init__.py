"""Distributions of one site: new families, corrected versions of Pyro's, exact supports, cdfs and quantiles."""
