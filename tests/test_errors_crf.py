"""Wrong inputs of LinearChainCRF, by the text of their errors."""

import re

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_genexact as gx

NAN, INF = torch.nan, torch.inf
UNARY, STEP = torch.zeros(2, 4, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
LABELS, KNOWN = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
RAGGED = torch.tensor([4, 2])


def fails(kind, text, call, *args, **options):
    with pytest.raises(kind) as raised:
        call(*args, **options)
    assert type(raised.value) is kind and text in str(raised.value), f"{text!r} is not in {raised.value!r}"


def zeros(*shape, **options):
    return torch.zeros(shape, **{"dtype": torch.float64, **options})


def ints(*shape):
    return torch.zeros(shape, dtype=torch.long)


def with_entry(values, entry, *index):
    values = values.clone()
    values[index] = entry
    return values


def crf(unary=UNARY, transition=STEP, **options):
    return gx.LinearChainCRF(unary, transition, **options)


DISTRIBUTIONS = {
    "checked": lambda: crf(validate_args=True),
    "unchecked": lambda: crf(validate_args=False),
    "ragged": lambda: crf(lengths=RAGGED, validate_args=True),
    "ragged, unchecked": lambda: crf(lengths=RAGGED, validate_args=False),
}


def fail_all(kind, text, query, *arguments):
    for make in DISTRIBUTIONS.values():
        fails(kind, text, getattr(make(), query), *arguments)


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("unary", "kind", "text"),
    [
        (zeros(3), ValueError, "Expected unary.shape == (*batch, N, V) with N, V >= 1; got (3,)."),
        (zeros(), ValueError, "Expected unary.shape == (*batch, N, V) with N, V >= 1; got ()."),
        (zeros(2, 0, 3), ValueError, "with N, V >= 1; got (2, 0, 3)."),
        (zeros(2, 4, 0), ValueError, "with N, V >= 1; got (2, 4, 0)."),
        (UNARY.long(), TypeError, "Expected unary of floating-point numbers; got torch.int64."),
        (UNARY.bool(), TypeError, "Expected unary of floating-point numbers; got torch.bool."),
        (UNARY.cfloat(), TypeError, "Expected unary of floating-point numbers; got torch.complex64."),
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
        (ints(2).to("meta"), ValueError, "Expected lengths.device == cpu (that of unary); got meta."),
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
            f"Expected {name} of finite numbers or -inf; got {entry}.",
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
        "Expected transition of finite numbers or -inf",
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
    text = "Expected value.device == cpu (that of the potentials); got meta."
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
IMPOSSIBLE = with_entry(UNARY, -INF, 1, 2)
LOOP = with_entry(zeros(3, 3) - INF, 0.0, (0, 1, 2), (0, 1, 2))  # every label must stay
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
        text = f"Expected potentials that allow a label string; got none for {row} (all scores are -inf)."
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


@pytest.mark.parametrize("query", ["given", "log_marginal_of"])
@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((ints(2, 5),), ValueError, "Expected labels.shape[-1:] == (4,); got (2, 5)."),
        ((ints(2, 1),), ValueError, "Expected labels.shape[-1:] == (4,); got (2, 1)."),
        ((ints(),), ValueError, "Expected labels.shape[-1:] == (4,); got ()."),
        ((ints(3, 4),), ValueError, "Expected labels of a shape that broadcasts with (2, 4); got (3, 4)."),
        ((torch.ones(4, dtype=torch.bool),), ValueError, "Expected labels.shape[-2:] == (4, 3); got (4,)."),
        ((KNOWN,), ValueError, "Expected labels.shape[-2:] == (4, 3); got (2, 4)."),
        ((torch.ones(3, 4, 3, dtype=torch.bool),), ValueError, "that broadcasts with (2, 4, 3); got (3, 4, 3)."),
        (([0, 0, 0, 0],), TypeError, "Expected labels to be of class Tensor; got list."),
        ((LABELS.to("meta"),), ValueError, "Expected labels.device == cpu (that of the potentials); got meta."),
        ((LABELS, LABELS), TypeError, "Expected observed to be a Boolean tensor; got torch.int64."),
        ((LABELS, KNOWN[:, :3]), ValueError, "Expected observed.shape[-1:] == (4,); got (2, 3)."),
        ((LABELS, torch.tensor(True)), ValueError, "Expected observed.shape[-1:] == (4,); got ()."),
        ((LABELS, KNOWN[[0, 1, 0]]), ValueError, "observed of a shape that broadcasts with (2, 4); got (3, 4)."),
        ((ints(3, 1, 4), KNOWN.expand(5, 2, 4)), ValueError, "got labels (3, 1), observed (5, 2)."),
        ((LABELS, [True] * 4), TypeError, "Expected observed to be of class Tensor; got list."),
        ((LABELS, KNOWN.to("meta")), ValueError, "Expected observed.device == cpu (that of the potentials); got meta."),
    ],
)
def test_conditions(query, arguments, kind, text):
    fail_all(kind, text, query, *arguments)


@pytest.mark.parametrize("query", ["given", "log_marginal_of"])
@pytest.mark.parametrize("label", [3, -1, 0.5, NAN])
def test_conditions_outside(query, label):
    labels = with_entry(zeros(2, 4), label, 1, 1)
    for lengths in (None, RAGGED):
        d = crf(lengths=lengths, validate_args=True)
        fails(
            ValueError,
            f"Expected labels to be integers 0 ... 2; got {float(label)} at (1, 1).",
            getattr(d, query),
            labels,
        )
        fails(ValueError, f"got {float(label)} at (1, 1).", getattr(d, query), labels, KNOWN)
        assert d.given(labels, with_entry(KNOWN, False, 1, 1)).log_partition.isfinite().all()
        raw = crf(lengths=lengths, validate_args=False)
        assert raw.log_marginal_of(labels)[1] == -INF and raw.log_marginal_of(labels)[0].isfinite()
        fails(ValueError, "got none for row (1,)", lambda raw=raw: raw.given(labels).log_partition)
    padded = with_entry(zeros(2, 4), label, 1, 2)
    assert getattr(crf(lengths=RAGGED, validate_args=True), query)(padded) is not None
    none = with_entry(torch.ones(2, 4, 3, dtype=torch.bool), False, 0, 3)
    text = "Expected labels to allow a label at every observed site; got none at (0, 3)."
    fails(ValueError, text, getattr(crf(validate_args=True), query), none)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "a", torch.tensor(2)])
def test_k_best(k):
    fail_all(ValueError, f"Expected k to be an integer >= 1; got {k!r}.", "k_best", k)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((zeros(4),), ValueError, "Expected unary of a shape that broadcasts with (2, 4, 3); got (4,)."),
        ((zeros(5, 3),), ValueError, "Expected unary of a shape that broadcasts with (2, 4, 3); got (5, 3)."),
        ((zeros(3, 4, 3),), ValueError, "Expected unary of a shape that broadcasts with (2, 4, 3); got (3, 4, 3)."),
        (([0.0],), TypeError, "Expected unary to be of class Tensor; got list."),
        ((UNARY.to("meta"),), ValueError, "Expected unary.device == cpu (that of the potentials); got meta."),
        ((UNARY, zeros(3)), ValueError, "Expected transition.shape[-2:] == (3, 3); got (3,)."),
        ((UNARY, zeros(3, 1)), ValueError, "Expected transition.shape[-2:] == (3, 3); got (3, 1)."),
        (
            (UNARY, zeros(4, 3, 3)),
            ValueError,
            "transition of a shape that broadcasts with (2, 3, 3, 3); got (4, 3, 3).",
        ),
        ((UNARY, zeros(3, 3, 3, 3)), ValueError, "that broadcasts with (2, 3, 3, 3); got (3, 3, 3, 3)."),
    ],
)
def test_expectation(arguments, kind, text):
    fail_all(kind, text, "expectation", *arguments)


def test_expectation_of_other_than_finite_values():
    d = crf(validate_args=True)
    fails(ValueError, "Expected unary of finite numbers; got -inf.", d.expectation, IMPOSSIBLE)
    fails(ValueError, "Expected unary of finite numbers; got nan.", d.expectation, UNARY * NAN)
    fails(ValueError, "Expected transition of finite numbers; got -inf.", d.expectation, UNARY, LOOP)
    fails(ValueError, "that broadcasts with (1, 3); got (4, 3).", crf(zeros(1, 3)).expectation, zeros(4, 3))


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((with_entry(LABELS, 3, 1, 1),), ValueError, "Expected labels to be integers 0 ... 2; got 3 at (1, 1)."),
        ((with_entry(LABELS, -1, 0, 2),), ValueError, "Expected labels to be integers 0 ... 2; got -1 at (0, 2)."),
        ((zeros(2, 4) + 0.5,), ValueError, "Expected labels to be integers 0 ... 2; got 0.5 at (0, 0)."),
        ((ints(2, 5),), ValueError, "Expected labels.shape[-1:] == (4,); got (2, 5)."),
        ((ints(2, 1),), ValueError, "Expected labels.shape[-1:] == (4,); got (2, 1)."),
        ((ints(3, 4),), ValueError, "Expected labels of a shape that broadcasts with (2, 4); got (3, 4)."),
        (([0],), TypeError, "Expected labels to be of class Tensor; got list."),
        ((LABELS, zeros(3)), ValueError, "Expected cost.shape[-2:] == (3, 3); got (3,)."),
        ((LABELS, zeros(2, 2)), ValueError, "Expected cost.shape[-2:] == (3, 3); got (2, 2)."),
        ((LABELS, zeros(2, 3, 3)), ValueError, "Expected cost.dim() == 2 (one matrix for all rows); got (2, 3, 3)."),
        ((LABELS, [0.0]), TypeError, "Expected cost to be of class Tensor; got list."),
        ((LABELS, STEP.to("meta")), ValueError, "Expected cost.device == cpu (that of the potentials); got meta."),
    ],
)
def test_risk(arguments, kind, text):
    fail_all(kind, text, "risk", *arguments)


def test_risk_of_padding_and_of_other_dtypes():
    padded = with_entry(LABELS, -100, 1, slice(2, None))
    d = crf(lengths=RAGGED)
    assert torch.allclose(d.risk(padded), RAGGED.double() * 2 / 3) and d.risk(padded.double()).equal(d.risk(padded))
    fails(ValueError, "Expected labels to be integers 0 ... 2; got -100 at (1, 2).", crf().risk, padded)
    assert d.risk(LABELS.bool()).equal(d.risk(LABELS))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: crf(zeros(2, 4, 2), zeros(2, 2)), "of one number of sites and of labels; got (4, 3) and (4, 2)."),
        (lambda: crf(zeros(2, 5, 3)), "of one number of sites and of labels; got (4, 3) and (5, 3)."),
        (lambda: crf(zeros(3, 4, 3)), "Expected batch shapes that broadcast; got p (2,), q (3,)."),
        (lambda: crf(lengths=torch.tensor([4, 3])), "Expected distributions of equal lengths; got 4 and 3."),
        (lambda: crf(UNARY.to("meta"), STEP.to("meta")), "Expected distributions on one device; got cpu and meta."),
        (lambda: dist.Normal(zeros(2, 4), 1.0).to_event(1), "OneHotCategorical with to_event(1) beside a LinearChainCRF; got"),
        (lambda: dist.Bernoulli(zeros(2, 4)).to_event(1), "OneHotCategorical with to_event(1) beside a LinearChainCRF; got"),
        (lambda: dist.Categorical(logits=UNARY).to_event(2), "with to_event(1) beside a LinearChainCRF; got Independent"),
        (lambda: dist.Categorical(logits=UNARY[..., :2]).to_event(1), "of labels; got (4, 3) and (4, 2)."),
        (lambda: dist.Categorical(logits=UNARY[:, :3]).to_event(1), "of labels; got (4, 3) and (3, 3)."),
        (lambda: dist.Categorical(logits=UNARY[[0, 1, 0]]).to_event(1), "broadcast; got p (2,), q (3,)."),
    ],
)  # fmt: skip
def test_divergences(other, text):
    fails(ValueError, text, kl_divergence, crf(), other())
    fails(ValueError, text, crf().cross_entropy, other())
    swapped = re.sub(r"got (\(?[\w, ]*\)?) and (\(?[\w, ]*\)?)\.", r"got \2 and \1.", text).replace(
        "p (2,), q (3,)", "p (3,), q (2,)"
    )
    fails(ValueError, swapped, kl_divergence, other(), crf())


def test_divergences_of_other_lengths_than_all():
    fails(ValueError, "equal lengths; got 2 and 4.", kl_divergence, crf(lengths=RAGGED), crf())
    fails(ValueError, "equal lengths; got 4 and 2.", kl_divergence, crf(), crf(lengths=RAGGED))


def test_divergences_of_lengths_that_cannot_be_seen():
    """On ``meta`` there are none: a result for any lengths, both ways round; other sizes are told apart all the same."""
    meta = torch.device("meta")
    ragged = crf(UNARY.to(meta), STEP.to(meta), lengths=RAGGED.to(meta))
    independent = dist.Categorical(logits=UNARY.to(meta), validate_args=False).to_event(1)
    for other in (ragged, crf(UNARY.to(meta), STEP.to(meta)), independent):
        for found in (kl_divergence(ragged, other), kl_divergence(other, ragged)):
            assert found.is_meta and found.shape == (2,)
    longer = crf(zeros(2, 5, 3, device=meta), STEP.to(meta))
    fails(ValueError, "of one number of sites and of labels; got (4, 3) and (5, 3).", kl_divergence, ragged, longer)
    fails(ValueError, "of one number of sites and of labels; got (5, 3) and (4, 3).", kl_divergence, longer, ragged)


@pytest.mark.parametrize("other", [lambda: dist.Normal(0.0, 1.0), lambda: dist.Categorical(logits=UNARY), lambda: None])
def test_divergences_of_other_families(other):
    text = f"No KL(p || q) is implemented for p type LinearChainCRF and q type {type(other()).__name__}"
    fails(NotImplementedError, text, kl_divergence, crf(), other())
    fails(NotImplementedError, text, crf().cross_entropy, other())


def test_enumerate_support():
    fails(
        ValueError,
        "Expected at most 1048576 label strings to be enumerated; got 2^21.",
        crf(zeros(21, 2), zeros(2, 2)).enumerate_support,
    )
    fails(
        NotImplementedError,
        "Expected rows of one length to be enumerated; got lengths [2, 4].",
        crf(lengths=RAGGED).enumerate_support,
    )
