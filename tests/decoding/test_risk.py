"""Minimum Bayes risk and its utilities, against enumeration, plain Python and sacrebleu."""

import pickle
import sys
from itertools import product

import pytest
import sacrebleu
import torch
from torch import Tensor

import pyro_genexact as gx
from pyro_genexact.decoding import minimum_bayes_risk
from pyro_genexact.decoding.utilities import Text, edit_distance, edit_similarity, exact_match
from support.checks import fails

STRINGS = torch.tensor([[1, 1, 1], [2, 2, 2], [1, 2, 0]])


def model(event_shape=(4,), batch=2):
    """A redrawn model of three symbols with a batch of contexts, or without context."""
    head = gx.heads.Categorical(3)
    net = gx.conditioners.Recurrent(3, head.num_params, context=1 if batch else 0, hidden=5)
    module = gx.testing.redraw(gx.Autoregressive(net, head, event_shape).double())
    context = torch.randn(batch, 1, dtype=torch.float64) if batch else None
    return module(context)


def string(row, eos):
    row = row.tolist()
    return row[: row.index(eos)] if eos in row else row


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def similarity(a, b):
    return 1 - levenshtein(a, b) / max(len(a), len(b), 1)


def hits(candidates, references):
    """Equal places, of events of any shape after one batch dim."""
    return (candidates.unsqueeze(1) == references).flatten(3).sum(-1)


def as_text(y):
    return " ".join(["cat", "dog", "mouse", "owl"][i] for i in y.tolist())


def test_the_choice_by_enumeration_is_that_of_plain_sums():
    d = model()
    y = d.enumerate_support()
    choice = minimum_bayes_risk(d, y, y, edit_similarity(eos=0), weights=d.log_prob(y).exp())
    rows = [string(row, 0) for row in y[:, 0]]
    utility = torch.tensor([[similarity(a, b) for b in rows] for a in rows], dtype=torch.float64)
    expected = utility @ d.log_prob(y).exp()
    assert choice.utilities.shape == (81, 2) and torch.allclose(choice.utilities, expected, rtol=0, atol=1e-6)
    assert torch.allclose(choice.expected_utility, expected.max(0).values, rtol=0, atol=1e-6)
    for b in range(2):
        assert expected[choice.index[b], b] > expected[:, b].max() - 1e-6
        assert torch.equal(choice.sequences[b], y[choice.index[b], b])
    assert torch.equal(choice.log_prob, d.log_prob(choice.sequences))


def test_exact_match_chooses_the_mode():
    d = model()
    y = d.enumerate_support()
    choice = minimum_bayes_risk(d, y, y, exact_match, weights=d.log_prob(y).exp())
    assert torch.equal(choice.sequences, d.mode)
    assert torch.allclose(choice.utilities, d.log_prob(y).exp(), rtol=0, atol=1e-12)


def test_the_best_choice_need_not_be_the_most_probable():
    d, y = model((3,), batch=0), torch.tensor([[0, 0, 0], [1, 1, 1], [1, 1, 2]])
    weights = torch.tensor([4, 3, 3])
    assert minimum_bayes_risk(d, y, y, exact_match, weights=weights).sequences.tolist() == [0, 0, 0]
    choice = minimum_bayes_risk(d, y, y, edit_similarity(), weights=weights)
    assert choice.sequences.tolist() == [1, 1, 1] and choice.index == 1  # of two equal ones the first
    assert torch.allclose(choice.utilities, torch.tensor([0.4, 0.5, 0.5]))


@pytest.mark.parametrize("weighted", [False, True])
def test_estimates_scatter_as_their_standard_errors_say(weighted):
    d = model((2,), batch=0)
    y = d.enumerate_support()
    exact = minimum_bayes_risk(d, y, y, edit_similarity(), weights=d.log_prob(y).exp()).utilities
    many = d.expand((1000,))
    samples = torch.randint(3, (60, 1000, 2)) if weighted else many.sample((60,))
    weights = many.log_prob(samples).exp() if weighted else None
    choice = minimum_bayes_risk(many, y.unsqueeze(1).expand(9, 1000, 2), samples, edit_similarity(), weights=weights)
    scatter = choice.utilities.std(1)
    assert ((choice.standard_error.mean(1) / scatter - 1).abs() < 0.1).all()
    bias = 0.01 if weighted else 0.0  # of a ratio of means, of order 1 / 60
    assert ((choice.utilities.mean(1) - exact).abs() < 5 * scatter / 1000**0.5 + bias).all()


def test_standard_error_of_equal_weights_is_that_of_a_mean():
    d = model()
    y = d.sample((20,))
    values = edit_similarity()(y, y)
    plain = minimum_bayes_risk(d, y, y, edit_similarity())
    assert torch.allclose(plain.utilities, values.mean(1)) and plain.standard_error.shape == (20, 2)
    assert torch.allclose(plain.standard_error, values.std(1) / 20**0.5)
    weighted = minimum_bayes_risk(d, y, y, edit_similarity(), weights=torch.full((20, 2), 7.0))
    for a, b in zip(plain, weighted, strict=True):
        assert torch.allclose(a, b)


def test_one_candidate_and_one_sample():
    d = model()
    candidate, sample = d.sample((1,)), d.sample((1,))
    choice = minimum_bayes_risk(d, candidate, sample, edit_similarity())
    assert torch.equal(choice.sequences, candidate[0]) and torch.equal(choice.log_prob, d.log_prob(candidate[0]))
    pairs = zip(candidate[0].tolist(), sample[0].tolist(), strict=True)
    assert torch.allclose(choice.expected_utility, torch.tensor([similarity(a, b) for a, b in pairs]))
    assert choice.index.tolist() == [0, 0] and choice.standard_error.isnan().all()


def test_events_of_more_dims_and_gradients_of_the_log_prob():
    d = model((2, 2))
    y = d.sample((7,))
    choice = minimum_bayes_risk(d, y, y, hits)
    assert choice.sequences.shape == (2, 2, 2)
    expected = torch.stack([(row == y).flatten(2).double().sum(2).mean(0) for row in y])
    assert torch.allclose(choice.utilities.double(), expected) and torch.equal(choice.index, expected.argmax(0))
    choice.log_prob.sum().backward()
    assert sum(p.grad.abs().sum() for p in d.conditioner.parameters()) > 0


def test_a_default_device_is_not_used():
    d = model()
    y = d.sample((5,))
    with torch.device("meta"):
        choice = minimum_bayes_risk(d, y, y, edit_similarity(0), coarse=Text(levenshtein, as_text, eos=0), keep=2)
    assert {t.device.type for t in choice} == {"cpu"}


@pytest.mark.parametrize("keep", [1, 3, 12])
@pytest.mark.parametrize("read", [4, 30])
def test_two_stages_decide_between_the_best_of_the_first(keep, read):
    d = model()
    candidates, samples = d.sample((12,)), d.sample((30,))
    seen = []

    def utility(h, y):
        seen.append((len(h), len(y)))
        return edit_similarity(0)(h, y)

    choice = minimum_bayes_risk(
        d, candidates, samples, utility, coarse=lambda h, y: exact_match(h, y[:read]), keep=keep
    )
    assert seen == [(keep, 30)]
    rough = minimum_bayes_risk(d, candidates, samples[:read], exact_match).utilities
    fine = minimum_bayes_risk(d, candidates, samples, edit_similarity(0))
    for b in range(2):
        ranked = sorted(range(12), key=(-rough[:, b]).tolist().__getitem__)
        kept = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(ranked[:keep]), True)
        assert torch.equal(choice.utilities[:, b].isnan(), ~kept) and kept[choice.index[b]]
        assert torch.allclose(choice.utilities[kept, b], fine.utilities[kept, b])
        assert torch.allclose(choice.expected_utility[b], fine.utilities[kept, b].max())
        assert torch.equal(choice.sequences[b], candidates[choice.index[b], b])
        assert torch.allclose(choice.standard_error[kept, b], fine.standard_error[kept, b])
        assert choice.standard_error[~kept, b].isnan().all()


def test_of_equal_candidates_the_first_is_chosen_whatever_the_coarse_stage_ranked():
    d = model((3,), batch=0)
    rank = torch.arange(3.0)[:, None]
    choice = minimum_bayes_risk(d, STRINGS, STRINGS, lambda h, y: torch.zeros(2, 3), coarse=lambda h, y: rank, keep=2)
    assert choice.index == 1 and choice.sequences.tolist() == STRINGS[1].tolist()


def test_edit_distance_is_that_of_plain_python():
    every = torch.tensor(list(product(range(3), repeat=4)))  # 0 ends a string: empty ones, repeats, all lengths
    texts = [string(row, 0) for row in every]
    expected = torch.tensor([[levenshtein(a, b) for b in texts] for a in texts])
    assert torch.equal(edit_distance(every, every, eos=0), expected)
    whole = torch.tensor([[levenshtein(a, b) for b in every.tolist()] for a in every.tolist()])
    assert torch.equal(edit_distance(every, every), whole)


def test_edit_distance_of_batches_and_other_lengths():
    a, b = torch.randint(4, (3, 2, 2, 9)), torch.randint(4, (5, 2, 2, 6))
    distance = edit_distance(a, b, eos=3)
    assert distance.shape == (3, 5, 2, 2)
    for n, m, i, j in product(range(3), range(5), range(2), range(2)):
        assert distance[n, m, i, j] == levenshtein(string(a[n, i, j], 3), string(b[m, i, j], 3))


@pytest.mark.parametrize(("a", "b", "value"), [([0, 1], [0, 2], 1), ([0, 0], [1, 0], 0), ([1, 2], [1, 0], 0.5)])
def test_edit_similarity_of_empty_and_cut_strings(a, b, value):
    utility = edit_similarity(eos=0)
    assert utility(torch.tensor([a]), torch.tensor([b])).tolist() == [[value]]
    assert utility(torch.tensor([b]), torch.tensor([a])).tolist() == [[value]]


def test_edit_similarity_can_be_pickled():
    utility = pickle.loads(pickle.dumps(edit_similarity(eos=0)))
    assert torch.equal(utility(STRINGS, STRINGS), edit_similarity(eos=0)(STRINGS, STRINGS))


def test_exact_match_of_batches():
    a, b = torch.randint(2, (4, 3, 2)), torch.randint(2, (5, 3, 2))
    expected = [[[float(torch.equal(x, y)) for x, y in zip(h, r, strict=True)] for r in b] for h in a]
    assert exact_match(a, b).tolist() == expected


@pytest.mark.parametrize("eos", [None, 0])
@pytest.mark.parametrize(("metric", "score"), [("chrf", sacrebleu.sentence_chrf), ("bleu", sacrebleu.sentence_bleu)])
def test_scores_are_those_of_sacrebleu(metric, score, eos):
    a, b = torch.randint(4, (4, 2, 6)), torch.randint(4, (5, 2, 6))
    b[1], a[0, 0] = a[1], 0  # equal texts, and an empty one
    got = Text(metric, as_text, eos)(a, b)
    assert got.shape == (4, 5, 2)
    for n, m, i in product(range(4), range(5), range(2)):
        h, r = (as_text(row) if eos is None else as_text(torch.tensor(string(row, 0))) for row in (a[n, i], b[m, i]))
        assert got[n, m, i].item() == pytest.approx(score(h, [r]).score, abs=1e-4)
    assert got.max() > 99.99


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_two_empty_texts_score_0(metric):
    empty = torch.zeros(1, 3)
    assert Text(metric, as_text, eos=0)(empty, empty).tolist() == [[0.0]]


def test_each_distinct_pair_of_texts_is_scored_once():
    pairs = []
    y = torch.tensor([[1, 0, 2], [1, 0, 1], [2, 1, 0], [1, 0, 0]])

    def metric(hypothesis, reference):
        pairs.append((hypothesis, reference))
        return similarity(hypothesis, reference)

    text = {1: "dog", 2: "mouse dog"}
    got = Text(metric, as_text, eos=0)(y, y)
    assert sorted(pairs) == sorted(product(text.values(), repeat=2))
    names = ["dog", "dog", "mouse dog", "dog"]
    assert torch.allclose(got, torch.tensor([[similarity(a, b) for b in names] for a in names]))


def test_texts_decide():
    d = model((3,), batch=0)
    choice = minimum_bayes_risk(d, STRINGS, STRINGS[:1].expand(4, 3), Text("chrf", as_text))
    assert choice.sequences.tolist() == [1, 1, 1] and choice.expected_utility == pytest.approx(100)


def test_text_says_that_sacrebleu_is_missing(monkeypatch):
    for name in ("sacrebleu", "sacrebleu.metrics.bleu"):
        monkeypatch.setitem(sys.modules, name, None)
    fails(ImportError, "The metric 'bleu' needs sacrebleu; install it with pip install", Text, "bleu", as_text)
    assert Text(similarity, as_text)(STRINGS, STRINGS).diagonal().tolist() == [1, 1, 1]


def test_errors_of_utilities():
    for utility in (exact_match, edit_distance, edit_similarity(), Text(similarity, as_text)):
        fails(TypeError, "Expected candidates to be of class Tensor; got list.", utility, [[1]], STRINGS)
        fails(ValueError, "Expected candidates of shape (N, *batch, T), N >= 1", utility, STRINGS[0], STRINGS)
        fails(ValueError, "(N, *batch, T), N >= 1; got shape (0, 3).", utility, STRINGS, STRINGS[:0])
        fails(ValueError, "Expected references of batch shape () ", utility, STRINGS, STRINGS.unsqueeze(1))
    fails(
        ValueError,
        "Expected references.shape[-1] == 3 (that of the candidates); got 2.",
        exact_match,
        STRINGS,
        STRINGS[:, 1:],
    )
    fails(
        ValueError,
        "Expected metric 'chrf', 'bleu' or a function (hypothesis, reference); got 'ter'.",
        Text,
        "ter",
        as_text,
    )
    fails(
        TypeError,
        "Expected the result of decode to be of class str; got list.",
        Text(similarity, Tensor.tolist),
        STRINGS,
        STRINGS,
    )


def test_errors_of_the_decision():
    d = model((3,))
    y = d.sample((5,))

    def risk(candidates=y, samples=y, utility=exact_match, d=d, **options):
        return minimum_bayes_risk(d, candidates, samples, utility, **options)

    shape = "(number, 2, 3), with batch and event shape of d; got "
    fails(TypeError, "Expected d to be of class Distribution; got Tensor.", risk, d=y)
    fails(TypeError, "Expected candidates to be of class Tensor; got list.", risk, y.tolist())
    fails(ValueError, f"Expected candidates.shape == {shape}(5, 3).", risk, y[:, 0])
    fails(ValueError, f"Expected candidates.shape == {shape}(0, 2, 3).", risk, y[:0])
    fails(ValueError, f"Expected samples.shape == {shape}(5, 1, 3).", risk, y, y[:, :1])
    fails(ValueError, f"Expected samples.shape == {shape}(5, 2, 2).", risk, y, y[..., 1:])
    fails(ValueError, f"Expected samples.shape == {shape}(3,).", risk, y, y[0, 0])

    returned = "Expected utility to return shape (5, 5, 2) (candidates, samples, *batch); got "
    for wrong in ((5, 5), (5, 4, 2), (5, 5, 1), (5,), ()):
        fails(ValueError, f"{returned}{wrong}.", risk, utility=lambda h, r, wrong=wrong: torch.zeros(wrong))
    fails(TypeError, "Expected the result of utility to be of class Tensor; got float.", risk, utility=lambda h, r: 1.0)
    for bad in (torch.nan, torch.inf):
        values = torch.zeros(5, 5, 2)
        values[1, 2, 0] = bad
        text = f"Expected utility to return finite numbers; got {bad} at [1, 2, 0]."
        fails(ValueError, text, risk, utility=lambda h, r, values=values: values)

    fails(TypeError, "Expected weights to be of class Tensor; got list.", risk, weights=[1.0])
    fails(ValueError, "Expected weights.shape == (5, 2) (samples, *batch); got (5,).", risk, weights=torch.ones(5))
    for bad in (-1.0, torch.nan, torch.inf):
        weights = torch.ones(5, 2)
        weights[3, 1] = bad
        fails(ValueError, "Expected weights to be finite and not negative; got ", risk, weights=weights)
    weights = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    fails(ValueError, "Expected weights with a positive sum over the samples that utility uses", risk, weights=weights)

    fails(ValueError, "Expected both coarse and keep or neither; got coarse=None and keep=2.", risk, keep=2)
    fails(ValueError, "Expected both coarse and keep or neither", risk, coarse=exact_match)
    text = "Expected keep between 1 and 5 (the number of candidates); got 6."
    fails(ValueError, text, risk, coarse=exact_match, keep=6)
    for keep in (0, 2.5, True):
        fails(ValueError, f"Expected keep to be an integer >= 1; got {keep}.", risk, coarse=exact_match, keep=keep)
    for wrong in ((5, 6, 2), (5, 0, 2), (4, 5, 2), (5,)):
        text = f"Expected coarse to return shape (5, 5, 2) (candidates, samples, *batch); got {wrong}."
        fails(ValueError, text, risk, coarse=lambda h, r, wrong=wrong: torch.zeros(wrong), keep=2)
    weights = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]).unsqueeze(1).expand(5, 2)
    text = "Expected weights with a positive sum over the samples that coarse uses; got zeros."
    fails(ValueError, text, risk, coarse=lambda h, r: exact_match(h, r[:2]), keep=2, weights=weights)


@pytest.mark.parametrize("utility", [exact_match, edit_distance, edit_similarity(0), Text(similarity, as_text, eos=0)])
def test_no_rows(utility):
    d = model((3,))
    none = type(d)(d.conditioner, d.head, (3,), torch.zeros(0, 1).double())
    y = none.sample((5,))
    assert utility(y, y[:2]).shape == (5, 2, 0)
    choice = minimum_bayes_risk(none, y, y[:2], utility, coarse=utility, keep=2)
    assert (choice.sequences.shape, choice.log_prob.shape, choice.utilities.shape) == ((0, 3), (0,), (5, 0))


def test_strings_of_no_symbol():
    none = torch.zeros(2, 4, 0)
    assert (
        edit_similarity()(none, none).tolist()
        == Text(similarity, as_text)(none, none).tolist()
        == [[[1.0] * 4] * 2] * 2
    )


def test_a_candidate_outside_the_support():
    d = model((3,), batch=0)
    wrong = torch.tensor([[1, 5, 1]])
    fails(ValueError, "Expected value within the support", minimum_bayes_risk, d, wrong, STRINGS, exact_match)
