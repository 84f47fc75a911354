"""How long sequences are: rows that end early, and the probability of termination."""

from math import log

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.distributions import TerminationCurve
from support.checks import close, goodness
from support.small_models import bigram
from support.values import F64, built, sized


def of_table(logits, eos=0):
    """Sites that do not depend on each other, log p = log_softmax(logits) (T, V)."""
    T, V = logits.shape
    net = conditioners.Independent(T, V, site=V).double()
    with torch.no_grad():
        net.phi.copy_(logits)
    return gx.Sequence(net, heads.Categorical(V), eos, T)


@pytest.mark.parametrize("prefix", [False, True])
def test_early_stopping(prefix):
    """Geometric lengths of mean 10: hardly more rows times steps than symbols are drawn."""
    table = torch.tensor([[1 / 11, 5 / 11, 5 / 11]]).log().expand(4, 3).clone()
    d = bigram(max_len=512, table=table)().expand((1024,))
    given = 0
    if prefix:
        starts = torch.arange(1024) % 4
        d = d.conditional_on_prefix(torch.ones(1024, 3, dtype=torch.long), starts, max_len=512)
        given = 3 * 1024 - int(starts.sum())  # of rows that wait for those with longer prefixes
    work = d.conditioner.work
    work.clear()
    lengths = d.lengths_of(d.sample())
    tokens = int((lengths + 1).sum())
    assert 9 < lengths.double().mean() < 11
    rows = sum(work) + 1024  # the first site's parameters are those of ``start``
    assert tokens <= rows <= 1.3 * tokens + given
    assert goodness(lengths.clamp(max=60), geometric(61)) > 1e-4


def geometric(cells, p=1 / 11):
    mass = p * (1 - p) ** torch.arange(cells, dtype=F64)
    mass[-1] = (1 - p) ** (cells - 1)
    return mass


def test_all_rows_end_at_once():
    table = torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=F64).expand(4, 3).clone()
    d = bigram(max_len=50, table=table)()
    d.conditioner.work.clear()
    assert not d.sample((100,)).any() and not d.conditioner.work


def test_termination_of_independent_sites_is_exact():
    d = of_table(sized(6, 3))()
    curve = d.termination_curve(num_samples=2)
    assert isinstance(curve, TerminationCurve) and (curve.standard_error == 0).all()
    y = d.enumerate_support()
    p, lengths = d.log_prob(y).exp(), d.lengths_of(y)
    close(curve.probability, torch.stack([p[lengths <= t].sum() for t in range(6)]))
    close(d.termination_curve(num_samples=7).probability, curve.probability)


def log_survival(table, T):
    """log P(length > t), t = 0 ... T - 1, by the forward recursion over the last symbol (0 ends)."""
    p = table.log_softmax(-1).exp()
    going, survival = p[-1, 1:], []
    for _ in range(T):
        survival.append(going.sum())
        going = going @ p[1:-1, 1:]
    return torch.stack(survival).log()


def test_termination_of_a_bigram_is_unbiased_with_calibrated_errors():
    model = bigram()
    truth = -log_survival(model.conditioner.table, 12).expm1().detach()
    d = model(max_len=12)
    y = model().enumerate_support()
    p, lengths = model().log_prob(y).exp(), model().lengths_of(y)
    close(truth[:6], torch.stack([p[lengths <= t].sum() for t in range(6)]).detach())
    curve = d.expand((400,)).termination_curve(num_samples=100)
    assert curve.probability.shape == (400, 12)
    close(curve.probability[:, 0], truth[0].expand(400)), close(curve.standard_error[:, 0], torch.zeros(400).double())
    found, error = curve.probability[:, 1:], curve.standard_error[:, 1:]
    assert ((found.mean(0) - truth[1:]).abs() < 5 * found.std(0) / 20).all()
    assert ((error.square().mean(0) / found.var(0) - 1).abs() < 5 * (2 / 400) ** 0.5 + 0.1).all()


@pytest.mark.parametrize("ragged", [False, True])
def test_termination_of_few_rows_that_have_ended(ragged):
    """One of ten rows: too few to leave the work."""
    model = bigram()
    prefix, lengths = torch.tensor([[2, 0], *[[1, 2]] * 9]), torch.tensor([2, *[1, 2] * 4, 2]) if ragged else None
    curve = model().conditional_on_prefix(prefix, lengths).termination_curve(max_len=8, num_samples=4000)
    table = model.conditioner.table
    truth = torch.stack([-log_survival(torch.cat([table[:-1], table[[last]]]), 8).expm1() for last in (1, 2)]).detach()
    last = torch.full((9,), 2) if lengths is None else lengths[1:]
    assert (curve.probability[0] == 1).all() and (curve.standard_error[0] == 0).all()
    assert ((curve.probability[1:] - truth[last - 1]).abs() <= 5 * curve.standard_error[1:] + 1e-12).all()
    stopped = built(gx.Sequence(conditioners.Recurrent((2,), 3, hidden=4), heads.Stopped(heads.Normal()), None, 5))()
    prefix = torch.tensor([[[0.3, 1.0], [0.0, 0.0]], *[[[0.3, 0.0], [0.2, 0.0]]] * 9], dtype=F64)
    curve = stopped.conditional_on_prefix(prefix, lengths).termination_curve(num_samples=50)
    assert (curve.probability[0] == 1).all() and (curve.standard_error[0] == 0).all()
    assert (curve.probability[1:, :-1] < 1).all() and (curve.probability[1:] > 0).all()


def test_termination_that_is_improbable():
    """1 - 1e-20 is 1, and yet the curve tells 1e-20, twice that after two sites, and how sure it is."""
    table = torch.tensor([[1e-20, 0.5, 0.5]] * 4, dtype=F64).log()
    curve = bigram(table=table)(max_len=3).termination_curve(num_samples=5)
    close(curve.probability / 1e-20, torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    assert (curve.standard_error == 0).all()
    table[1, 0] = log(3e-20)
    curve = bigram(table=table)(max_len=2).termination_curve(num_samples=4000)
    assert abs(curve.probability[1] / 3e-20 - 1) < 0.1  # 1e-20, then 1e-20 or 3e-20
    assert curve.standard_error[1].item() == pytest.approx(1e-20 / 4000**0.5, rel=0.1)


def test_termination_with_small_survival():
    """The error is relative to the tail: 1e-12 is no rounding."""
    table = torch.tensor([[4.0, 0, 0], [4.0, 0, 0], [14.0, 0, 0], [4.0, 0, 0]], dtype=F64)
    curve = bigram(table=table)(max_len=12).termination_curve()
    assert (curve.standard_error[1:] > 0).all() and (1 - curve.probability[-1]) < 1e-10


def test_termination_without_tightness():
    """p(end at site t) = 1 / (t + 2)^2: half of the mass is lost to sequences that never end."""
    t = torch.arange(300, dtype=F64)
    end = 1 / (t + 2) ** 2
    d = of_table(torch.stack([end, (1 - end) / 2, (1 - end) / 2], 1).log())()
    curve = d.termination_curve(num_samples=3)
    close(curve.probability, 1 - (t + 3) / (2 * (t + 2)))
    assert (curve.standard_error == 0).all() and abs(curve.probability[-1] - 0.5) < 2e-3
    never = of_table(torch.stack([torch.full_like(end, -torch.inf), end.log()], 1)[:9])()
    assert (never.termination_curve().probability == 0).all() and never.lengths_of(never.sample()) == 9


def test_termination_after_prefixes():
    """Ragged ones, one of which has ended; and more sites than the distribution has."""
    model = bigram()
    table = model.conditioner.table
    prefix, lengths = (
        torch.tensor([[1, 2, -100], [2, -100, -100], [2, 1, 1], [1, 0, 0], [-1, -1, -1]]),
        torch.tensor([2, 1, 3, 2, 0]),
    )
    c = model().conditional_on_prefix(prefix, lengths)
    curve = c.termination_curve(max_len=8, num_samples=4000)
    assert curve.probability.shape == (5, 8)
    truth = []
    for row, n in zip(prefix.tolist(), lengths.tolist(), strict=True):
        after = table if n == 0 else torch.cat([table[:-1], table[row[n - 1]][None]])
        truth.append(torch.ones(8) if 0 in row[:n] else -log_survival(after, 8).expm1())
    truth = torch.stack([row.double() for row in truth]).detach()
    assert ((curve.probability - truth).abs() <= 5 * curve.standard_error + 1e-12).all()
    assert (curve.probability[3] == 1).all() and (curve.standard_error[3] == 0).all()


def test_termination_of_stopped_numbers():
    """The end is an element: t + 1 of them."""
    head = heads.Stopped(heads.Normal())
    net = conditioners.Independent(5, 3, site=(2,))
    d = built(gx.Sequence(net, head, None, 5))()
    curve = d.termination_curve(num_samples=2)
    going_on = torch.sigmoid(-d.conditioner.phi[:, -1]).cumprod(0)
    close(curve.probability, (1 - going_on).detach())
    lengths = d.lengths_of(d.sample((20000,)))
    assert lengths.min() == 1 and goodness(lengths - 1, law_of(going_on)) > 1e-4


def law_of(going_on):
    """Of lengths 1 ... T, the last one with all longer ones."""
    before = torch.cat([torch.ones(1), going_on[:-1]])
    return torch.cat([before[:-1] - going_on[:-1], before[-1:]]).detach()
