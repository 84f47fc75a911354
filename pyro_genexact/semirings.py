r"""Public names of the semirings and the recursion over linear chains, and what they compute.

A :class:`ChainPotentials` gives every labelling y_1 ... y_N the weight of a product of factors, written as a sum of log-potentials,

    score(y) = initial[y_1] + sum_t unary[t, y_t] + sum_t transition[t, y_t, y_{t+1}] + final[y_N],

and :func:`fold` adds up all V^N of them in N steps of V^2 work by the distributive law. With :class:`LogSumExp` the total is
the log-normaliser, with :class:`Max` the best score, with :class:`KMax` the best k, with :class:`Count` the number of
labellings, with :class:`Expectation` an expected value. :func:`trace` walks back from the end and picks a labelling: the best
one, or with :class:`Draw` one at random with its exact probability.

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
