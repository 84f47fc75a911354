"""Searches, against enumeration."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import pyro_genexact as gx
from pyro_genexact import decoding
from pyro_genexact.conditioners import MADE, NADE, Independent, Markov, Pretrained, Recurrent, Transformer
from pyro_genexact.heads import Categorical, MinLength, Tempered, TopP
from support.values import built, sized

T = 6
ROWS, ALL, DRAWS = 4, 3**T, 2000


def pretrained():
    config = GPT2Config(vocab_size=3, n_positions=T, n_embd=8, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=0)
    return Pretrained(GPT2LMHeadModel(config).eval(), bos=2)


NETS = {
    "MADE": lambda: MADE(T, 3, site=3, context=2, hidden=(8,)),
    "NADE": lambda: NADE(T, 3, site=3, context=2, hidden=6),
    "Recurrent": lambda: Recurrent(3, 3, context=2, hidden=6),
    "Markov": lambda: Markov(3, 3, order=2, context=2, hidden=(6,)),
    "Independent": lambda: Independent(T, 3, site=3, context=2, hidden=(6,)),
    "Transformer": lambda: Transformer(3, 3, context=2, width=8, depth=1, num_heads=2),
    "Pretrained": pretrained,
}
HEADS = {
    "": lambda: Categorical(3),
    ", filtered": lambda: TopP(MinLength(Tempered(Categorical(3), 2.0), 1, eos=0), 0.7),
}
MODELS = {net + name: (net, head) for net in NETS for name, head in HEADS.items() if not name or net == "Markov"}


def sequences(net, head=HEADS[""]):
    model = built(gx.Sequence(NETS[net](), head(), eos=0, max_len=T))
    return model(sized(ROWS, 2, seed=1)) if model.context else model().expand((ROWS,))


def enumerated(d):
    """All strings (S, T), their log_prob (S, *batch), and that of complete ones alone."""
    strings = d.enumerate_support()
    log_prob = d.log_prob(strings).detach()
    complete = (strings == 0).any(-1)
    return strings[:, 0], log_prob, torch.where(complete, log_prob, -torch.inf)


@pytest.fixture(params=MODELS)
def d(request):
    return sequences(*MODELS[request.param])


def test_mass_is_1(d):
    assert (enumerated(d)[1].logsumexp(0).abs() < 1e-10).all()


def test_wide_beams_are_enumeration(d):
    strings, log_prob, complete = enumerated(d)
    best, index = complete.max(0)
    found = decoding.beam_search(d, ALL)
    torch.testing.assert_close(found.log_prob, best)
    assert torch.equal(found.sequences, strings[index])
    for unfinished, truth in ((False, complete), (True, log_prob)):
        found = decoding.beam_search(d, ALL, k=30, unfinished=unfinished)
        torch.testing.assert_close(found.log_prob, truth.sort(0, descending=True).values[:30])
        there = found.log_prob > -torch.inf
        torch.testing.assert_close(d.log_prob(found.sequences)[there], found.log_prob[there])
    for penalty in (1.0, 2.0, -0.5):
        sites = (d.lengths_of(strings) + 1).clamp(max=T).unsqueeze(1) ** penalty
        found = decoding.beam_search(d, ALL, penalty, k=10)
        got = found.log_prob / (d.lengths_of(found.sequences) + 1).clamp(max=T) ** penalty
        torch.testing.assert_close(got, (complete / sites).sort(0, descending=True).values[:10])


def by_hand(d, row, width):
    """A beam search of one row, string by string, as Hugging Face's: ended ones among the first ``width`` leave."""
    one = gx.distributions.SequenceDistribution(d.conditioner, d.head, 0, T, d.context[row])
    going, pool = [((), 0.0)], []
    for t in range(T):
        candidates = []
        for string, _ in going:
            for value in range(3):
                array = torch.tensor([*string, value] + [0] * (T - 1 - t))
                candidates.append(((*string, value), one.log_prob_sites(array)[: t + 1].sum().item()))
        candidates.sort(key=lambda c: -c[1])
        pool += [c for c in candidates[:width] if c[0][-1] == 0]
        going = [c for c in candidates[: 2 * width] if c[0][-1] != 0][:width]
    return max(pool, key=lambda c: c[1], default=None)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_narrow_beams(width):
    d = sequences("Recurrent")
    truths = [by_hand(d, row, width) for row in range(ROWS)]
    rows = torch.tensor([row for row, truth in enumerate(truths) if truth is not None])
    some = sequences("Recurrent")
    some = gx.distributions.SequenceDistribution(some.conditioner, some.head, 0, T, some.context[rows])
    found = decoding.beam_search(some, width)
    for i, row in enumerate(rows.tolist()):
        string, log_prob = truths[row]
        assert found.sequences[i].tolist() == [*string] + [0] * (T - len(string))
        assert found.log_prob[i].item() == pytest.approx(log_prob)


def test_greedy_takes_the_best_of_each_site(d):
    found = decoding.greedy(d)
    torch.testing.assert_close(found.log_prob, d.log_prob(found.sequences))
    for row in range(ROWS):
        for t in range(int(d.lengths_of(found.sequences)[row])):
            others = found.sequences[row].repeat(3, 1)
            others[:, t] = torch.arange(3)
            others[:, t + 1 :] = 0
            sites = d.log_prob_sites(others.unsqueeze(1).expand(-1, ROWS, -1))[:, row, t]
            assert sites.argmax() == found.sequences[row, t]


def test_exact_mode(d):
    strings, _, complete = enumerated(d)
    best, index = complete.max(0)
    for block in (2, 256):
        found = decoding.exact_mode(d, width=1 if block == 256 else 2, block=block)
        torch.testing.assert_close(found.log_prob, best)
        assert torch.equal(found.sequences, strings[index])
        assert (found.gap == 0).all()


def test_exact_mode_says_how_far_it_may_be_off():
    gaps = []
    for net in NETS:
        d = sequences(net)
        best = enumerated(d)[2].amax(0)
        for budget in (1, 3, 10):
            found = decoding.exact_mode(d, budget, width=1, block=2)
            assert (best - found.log_prob <= found.gap + 1e-12).all()
            gaps.append(found.gap)
    gaps = torch.stack(gaps)
    assert (gaps > 0).any()
    assert (gaps == 0).any()


def test_exact_mode_extends_no_more_than_its_budget(monkeypatch):
    d = sequences("Markov")
    beams, rows = [], []
    extend = type(d.conditioner).extend
    monkeypatch.setattr(
        type(d.conditioner), "extend", lambda net, y, state: (rows.append(len(y)), extend(net, y, state))[1]
    )
    decoding.beam_search(d, 2)
    beams, rows[:] = sum(rows), []
    decoding.exact_mode(d, budget=3, width=2)
    assert sum(rows) - beams <= 3 * ROWS


@pytest.fixture(scope="module", params=["Recurrent", "NADE", "Transformer", "Markov, filtered"])
def drawn(request):
    """A distribution, its strings and log_prob, and many stochastic beams of five."""
    d = sequences(*MODELS[request.param])
    strings, log_prob, _ = enumerated(d)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        beams = decoding.stochastic_beam_search(d.expand((DRAWS, ROWS)), 5)
    return d, strings, log_prob, beams


def test_stochastic_beams_are_samples_without_replacement(drawn):
    d, strings, log_prob, beams = drawn
    torch.testing.assert_close(d.log_prob(beams.sequences), beams.log_prob)
    place = 3 ** torch.arange(T)
    numbers = (beams.sequences * place).sum(-1)
    assert (numbers.sort(0).values.diff(dim=0) != 0).all()
    assert (beams.gumbels.diff(dim=0) <= 0).all()
    assert (beams.gumbels[-1] >= beams.threshold).all()
    torch.manual_seed(1)
    gumbels = log_prob - torch.empty(DRAWS, *log_prob.shape, dtype=torch.float64).exponential_().log()
    top = gumbels.topk(6, 1)
    each = (strings * place).sum(-1)
    for rank in range(5):  # as often in this place as by direct Gumbel top-k
        got = (numbers[rank].unsqueeze(-1) == each).double().mean(0)
        direct = (each[top.indices[:, rank]].unsqueeze(-1) == each).double().mean(0)
        error = ((got * (1 - got) + direct * (1 - direct)) / DRAWS).sqrt() + 5e-4
        assert ((got - direct).abs() / error).max() < 5
    for mine, direct in ((beams.gumbels[0], top.values[:, 0]), (beams.threshold, top.values[:, 5])):
        gap = (mine.mean(0) - direct.mean(0)) / ((mine.var(0) + direct.var(0)) / DRAWS).sqrt()
        assert gap.abs().max() < 4.5


def test_stochastic_beams_estimate_without_bias(drawn):
    d, strings, log_prob, beams = drawn
    weights = (beams.log_prob - beams.log_inclusion).exp()
    for f in (torch.ones_like, d.lengths_of, lambda y: (y == 2).any(-1).double()):
        truth = (log_prob.exp() * f(strings if f is not torch.ones_like else log_prob[:, 0]).unsqueeze(1)).sum(0)
        estimates = (weights * f(beams.sequences if f is not torch.ones_like else weights)).sum(0)
        z = (estimates.mean(0) - truth) / estimates.std(0) * DRAWS**0.5
        assert z.abs().max() < 4.5


def test_stochastic_beams_beyond_the_support():
    d = sequences("NADE")
    strings, log_prob, _ = enumerated(d)
    beams = decoding.stochastic_beam_search(d, 200)
    torch.testing.assert_close(beams.log_prob[: len(strings)].sort(0).values, log_prob.sort(0).values)
    assert (beams.log_prob[len(strings) :] == -torch.inf).all()
    assert (beams.threshold == -torch.inf).all()
    assert (beams.log_inclusion[: len(strings)] == 0).all()


@pytest.mark.parametrize("net", ["Recurrent", "Markov"])
def test_prefixes_of_several_lengths(net):
    d = sequences(net)
    prefix, lengths = torch.tensor([[1, 2], [2, 0], [1, 1], [2, 2]]), torch.tensor([2, 2, 1, 0])
    after = d.conditional_on_prefix(prefix, lengths, max_len=3)
    found = [decoding.exact_mode(after), decoding.beam_search(after, 27)]
    beams, greedy = decoding.stochastic_beam_search(after, 3), decoding.greedy(after)
    for row in range(ROWS):
        given = {"prefix": prefix[row, : lengths[row]]} if lengths[row] else {}
        one = gx.distributions.SequenceDistribution(
            d.conditioner, d.head, 0, 3, d.context[row], **given, validate_args=False
        )
        strings = gx.distributions.SequenceDistribution(d.conditioner, d.head, 0, 3, d.context[row]).enumerate_support()
        log_prob = torch.where((strings == 0).any(-1), one.log_prob(strings), -torch.inf)
        best, index = log_prob.max(0)
        for it in found:
            assert it.sequences[row].tolist() == strings[index].tolist()
            assert it.log_prob[row].item() == pytest.approx(best.item())
        there = beams.log_prob[:, row] > -torch.inf
        torch.testing.assert_close(one.log_prob(beams.sequences[:, row])[there], beams.log_prob[:, row][there])
        torch.testing.assert_close(greedy.log_prob[row], one.log_prob(greedy.sequences[row]))


def test_values_of_fixed_length():
    d = built(gx.Autoregressive(MADE(4, 1), gx.heads.Bernoulli(), (4,), order=[3, 1, 0, 2]))()
    strings = d.enumerate_support()
    log_prob = d.log_prob(strings)
    found = decoding.beam_search(d, 16, k=16)
    torch.testing.assert_close(found.log_prob, log_prob.sort(descending=True).values)
    torch.testing.assert_close(d.log_prob(found.sequences), found.log_prob)
    assert torch.equal(decoding.exact_mode(d).sequences, strings[log_prob.argmax()])
    head = Categorical(3)
    net = built(Recurrent(3, 3, hidden=5))
    ragged = gx.distributions.AutoregressiveDistribution(net, head, (4,), lengths=torch.tensor([0, 2, 4]))
    found = decoding.beam_search(ragged, 81)
    for row, n in enumerate((0, 2, 4)):
        best = 0.0
        if n:
            short = gx.distributions.AutoregressiveDistribution(net, head, (n,))
            best = short.log_prob(short.enumerate_support()).max().item()
        assert found.log_prob[row].item() == pytest.approx(best)
        assert (found.sequences[row, n:] == 0).all()


def test_no_site_is_visited_twice(monkeypatch):
    d = sequences("Recurrent")
    sites = []
    extend = Recurrent.extend
    monkeypatch.setattr(Recurrent, "extend", lambda net, y, state: (sites.append(y.shape[1]), extend(net, y, state))[1])
    decoding.beam_search(d, 3, unfinished=True)
    assert len(sites) <= T - 1
    assert set(sites) == {1}


@pytest.mark.parametrize(
    "search",
    [decoding.greedy, decoding.beam_search, decoding.exact_mode, lambda d: decoding.stochastic_beam_search(d, 2)],
)
def test_other_distributions_are_refused(search):
    with pytest.raises(TypeError, match=r"Expected d to be of class AutoregressiveDistribution; got Normal"):
        search(torch.distributions.Normal(0.0, 1.0))
    real = gx.Autoregressive(MADE(3, 2), gx.heads.Normal(), (3,))()
    with pytest.raises(TypeError, match=r"Expected a head of scalars with finite support; got Normal \(Normal\)"):
        search(real)


def test_errors():
    d = sequences("Recurrent")
    for call, message in (
        (lambda: decoding.beam_search(d, 0), r"Expected width to be an integer >= 1; got 0"),
        (lambda: decoding.beam_search(d, 2, k=3), r"Expected k <= width \(2\); got 3"),
        (lambda: decoding.exact_mode(d, 0), r"Expected budget to be an integer >= 1; got 0"),
        (lambda: decoding.stochastic_beam_search(d, 0), r"Expected k to be an integer >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"Expected length_penalty to be a number; got '1'"):
        decoding.beam_search(d, 3, "1")
    for penalty in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=rf"Expected length_penalty to be finite; got {penalty}"):
            decoding.beam_search(d, 3, penalty)
    never = d.with_head(gx.heads.Forbid(d.head, [0]))
    with pytest.raises(ValueError, match=r"Expected complete sequences among 5 beams of 6 sites; got none for row 0"):
        decoding.beam_search(never)
    with pytest.raises(
        ValueError, match=r"Expected complete .* of 6 sites with positive probability; got none for row 0"
    ):
        decoding.exact_mode(never)
    assert (decoding.exact_mode(never, budget=1).gap == torch.inf).all()
    found = decoding.beam_search(never, unfinished=True)
    assert (never.lengths_of(found.sequences) == T).all()


def test_columns_of_several_kinds():
    """Integers and floats, in one dtype."""
    head = gx.heads.PerSite([Categorical(3), gx.heads.Bernoulli(), Categorical(3)])
    d = built(gx.Autoregressive(MADE(3, 3, site=[3, (), 3], hidden=(8,)), head, (3,)))()
    strings = d.enumerate_support()
    log_prob, order = d.log_prob(strings).sort(descending=True)
    found, mode = decoding.beam_search(d, 18, k=18), decoding.exact_mode(d)
    torch.testing.assert_close(found.log_prob, log_prob)
    assert torch.equal(found.sequences, strings[order])
    assert torch.equal(mode.sequences, strings[order[0]])
    drawn = decoding.stochastic_beam_search(d, 18)
    torch.testing.assert_close(d.log_prob(drawn.sequences), drawn.log_prob)
    torch.testing.assert_close(drawn.log_prob.sort(descending=True).values, log_prob)
    assert {x.dtype for x in (found.sequences, mode.sequences, drawn.sequences)} == {d.sample().dtype}


def test_values_of_a_filter_are_integers():
    d = built(gx.Autoregressive(MADE(3, 1), Tempered(gx.heads.Bernoulli(), 0.5), (3,)))()
    searches = (decoding.greedy, decoding.beam_search, decoding.exact_mode)
    found = [*(search(d) for search in searches), decoding.stochastic_beam_search(d, 4)]
    assert {it.sequences.dtype for it in found} == {torch.long}


@pytest.mark.parametrize("net", [net for net in NETS if net != "Pretrained"])
def test_no_rows(net):
    model = built(gx.Sequence(NETS[net](), Categorical(3), eos=0, max_len=T))
    d, none = model(torch.zeros(0, 2).double()), torch.ones(0, 2).long()
    ragged = [] if d.conditioner.num_sites else [d.conditional_on_prefix(none, none[:, 0], max_len=T)]
    for it in [d, *ragged]:
        assert decoding.greedy(it).sequences.shape == decoding.beam_search(it).sequences.shape == (0, T)
        assert decoding.beam_search(it, 3, k=2).sequences.shape == (2, 0, T)
        beams = decoding.stochastic_beam_search(it, 2)
        assert (beams.sequences.shape, beams.gumbels.shape, beams.threshold.shape) == ((2, 0, T), (2, 0), (0,))
        mode = decoding.exact_mode(it)
        assert (mode.sequences.shape, mode.log_prob.shape, mode.gap.shape) == ((0, T), (0,), (0,))
