"""Wrong inputs of conditioners, by the text of their errors."""

import pytest
import torch

from pyro_genexact.conditioners import CausalConv, StateSpace
from pyro_genexact.conditioners.independent import Independent
from pyro_genexact.conditioners.made import MADE
from pyro_genexact.conditioners.markov import Markov
from pyro_genexact.conditioners.nade import NADE
from pyro_genexact.conditioners.recurrent import Recurrent
from pyro_genexact.contexts import Covariates
from pyro_genexact.testing import conditioner_inputs
from support.registry import CONDITIONERS


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: Recurrent((), 2, cell="rnn"), r"Expected cell in \['elman', 'gru', 'lstm'\]; got 'rnn'\."),
        (lambda: Recurrent((), 2, dropout=1.0), r"Expected 0 <= dropout < 1; got 1\.0\."),
        (lambda: CausalConv((), 2, dilations=()), r"Expected dilations of at least one layer; got \(\)\."),
        (lambda: CausalConv((), 2, kernel=0), r"Expected kernel to be an integer >= 1; got 0\."),
        (
            lambda: StateSpace((), 2, kind="s5"),
            r"Expected kind in \['diagonal', 'selective'\]; got 's5'\.",
        ),
        (
            lambda: StateSpace((), 2, frequencies="log"),
            r"Expected frequencies in \['linear', 'inverse'\]; got 'log'\.",
        ),
        (
            lambda: StateSpace((), 2, step_sizes=(0.1, 0.01)),
            r"Expected step_sizes to be two positive numbers in order; got \(0\.1, 0\.01\)\.",
        ),
        (
            lambda: StateSpace((), 2, step_sizes=0.1),
            r"Expected step_sizes to be two positive numbers in order; got 0\.1\.",
        ),
        (
            lambda: StateSpace((), 2, step_sizes=(0.1, float("inf"))),
            r"two positive numbers in order; got \(0\.1, inf\)",
        ),
        (
            lambda: StateSpace((), 2, context=3).start(torch.zeros(2, 3), 5),
            r"Expected context\.shape\[0\] == 5 \(rows of the batch\); got \(2, 3\)\.",
        ),
        (lambda: StateSpace([3, 3], 2), r"Expected site to be one kind, the same at every site; got \[3, 3\]\."),
        (
            lambda: StateSpace((3,), 2)(torch.zeros(2, 4)),
            r"Expected y\.shape\[2:\] == \(3,\) \(sites and site shape of StateSpace\); got \(2, 4\)",
        ),
        (lambda: MADE(3, 2, dropout=1.0), r"Expected 0 <= dropout < 1; got 1\.0\."),
        (lambda: Recurrent(3, 2, hidden=(4,)), r"Expected hidden to be an integer >= 1; got \(4,\)\."),
        (lambda: Recurrent(3, 2, width=(4,)), r"Expected width to be an integer >= 1; got \(4,\)\."),
        (lambda: Recurrent((), (2,)), r"Expected num_params to be an integer >= 1; got \(2,\)\."),
        (lambda: Recurrent((), 2, context=(3,)), r"Expected context to be an integer >= 0; got \(3,\)\."),
        (lambda: NADE(3, 2, hidden=[4]), r"Expected hidden to be an integer >= 1; got \[4\]\."),
        (lambda: NADE(3, 2, context=[4]), r"Expected context to be an integer >= 0; got \[4\]\."),
        (lambda: MADE((3,), 2), r"Expected num_sites to be an integer >= 1; got \(3,\)\."),
        (lambda: Independent(3, [2]), r"Expected num_params to be an integer >= 1; got \[2\]\."),
        (lambda: Markov((), 2, order=(1,)), r"Expected order to be an integer >= 1; got \(1,\)\."),
        (lambda: Recurrent(1.5, 2), r"Expected site to be \(\), \(k,\) or an integer; got 1\.5\."),
        (lambda: Recurrent((2, 3), 2), r"Expected site to be \(\), \(k,\) or an integer; got \(2, 3\)\."),
        (lambda: Markov((2, 3), 2, order=1), r"Expected site to be \(\), \(k,\) or an integer; got \(2, 3\)\."),
        (lambda: NADE(3, 2, site=(2, 3)), r"Expected site to be \(\), \(k,\) or an integer; got \(2, 3\)\."),
        (lambda: MADE(3, 2, site=(2, 3)), r"Expected site to be \(\), \(k,\) or an integer; got \(2, 3\)\."),
        (lambda: Independent(3, 2, site="a"), r"Expected site to be \(\), \(k,\) or an integer; got a\."),
        (lambda: Recurrent((), 2, layers=0), r"Expected layers to be an integer >= 1; got 0\."),
        (lambda: Recurrent([3, 3], 2), r"Expected site to be one kind, the same at every site; got \[3, 3\]\."),
        (lambda: Recurrent(0, 2), r"Expected site to be an integer >= 1; got 0\."),
        (lambda: Recurrent((), 2, context=-1), r"Expected context to be an integer >= 0; got -1\."),
        (lambda: Markov((), 2, order=0), r"Expected order to be an integer >= 1; got 0\."),
        (lambda: Markov((), 2, order=1, hidden=8), r"Expected hidden to be a sequence of integers >= 1; got 8\."),
        (lambda: NADE(3, 2, activation=0), r"Expected activation to be a function; got 0\."),
        (
            lambda: NADE(3, 2, site=[3, ()]),
            r"Expected site to be one kind or a list of 3 scalar kinds, .*; got \[3, \(\)\]",
        ),
        (
            lambda: NADE(3, 2, context=Covariates(2)),
            r"Expected context to be an integer >= 0; got Covariates\(features=2\)\.",
        ),
        (lambda: Independent(0, 2), r"Expected num_sites to be an integer >= 1; got 0\."),
        (
            lambda: Recurrent(4, 2)(torch.tensor([[1, 4, 0]])),
            r"Expected integers 0 \.\.\. 3 at a site with 4 categories; got 1 \.\.\. 4\.",
        ),
        (
            lambda: Markov(4, 2, order=1)(torch.tensor([[0.5, 0.0]])),
            r"Expected integers 0 \.\.\. 3 at a site with 4 categories; got 0\.5\.",
        ),
        (
            lambda: NADE(3, 2, site=4)(torch.tensor([[1, -1, 0]])),
            r"Expected integers 0 \.\.\. 3 at a site with 4 categories; got -1 \.\.\. 1\.",
        ),
        (
            lambda: NADE(4, 2, site=[(), 3, 2, ()])(torch.tensor([[9.0, 2.0, 2.0, 0.0]])),
            r"Expected integers 0 \.\.\. 1 at a site with 2 categories; got 2 \.\.\. 2\.",
        ),
        (
            lambda: NADE(4, 2, site=[(), 3, 2, ()])(torch.tensor([[9.0, 1.5, 1.0, 0.0]])),
            r"Expected integers 0 \.\.\. 2 at a site with 3 categories; got 1\.5\.",
        ),
        (
            lambda: NADE(3, 2)(torch.zeros(2, 4)),
            r"Expected y\.shape\[1:\] == \(3,\) \(sites and site shape of NADE\); got \(2, 4\)",
        ),
        (
            lambda: Recurrent((3,), 2)(torch.zeros(2, 4)),
            r"Expected y\.shape\[2:\] == \(3,\) \(sites and site shape of Recurrent\); got \(2, 4\)",
        ),
        (
            lambda: Recurrent((), 2)(torch.zeros(2, 4, dtype=torch.float64)),
            r"Expected y\.dtype == torch\.float32 \(that of the parameters\); got torch\.float64\.",
        ),
        (
            lambda: Recurrent((), 2, context=3)(torch.zeros(2, 4)),
            r"Expected a context \(\*batch, 3\) \(Recurrent built with context=3\); got none\.",
        ),
        (
            lambda: Markov((), 2, order=1, context=Covariates(3))(torch.zeros(2, 4), torch.zeros(2, 4, 2)),
            r"Expected context\.shape\[-1\] == 3 \(Markov built with context=Covariates\(3\)\); got \(2, 4, 2\)\.",
        ),
        (
            lambda: Recurrent((), 2, context=Covariates(3))(torch.zeros(2, 4), torch.zeros(2, 3, 3)),
            r"Expected context\.shape\[1\] >= 4 \(covariates of all sites\); got \(2, 3, 3\)\.",
        ),
        (
            lambda: Independent(4, 2, context=Covariates(3))(torch.zeros(2, 4), torch.zeros(2, 5, 3)),
            r"Expected context\.shape\[1\] == 4 \(covariates of all sites\); got \(2, 5, 3\)\.",
        ),
        (
            lambda: MADE(3, 2, site=[3, 3, 2]).permuted(torch.arange(3)),
            r"Expected site to be one kind, to permute the sites of MADE; got \[3, 3, 2\]\.",
        ),
        (
            lambda: MADE(3, 2, adjacency=torch.ones(3, 3).tril(-1).bool()).permuted(torch.arange(3)),
            r"Expected adjacency=None \(an adjacency matrix refers to sites, so sites cannot be permuted\); got a matrix",
        ),
        (
            lambda: NADE(3, 2).permuted(torch.tensor([0, 2, 2])),
            r"Expected order to be a permutation of 0 \.\.\. 2 \(the sites\); got \[0, 2, 2\]\.",
        ),
        (
            lambda: Independent(3, 2).permuted(torch.arange(4)),
            r"Expected order to be a permutation of 0 \.\.\. 2 \(the sites\); got \[0, 1, 2, 3\]\.",
        ),
    ],
)
def test_errors(run, message):
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((2, 3), r"Expected y\.shape\[1\] between 1 and 2 \(0 of 3 sites have been read, .*; got \(2, 3\)\."),
        ((2, 0), r"Expected y\.shape\[1\] between 1 and 2"),
        ((2, 1, 5), r"Expected y\.shape\[2:\] == \(\) \(site shape of \w+\); got \(2, 1, 5\)\."),
    ],
)
@pytest.mark.parametrize("kind", [MADE, NADE, Independent])
def test_errors_of_extend(kind, sites, message):
    net = kind(3, 2)
    _, state = net.start(None, 2)
    with pytest.raises(ValueError, match=message):
        net.extend(torch.zeros(sites), state)


@pytest.mark.parametrize("name", ["Recurrent gru steps", "Markov steps"])
def test_bad_input_does_not_consume(name):
    net = CONDITIONERS[name]()
    y, x = conditioner_inputs(net)
    _, state = net.start(x, len(y))
    for bad in (y, y[:, :0], y[:, :1].unsqueeze(-1).expand(*y[:, :1].shape, 5)):
        with pytest.raises(ValueError):
            net.extend(bad, state)
    torch.testing.assert_close(net.extend(y[:, :-1], state)[0], net(y, x)[:, 1:])
