"""Gradients of hidden Markov models: by enumeration, Fisher's identity, padding, poles, torch.func."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import pyro_genexact as gx
from support.hidden_markov import made, of_paths, parameters, spread
from support.values import sized

F64, INF, NAN = torch.float64, float("inf"), float("nan")


@pytest.mark.parametrize("lengths", [None, [3, 1]])
@pytest.mark.parametrize("steps", [None, 2])
def test_gradients(steps, lengths):
    given = [p.requires_grad_() for p in parameters(2, 3, (2,), steps)]
    lengths = None if lengths is None else torch.tensor(lengths)
    x = sized(2, 3, seed=7).requires_grad_()

    def log_prob(*values):
        return made("normal", values, 3, lengths=lengths).log_prob(x if len(values) == 3 else values[3])

    assert gradcheck(log_prob, (*given, x))
    assert gradgradcheck(log_prob, (*given, x))
    assert gradcheck(lambda *values: made("normal", values, 3, lengths=lengths).filter(x), given)
    assert gradcheck(lambda *values: made("normal", values, 3, lengths=lengths).mean, given)


def test_gradient_is_the_posterior_expectation():
    """Fisher's identity, the gradient that an EM step sets to zero: E[gradient of log p(x, z) | x], here over all paths."""
    given = [p.requires_grad_() for p in parameters(3, 4)]
    d = made("normal", given, 4)
    x = d.sample()
    joint = of_paths("normal", given, x)[1]
    share = joint.detach().softmax(0)
    expected = torch.autograd.grad((share * joint).sum(), given)
    for ours, theirs in zip(torch.autograd.grad(d.log_prob(x), given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_padding_has_no_gradient():
    given = [p.requires_grad_() for p in parameters(3, 5, (2,), 4)]
    x = made("gamma", given, 5).sample()
    x[0, 3:], x[1, 1:] = NAN, -1.0
    x.requires_grad_()
    d = made("gamma", given, 5, lengths=torch.tensor([3, 1]), validate_args=True)
    for value in (d.log_prob(x), d.filter(x).sin(), d.posterior(x).entropy()):
        grads = torch.autograd.grad(value.sum(), [*given, x], retain_graph=True)
        assert all(g.isfinite().all() for g in grads)
        assert grads[3][0, 3:].eq(0).all() and grads[3][1, 1:].eq(0).all() and grads[3][0, :3].ne(0).all()
        assert grads[1][0, 2:].eq(0).all() and grads[1][1].eq(0).all() and grads[1][0, :2].ne(0).any()


def test_what_padding_holds_is_never_looked_at():
    given = parameters(3, 5, (2,), 4)
    d = made("normal", given, 5, lengths=torch.tensor([3, 0]))
    x = sized(2, 5, seed=7)
    gone = torch.arange(5) >= torch.tensor([[3], [0]])
    far = x.masked_fill(gone, 1e30).requires_grad_()
    for query in (d.log_prob, d.filter):
        assert query(far).equal(query(x)) and query(x)[0].ne(0).any()
        grad = torch.autograd.grad(query(far).sin().sum(), far)[0]
        assert grad[gone].eq(0).all() and grad[~gone].ne(0).all()


@pytest.mark.parametrize("zeros", [False, True])
def test_gradient_of_filter(zeros):
    """Against sums over all paths of each beginning, by autograd."""
    given = [p.requires_grad_() for p in parameters(3, 4, (3,), 3, zeros)]
    lengths, weight = torch.tensor([4, 2, 0]), sized(3, 4, 3, seed=8)
    x = sized(3, 4, seed=7)
    filtered = made("normal", given, 4, lengths=lengths).filter(x)
    expected = torch.zeros(3, 4, 3, dtype=F64)
    for n, length in enumerate(lengths.tolist()):
        for t in range(length):
            z, joint = of_paths("normal", [p[n] for p in given], x[n, : t + 1])
            possible = joint.isfinite()
            shares = spread(joint[possible].softmax(0), z[possible], 3)
            expected = expected.index_put((torch.tensor(n), torch.tensor(t)), shares[-1])
    torch.testing.assert_close(filtered, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad((weight * f).sum(), given) for f in (filtered, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert b.ne(0).any()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_filter_of_a_beginning_that_the_end_refutes(dtype):
    """What is certain at a site may weigh nothing in the whole sequence."""
    stay = torch.eye(2, dtype=dtype).log()
    emitted = dist.Normal(torch.tensor([0.0, 1.0], dtype=dtype), 1.0)
    d = gx.HiddenMarkov(torch.zeros(2, dtype=dtype), stay, emitted, duration=40)
    x = torch.full((40,), -50.0, dtype=dtype)
    x[0], x[35] = 800.0, 5000.0
    odds = (x.double() - 0.5).cumsum(0)  # of state 1, its log-density less that of state 0
    expected = torch.stack([torch.sigmoid(-odds), torch.sigmoid(odds)], -1)
    torch.testing.assert_close(d.filter(x), expected.to(dtype), rtol=1e-6, atol=1e-300)
    assert d.filter(x)[34].tolist() == [1.0, 0.0] == d.filter(x)[20].round(decimals=30).tolist()
    assert d.posterior(x).marginals[:, 1].eq(1).all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("lengths", [None, [3, 1]])
def test_under_torch_func_and_when_traced(lengths):
    """As row by row, with values that some states, or all, cannot show."""
    initial, transition = parameters(2, 3)[:2]
    lengths = None if lengths is None else torch.tensor(lengths)
    emitted = dist.Pareto(
        torch.tensor([1.0, 2.0], dtype=F64), 3.0, validate_args=False
    )  # its own density does not end at the bound
    d = gx.HiddenMarkov(initial, transition, emitted, lengths, duration=3, validate_args=False)
    inside = torch.tensor([[[2.5, 3.2, 2.9], [4.3, 2.3, 2.3]], [[2.5, 1.5, 3.2], [1.1, 4.1, 1.9]]], dtype=F64)
    wrong = torch.tensor([[2.5, 1.5, 2.5], [2.5, 0.5, 2.5]], dtype=F64)
    for query in (d.log_prob, d.filter):
        expected = torch.stack([query(x) for x in inside])
        torch.testing.assert_close(torch.func.vmap(query)(inside), expected)
        traced = torch.jit.trace(query, inside[0], check_trace=False)
        torch.testing.assert_close(traced(inside[1]), expected[1])
    torch.testing.assert_close(torch.jit.trace(d.log_prob, inside[0], check_trace=False)(wrong), d.log_prob(wrong))
    filtered = torch.func.vmap(d.filter)(wrong.unsqueeze(0))[0, 1]
    if lengths is None:  # NaN from the first site on that cannot be
        assert filtered[0].isfinite().all() and filtered[1:].isnan().all()
        with pytest.raises(ValueError, match=r"got none for row \(1,\)"):
            d.filter(wrong)
    else:
        assert filtered.equal(d.filter(wrong)[1])
    checked = gx.HiddenMarkov(initial, transition, emitted, lengths, duration=3, validate_args=True)
    torch.testing.assert_close(torch.func.vmap(checked.log_prob)(inside), d.log_prob(inside))


def test_poles_of_densities():
    """Where a path that is possible meets one the density is infinite; the posterior is none, which validation says."""
    concentration = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    stay = torch.eye(2, dtype=F64).log()
    d = gx.HiddenMarkov(
        torch.zeros(2, dtype=F64),
        stay,
        dist.Gamma(concentration, 1.0, validate_args=False),
        duration=2,
        validate_args=False,
    )
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [1.0, 2.0]], dtype=F64)
    log_prob = d.log_prob(x)
    assert log_prob.tolist()[:3] == [INF, -INF, INF]
    assert log_prob[3] == d.log_prob(x[3])
    torch.testing.assert_close(torch.func.vmap(d.log_prob)(x), log_prob)
    grad, one = (torch.autograd.grad(f, concentration, retain_graph=True)[0] for f in (log_prob.sum(), log_prob[3]))
    assert grad.equal(one)
    assert log_prob[3].exp().item() == pytest.approx(
        dist.Gamma(concentration, 1.0).log_prob(x[3, :, None]).sum(0).exp().mean().item()
    )
    one = gx.HiddenMarkov(
        torch.tensor([-INF, 0.0], dtype=F64), stay, d.observation_dist, duration=2, validate_args=True
    )
    assert one.log_prob(x[0]) == -INF and d.log_prob(torch.tensor([NAN, 0.0], dtype=F64)).isnan().logical_not()
    with pytest.raises(ValueError, match="Expected unary to be finite or -inf; got inf"):
        one.posterior(x[0])
