"""Diagnostics for fitted models: reliability of guides, calibration, held-out scores, and conversion to ArviZ.

For posteriors, :func:`psis` computes importance weights of a guide's draws, :func:`pathfinder` approximates the posterior
without a guide, :func:`inference_data` converts draws to ArviZ's
format, :func:`sbc_ranks` and :func:`tarp` check calibration on simulated data, :func:`predictive_data` and
:func:`predictive_p_values` compare new data with the observed ones, and :func:`c2st` compares draws with those of a
reference. For densities, :func:`held_out` and :func:`compare` score held-out rows, :func:`bits_per_dim` converts scores of images to their usual unit, and :func:`pit` and
:func:`plot_uniformity` check calibration. :func:`central_intervals` and :func:`plot_fan` summarise draws of either.
"""

from ..core.faces import publish
from .calibration import pit, plot_coverage, plot_uniformity
from .data import inference_data
from .importance import Importance, psis
from .intervals import central_intervals, plot_fan
from .pathfinder import pathfinder
from .posteriors import sbc_ranks, tarp
from .predictive import predictive_data, predictive_p_values
from .scores import Comparison, HeldOut, bits_per_dim, compare, held_out
from .two_samples import c2st

__all__ = [
    "Comparison",
    "HeldOut",
    "Importance",
    "bits_per_dim",
    "c2st",
    "central_intervals",
    "compare",
    "held_out",
    "inference_data",
    "pathfinder",
    "pit",
    "plot_coverage",
    "plot_fan",
    "plot_uniformity",
    "predictive_data",
    "predictive_p_values",
    "psis",
    "sbc_ranks",
    "tarp",
]

publish(globals())
