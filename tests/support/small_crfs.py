"""CRFs of two rows, ragged or not, validated or not, for the tests of their errors."""

import torch

import pyro_genexact as gx
from support.checks import fails

NAN, INF = torch.nan, torch.inf
UNARY, STEP = torch.zeros(2, 4, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
RAGGED = torch.tensor([4, 2])


def zeros(*shape, **options):
    return torch.zeros(shape, **{"dtype": torch.float64, **options})


def with_entry(values, entry, *index):
    values = values.clone()
    values[index] = entry
    return values


def crf(unary=UNARY, transition=STEP, **options):
    return gx.LinearChainCRF(unary, transition, **options)


DISTRIBUTIONS = {
    "checked": lambda: crf(validate_args=True),
    "unchecked": lambda: crf(validate_args=False),
    "ragged": lambda: crf(lengths=RAGGED, validate_args=True),
    "ragged, unchecked": lambda: crf(lengths=RAGGED, validate_args=False),
}


def fail_all(kind, text, query, *arguments):
    for make in DISTRIBUTIONS.values():
        fails(kind, text, getattr(make(), query), *arguments)


IMPOSSIBLE = with_entry(UNARY, -INF, 1, 2)
LOOP = with_entry(zeros(3, 3) - INF, 0.0, (0, 1, 2), (0, 1, 2))  # every label must stay
