"""The weights that a fit keeps."""

from __future__ import annotations

import math

import torch
from torch import nn

from pyro_genexact.inference.kept import Kept


def test_each_kind_has_its_own_best_until_the_best_of_all_is_loaded():
    module = nn.Linear(1, 1, bias=False)
    kept = Kept(module, 2)
    assert not kept.load() and kept.epoch == -1

    def record(kind, score, epoch, weight):
        nn.init.constant_(module.weight, weight)
        return kept.record(kind, score, epoch)

    assert record(0, -3.0, 0, 1.0) and record(1, -5.0, 0, 2.0)
    assert record(1, -4.0, 1, 3.0)  # below the best of the other kind
    assert not record(0, math.nan, 1, 4.0) and not record(0, -3.5, 1, 4.0)
    assert kept.epoch == 0 and kept.load() and module.weight.item() == 1
    assert not record(1, -3.5, 2, 5.0)  # the best of all is now that of each kind
    assert record(1, -2.0, 3, 6.0) and kept.epoch == 3
    other = Kept(module, 2)
    other.load_state_dict(kept.state_dict())
    nn.init.zeros_(module.weight)
    assert other.load() and torch.equal(module.weight, torch.full((1, 1), 6.0))
