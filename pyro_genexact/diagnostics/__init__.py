"""Diagnostics of a fit: trust in a guide, calibration, held-out scores, and the bridge to ArviZ.

Of a posterior: :func:`psis` weighs a guide's draws, :func:`inference_data` hands them to ArviZ, :func:`sbc_ranks` checks
them on simulated data. Of a density: :func:`held_out` and :func:`compare` score rows kept aside, :func:`pit` calibrates.
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
