"""Semirings and the recursion over linear chains, to compute sums over all label sequences.

:class:`ChainPotentials` define the log-weight of each label sequence y_1 ... y_N as a sum of potentials,

    score(y) = initial[y_1] + sum_t unary[t, y_t] + sum_t transition[t, y_t, y_{t+1}] + final[y_N],

and :func:`fold` sums over all V^N sequences in N steps of O(V^2) operations by the distributive law. The semiring
defines the sum: :class:`LogSumExp` computes log Z, :class:`Max` the best score, :class:`KMax` the k best scores,
:class:`Count` the number of possible sequences, and :class:`Expectation` an expected value. :func:`trace` selects a
sequence backwards from the last site: the best one, or with :class:`Draw` a random one with its exact probability.

References: Goodman, "Semiring parsing", Computational Linguistics 1999; Eisner, "Parameter estimation for probabilistic
finite-state transducers", ACL 2002; Rush, "Torch-Struct: Deep structured prediction library", ACL 2020.
"""

from .chains.semirings import (
    ChainPotentials,
    Count,
    Draw,
    Expectation,
    KMax,
    LogSumExp,
    Max,
    Semiring,
    fold,
    mean,
    trace,
    trace_k,
)
from .core.faces import publish

__all__ = [
    "ChainPotentials",
    "Count",
    "Draw",
    "Expectation",
    "KMax",
    "LogSumExp",
    "Max",
    "Semiring",
    "fold",
    "mean",
    "trace",
    "trace_k",
]

publish(globals())
