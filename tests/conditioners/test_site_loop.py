"""The loop over sites against the parallel pass: from the start or after a prefix, with rows that leave and multiply."""

import pytest
import torch

from pyro_genexact import conditioners
from pyro_genexact.conditioners.site_loop import SiteLoop, advance
from support.values import built, sized

NETS = {
    "made": lambda: conditioners.MADE(5, 2, context=3, hidden=(8,)),
    "recurrent": lambda: conditioners.Recurrent((), 2, hidden=4, context=3),
    "markov": lambda: conditioners.Markov((), 2, order=2, hidden=(4,), context=3),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("given", [0, 1, 3])
def test_parameters_are_those_of_the_parallel_pass(net, given, monkeypatch):
    net, y, context, read = built(NETS[net]()), sized(4, 5), sized(4, 3, seed=1), []
    expected, extend = net(y, context), net.extend
    monkeypatch.setattr(net, "extend", lambda y, state: (read.append(y.shape[1]), extend(y, state))[1])
    loop, rows = SiteLoop(net, context, 4, 5, y[:, :given]), torch.arange(4)
    assert loop.first == given
    for t, phi in loop:
        torch.testing.assert_close(phi, expected[rows, t : t + 1], rtol=1e-12, atol=1e-12)
        kept = torch.tensor([2, 0, 0, 1])[: len(rows) - (t == 3)] if t % 2 else None
        rows = rows if kept is None else rows[kept]
        loop.read(y[rows, t : t + 1], kept)
    assert t == 4 and loop.state.position == 4  # the last site is not read
    assert sum(read) == 4  # each of the others once


def test_rows_that_multiply_before_the_first_site():
    net, y, context = built(NETS["made"]()), sized(2, 5), sized(2, 3, seed=1)
    loop, index = SiteLoop(net, context, 2, 5), torch.tensor([1, 0, 1])
    loop.take(index)
    for t, phi in loop:
        torch.testing.assert_close(phi, net(y, context)[index, t : t + 1], rtol=1e-12, atol=1e-12)
        loop.read(y[index, t : t + 1])


def test_branches_leave_the_state_as_it_is():
    net, y, context = built(NETS["recurrent"]()), sized(2, 5), sized(2, 3, seed=1)
    _, state = net.start(context, 2)
    expected = net(y, context)
    for rows in (torch.tensor([1]), torch.tensor([0, 1, 0])):
        phi, _ = advance(net, y[rows, :2], state, rows)
        torch.testing.assert_close(phi, expected[rows, 1:3], rtol=1e-12, atol=1e-12)
