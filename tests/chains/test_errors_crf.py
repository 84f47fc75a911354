"""Wrong potentials, lengths and labels of LinearChainCRF, by the text of their errors."""

import pytest
import torch
from torch.distributions import kl_divergence

from support.checks import fails
from support.small_crfs import DISTRIBUTIONS, IMPOSSIBLE, LOOP, crf, fail_all, with_entry, zeros
from support.values import ints

NAN, INF = torch.nan, torch.inf
UNARY, STEP = torch.zeros(2, 4, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
LABELS, KNOWN = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
RAGGED = torch.tensor([4, 2])


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("unary", "kind", "text"),
    [
        (zeros(3), ValueError, "Expected unary.shape == (*batch, N, V) with N, V >= 1; got (3,)."),
        (zeros(), ValueError, "Expected unary.shape == (*batch, N, V) with N, V >= 1; got ()."),
        (zeros(2, 0, 3), ValueError, "with N, V >= 1; got (2, 0, 3)."),
        (zeros(2, 4, 0), ValueError, "with N, V >= 1; got (2, 4, 0)."),
        (UNARY.long(), TypeError, "Expected unary to be a floating-point tensor; got torch.int64."),
        (UNARY.bool(), TypeError, "Expected unary to be a floating-point tensor; got torch.bool."),
        (UNARY.cfloat(), TypeError, "Expected unary to be a floating-point tensor; got torch.complex64."),
        ([[0.0]], TypeError, "Expected unary to be of class Tensor; got list."),
        (None, TypeError, "Expected unary to be of class Tensor; got NoneType."),
    ],
)
def test_unary(unary, kind, text, validate):
    fails(kind, text, crf, unary, validate_args=validate)


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"transition": zeros(3, 4)}, "Expected transition.shape[-2:] == (3, 3) (labels of unary); got (3, 4)."),
        ({"transition": zeros(2, 2)}, "Expected transition.shape[-2:] == (3, 3) (labels of unary); got (2, 2)."),
        ({"transition": zeros(3)}, "Expected transition.shape[-2:] == (3, 3) (labels of unary); got (3,)."),
        ({"transition": zeros()}, "Expected transition.shape[-2:] == (3, 3) (labels of unary); got ()."),
        ({"transition": zeros(4, 3, 3)}, "== (*batch, 3, 3, 3) (steps between the sites of unary); got (4, 3, 3)."),
        ({"unary": zeros(1, 3), "transition": zeros(2, 3, 3)}, "== (*batch, 0, 3, 3) (steps between the sites"),
        ({"initial": zeros(4)}, "Expected initial.shape[-1] == 3 (labels of unary); got (4,)."),
        ({"initial": zeros()}, "Expected initial.shape[-1] == 3 (labels of unary); got ()."),
        ({"final": zeros(2, 4)}, "Expected final.shape[-1] == 3 (labels of unary); got (2, 4)."),
        ({"transition": zeros(3, 3, 3, 3)}, "batch shapes that broadcast; got unary (2,), transition (3,)."),
        ({"initial": zeros(5, 3)}, "Expected batch shapes that broadcast; got unary (2,), initial (5,)."),
        ({"final": zeros(5, 3)}, "Expected batch shapes that broadcast; got unary (2,), final (5,)."),
        ({"lengths": torch.tensor([1, 2, 3])}, "batch shapes that broadcast; got unary (2,), lengths (3,)."),
        ({"lengths": ints(2, 4)}, "Expected batch shapes that broadcast; got unary (2,), lengths (2, 4)."),
        ({"initial": zeros(5, 3), "final": zeros(4, 3)}, "got unary (2,), initial (5,), final (4,)."),
    ],
)
def test_shapes(arguments, text, validate):
    fails(ValueError, text, crf, **arguments, validate_args=validate)


@pytest.mark.parametrize("name", ["transition", "initial", "final"])
def test_other_dtypes_devices_and_classes(name):
    given = STEP if name == "transition" else STEP[0]
    fails(ValueError, f"Expected {name}.dtype == torch.float64", crf, **{name: given.float()})
    fails(ValueError, "got torch.float32.", crf, **{name: given.float()})
    fails(ValueError, f"Expected {name}.device == cpu", crf, **{name: given.to("meta")})
    fails(TypeError, f"Expected {name} to be of class Tensor; got float.", crf, **{name: 0.0})
    fails(TypeError, f"Expected {name} to be of class Tensor; got list.", crf, **{name: [[0.0]]})
    if name == "transition":
        fails(TypeError, "Expected transition to be of class Tensor; got NoneType.", crf, transition=None)


@pytest.mark.parametrize(
    ("lengths", "kind", "text"),
    [
        (torch.tensor([5, 1]), ValueError, "Expected lengths between 0 and 4 (sites of the event); got 5."),
        (torch.tensor([1, -1]), ValueError, "Expected lengths between 0 and 4 (sites of the event); got -1."),
        (torch.ones(2), TypeError, "Expected lengths to be a tensor of integers; got torch.float32."),
        (torch.ones(2, dtype=torch.bool), TypeError, "a tensor of integers; got torch.bool."),
        (torch.ones(2, dtype=torch.cfloat), TypeError, "a tensor of integers; got torch.complex64."),
        ([1, 2], TypeError, "Expected lengths to be a tensor of integers; got list."),
        (ints(2).to("meta"), ValueError, "Expected lengths.device == cpu (device of unary); got meta."),
    ],
)
def test_lengths(lengths, kind, text):
    fails(kind, text, crf, lengths=lengths, validate_args=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_lengths_of_other_integers(dtype):
    given, same = crf(lengths=RAGGED.to(dtype)), crf(lengths=RAGGED)
    for query in ("log_partition", "marginals", "pair_marginals", "mode", "max_log_prob"):
        assert getattr(given, query).equal(getattr(same, query)), query
    assert given.entropy().equal(same.entropy()) and given.log_prob(LABELS).equal(same.log_prob(LABELS))
    assert given.sample().shape == (2, 4) and given.k_best(2)[0].equal(same.k_best(2)[0])


@pytest.mark.parametrize("entry", [NAN, INF])
def test_potentials_that_are_no_numbers(entry):
    made = {
        "unary": with_entry(UNARY, entry, 1, 3, 2),
        "transition": with_entry(STEP, entry, 2, 0),
        "initial": with_entry(STEP[0], entry, 1),
        "final": with_entry(STEP[0], entry, 2),
    }
    for name, values in made.items():
        fails(
            ValueError,
            f"Expected {name} to be finite or -inf; got {entry}.",
            crf,
            **{name: values},
            validate_args=True,
        )
        assert not crf(**{name: values}, validate_args=False).log_partition.isfinite().all()
    # in padding they are as if they were not there
    steps = with_entry(zeros(2, 3, 3, 3), entry, 1, slice(1, None))
    ragged = crf(with_entry(UNARY, entry, 1, slice(2, None)), steps, lengths=RAGGED, validate_args=True)
    plain = crf(lengths=RAGGED)
    assert ragged.log_partition.equal(plain.log_partition) and ragged.marginals.equal(plain.marginals)
    assert ragged.log_prob(LABELS).equal(plain.log_prob(LABELS)) and ragged.entropy().equal(plain.entropy())
    assert ragged.pair_marginals.equal(plain.pair_marginals) and ragged.mode.equal(plain.mode)
    steps[1, 0] = entry
    fails(
        ValueError,
        "Expected transition to be finite or -inf",
        crf,
        UNARY,
        steps,
        lengths=RAGGED,
        validate_args=True,
    )


@pytest.mark.parametrize("label", [3, -1, 0.5, NAN, INF])
def test_labels_outside(label):
    value = with_entry(zeros(2, 4), label, 1, 1)
    fails(ValueError, "to be within the support (IndependentConstraint(IntegerInterval(lower_bound=0, upper_bound=2), 1))",
          crf(validate_args=True).log_prob, value)  # fmt: skip
    fails(
        ValueError,
        "to be within the support (LabelStrings(num_labels=3))",
        crf(lengths=RAGGED, validate_args=True).log_prob,
        value,
    )
    for lengths in (None, RAGGED):
        log_prob = crf(lengths=lengths, validate_args=False).log_prob(value)
        assert log_prob[0].isfinite() and log_prob[1] == -INF
    padded = with_entry(value.nan_to_num(0.0).clamp(0, 0), label, 1, 3)
    assert crf(lengths=RAGGED, validate_args=True).log_prob(padded).isfinite().all()


@pytest.mark.parametrize("query", ["log_prob", "score"])
def test_values_of_other_shapes(query):
    for shape in ((2, 5), (2, 3), (2, 1), (1,), (2, 0), ()):
        fail_all(ValueError, f"Expected value.shape[-1:] == (4,); got {shape}.", query, ints(*shape))
    for shape in ((3, 4), (2, 3, 4)):
        text = f"Expected value of a shape that broadcasts with (2, 4); got {shape}."
        fail_all(ValueError, text, query, ints(*shape))
    text = "Expected value.device == cpu (device of the potentials); got meta."
    fail_all(ValueError, text, query, LABELS.to("meta"))
    fail_all(TypeError, "Expected value to be of class Tensor; got list.", query, [[0, 0, 0, 0]])
    for make in DISTRIBUTIONS.values():
        call = getattr(make(), query)
        assert call(ints(4)).shape == (2,) and call(ints(3, 1, 4)).shape == (3, 2)


QUERIES = {
    "log_partition": lambda d: d.log_partition,
    "marginals": lambda d: d.marginals,
    "pair_marginals": lambda d: d.pair_marginals,
    "mode": lambda d: d.mode,
    "max_log_prob": lambda d: d.max_log_prob,
    "k_best": lambda d: d.k_best(2),
    "entropy": lambda d: d.entropy(),
    "sample": lambda d: d.sample((2,)),
    "log_prob": lambda d: d.log_prob(ints(4)),
    "expectation": lambda d: d.expectation(UNARY),
    "risk": lambda d: d.risk(ints(4)),
    "kl": lambda d: kl_divergence(d, crf()),
    "kl, the other way": lambda d: kl_divergence(crf(), d),
    "cross_entropy": lambda d: d.cross_entropy(crf()),
    "as_autoregressive": lambda d: d.as_autoregressive(),
    "given": lambda d: d.given(ints(4)).log_partition,
    "log_marginal_of": lambda d: d.log_marginal_of(ints(4)),
}
ROWS = {
    "row (1,)": lambda: crf(IMPOSSIBLE),
    "row (1,), of lengths": lambda: crf(IMPOSSIBLE, lengths=torch.tensor([1, 3])),
    "row (0,), of steps": lambda: crf(transition=STEP - INF),
    "row (0,), of ends": lambda: crf(transition=LOOP, initial=torch.tensor([0, -INF, -INF]).double(),
                                     final=torch.tensor([-INF, 0, 0]).double()),
    "row (1,), of an expanded one": lambda: crf(IMPOSSIBLE).expand((3, 2)),
    "row (2, 1)": lambda: crf(torch.stack([UNARY, UNARY, IMPOSSIBLE])),
    "the only row": lambda: crf(IMPOSSIBLE[1]),
}  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_rows_without_a_label_string(query):
    for name, make in ROWS.items():
        bad = make()
        row = name.split(", of")[0]
        text = f"Expected potentials that allow a label sequence; got none for {row} (all scores are -inf)."
        for bad._validate_args in (True, False):  # an error is not forgotten
            fails(ValueError, text, QUERIES[query], bad)


def test_rows_of_length_zero_are_always_possible():
    d = crf(IMPOSSIBLE, lengths=torch.tensor([2, 0]))
    assert d.log_partition[1] == 0 and d.log_prob(LABELS)[1] == 0 and d.entropy()[1] == 0


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 5), (3, 2, 1), (), (1,), (-1, 2), (0,)])
def test_expand(shape):
    fail_all(ValueError, f"Expected batch_shape that (2,) broadcasts to; got {shape}.", "expand", shape)
    assert crf().expand((0, 2)).batch_shape == (0, 2)
    fails(ValueError, "Expected batch_shape that () broadcasts to; got (-1,).", crf(zeros(4, 3)).expand, (-1,))
