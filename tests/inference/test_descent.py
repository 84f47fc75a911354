"""Steps of guides: averaged, best and first weights, returns, and gradients cut by their usual norm."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from pyro_genexact.inference.descent import SLOWER, Descent


def stepped(max_ratio=math.inf, norms=(1.0,)):
    """A descent after steps of SGD with momentum, rate 1, along gradients of these norms; its parameter starts at 0."""
    p = torch.zeros(1, requires_grad=True)
    descent, lengths = Descent(partial(torch.optim.SGD, lr=1.0, momentum=0.9), None, max_ratio), []
    descent.meet({p: "p"})
    for norm in norms:
        p.grad = torch.full((1,), norm)
        descent.step(1.0, norm, 1.0)
        lengths.append(p.grad.item())
    return p, descent, lengths


@pytest.mark.parametrize(("first", "kept", "expected"), [(1.0, -1.0, (0.0, None)), (1.3, 0.0, (1.3, 0.0))])
def test_the_start_is_kept_if_it_is_better_by_two_standard_errors(first, kept, expected):
    p, descent, _ = stepped()
    assert descent.keep_best(lambda: (first, 0.6) if p.item() == 0 else (0.0, 0.6)) == expected
    assert p.item() == kept


def test_a_return_forgets_the_momentum_and_shortens_the_steps():
    p, descent, _ = stepped(norms=(1.0, 1.0))
    assert p.item() == pytest.approx(-2.9)
    descent.go_back(lambda: p.item() > -2)  # the averages, which are the last weights here, are of no use
    assert p.item() == 0
    p.grad = torch.ones(1)
    descent.step(1.0, 1.0, 1.0)
    assert p.item() == pytest.approx(-SLOWER)


def test_gradients_are_cut_by_their_usual_norm():
    _, _, lengths = stepped(10.0, (1.0, 5.0, 100.0))
    assert lengths == pytest.approx([1.0, 5.0, 10 * (0.98 + 0.02 * 5)])
