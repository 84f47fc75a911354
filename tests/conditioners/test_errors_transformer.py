"""Wrong inputs of Transformer, by the text of their errors."""

import pytest
import torch

from pyro_genexact.conditioners import MADE, Independent, Markov, Transformer
from pyro_genexact.contexts import Covariates, PaddedSequence, Source


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: Transformer((), 2, width=20, num_heads=4),
            r"Expected width divisible by 2 \* num_heads == 8 \(rotary embedding\); got 20\.",
        ),
        (
            lambda: Transformer((), 2, width=24, num_heads=4, grid=(2, 3)),
            r"Expected width divisible by 4 \* num_heads == 16 \(rotary embedding\); got 24\.",
        ),
        (lambda: Transformer((), 2, grid=(2,)), r"Expected grid == \(H, W\) \(rows and columns .*; got \(2,\)\."),
        (lambda: Transformer((), 2, grid=(2, 0)), r"Expected grid to be a sequence of integers >= 1; got \(2, 0\)\."),
        (lambda: Transformer((), 2, grid=6), r"Expected grid to be a sequence of integers >= 1; got 6\."),
        (
            lambda: Transformer((), 2, grid=(2, 3), max_len=6),
            r"Expected max_len=None \(a grid has H \* W sites\); got 6\.",
        ),
        (lambda: Transformer((), 2, window=0), r"Expected window to be an integer >= 1; got 0\."),
        (lambda: Transformer((), 2, max_len=0), r"Expected max_len to be an integer >= 1; got 0\."),
        (lambda: Transformer((), 2, depth=0), r"Expected depth to be an integer >= 1; got 0\."),
        (lambda: Transformer((), 2, num_heads=(4,)), r"Expected num_heads to be an integer >= 1; got \(4,\)\."),
        (lambda: Transformer((), 2, dropout=1.0), r"Expected 0 <= dropout < 1; got 1\.0\."),
        (lambda: Transformer((), 2, dropout=-0.1), r"Expected 0 <= dropout < 1; got -0\.1\."),
        (lambda: Transformer([3, 3], 2), r"Expected site to be one kind, the same at every site; got \[3, 3\]\."),
        (lambda: Transformer((), 2, context=-1), r"Expected context to be an integer >= 0; got -1\."),
        (lambda: Source(0), r"Expected features to be an integer >= 1; got 0\."),
        (lambda: MADE(3, 2, context=Source(2)), r"Expected context to be an integer >= 0; got Source\(features=2\)\."),
        (lambda: Markov((), 2, order=1, context=Source(2)), r"Expected context to be .* got Source\(features=2\)\."),
        (lambda: Independent(3, 2, context=Source(2)), r"Expected context to be .* got Source\(features=2\)\."),
    ],
)
def test_errors_of_construction(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def short(**options):
    return Transformer((), 2, width=8, num_heads=2, depth=1, **(options or {"max_len": 4}))


@pytest.mark.parametrize("net", [short(), short(grid=(2, 2))])
def test_errors_of_length(net):
    assert net(torch.zeros(2, 4)).shape == (2, 4, 2)
    with pytest.raises(
        ValueError,
        match=r"Expected y\.shape\[1\] <= 4 \(the conditioner has max_len == 4\); got \(2, 5\)\.",
    ):
        net(torch.zeros(2, 5))
    state = net.start(None, 2)[1]
    with pytest.raises(ValueError, match=r"Expected y\.shape\[1\] <= 3 .*; got \(2, 4\)\."):
        net.extend(torch.zeros(2, 4), state)
    state = net.extend(torch.zeros(2, 2), state)[1]  # the error has not consumed it
    with pytest.raises(ValueError, match=r"Expected y\.shape\[1\] <= 1 .*; got \(2, 2\)\."):
        net.extend(torch.zeros(2, 2), state)
    state = net.extend(torch.zeros(2, 1), state)[1]
    assert net.extend(torch.zeros(2, 1), net.reorder(net.start(None, 2)[1], torch.tensor([1, 0])))[0].shape == (2, 1, 2)
    with pytest.raises(ValueError, match=r"Expected y\.shape\[1\] <= 0 .*; got \(2, 1\)\."):
        net.extend(torch.zeros(2, 1), state)


@pytest.mark.parametrize("with_grad", [True, False])
def test_errors_of_states(with_grad):
    net = short()
    with torch.set_grad_enabled(with_grad):
        state = net.start(None, 3)[1]
        for rows in (1, 2):
            with pytest.raises(
                ValueError, match=rf"Expected y\.shape\[0\] == 3 \(rows of the state\); got \({rows}, 1\)\."
            ):
                net.extend(torch.zeros(rows, 1), state)
        net.extend(torch.zeros(3, 1), state)
        for again in (lambda: net.extend(torch.zeros(3, 1), state), lambda: net.reorder(state, torch.tensor([0]))):
            with pytest.raises(RuntimeError, match="Expected a fresh state"):
                again()


def test_errors_of_contexts():
    net = Transformer((), 2, context=3, width=8, num_heads=2)
    with pytest.raises(ValueError, match=r"Expected context\.shape\[0\] == 2 \(rows of the batch\); got \(1, 3\)\."):
        net(torch.zeros(2, 4), torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"Expected context to be a tensor; got PaddedSequence\."):
        net(torch.zeros(2, 4), PaddedSequence(torch.zeros(2, 4, 3), torch.tensor([1, 2])))
    net = Transformer((), 2, context=Covariates(3), width=8, num_heads=2)
    with pytest.raises(ValueError, match=r"Expected context\.shape\[1\] >= 4"):
        net(torch.zeros(2, 4), torch.zeros(2, 3, 3))
