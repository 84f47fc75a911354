"""Diagnostics for fitted models: reliability of guides, calibration, held-out scores, and conversion to ArviZ.

For posteriors, :func:`psis` computes importance weights of a guide's draws, :func:`inference_data` converts draws to ArviZ's
format, and :func:`sbc_ranks` checks calibration on simulated data. For densities, :func:`held_out` and :func:`compare` score
held-out rows, and :func:`pit` and :func:`plot_uniformity` check calibration. :func:`central_intervals` and :func:`plot_fan`
summarise draws of either.
"""

from ..core.faces import publish
from .calibration import pit, plot_uniformity, sbc_ranks
from .data import inference_data
from .importance import Importance, psis
from .intervals import central_intervals, plot_fan
from .scores import Comparison, HeldOut, compare, held_out

__all__ = [
    "Comparison",
    "HeldOut",
    "Importance",
    "central_intervals",
    "compare",
    "held_out",
    "inference_data",
    "pit",
    "plot_fan",
    "plot_uniformity",
    "psis",
    "sbc_ranks",
]

publish(globals())
