"""Wrong arguments of the queries of LinearChainCRF, by the text of their errors."""

import re

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from support.checks import fails
from support.small_crfs import IMPOSSIBLE, LOOP, crf, fail_all, with_entry, zeros
from support.values import ints

NAN, INF = torch.nan, torch.inf
UNARY, STEP = torch.zeros(2, 4, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
LABELS, KNOWN = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
RAGGED = torch.tensor([4, 2])


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
        ((LABELS.to("meta"),), ValueError, "Expected labels.device == cpu (device of the potentials); got meta."),
        ((LABELS, LABELS), TypeError, "Expected observed to be a Boolean tensor; got torch.int64."),
        ((LABELS, KNOWN[:, :3]), ValueError, "Expected observed.shape[-1:] == (4,); got (2, 3)."),
        ((LABELS, torch.tensor(True)), ValueError, "Expected observed.shape[-1:] == (4,); got ()."),
        ((LABELS, KNOWN[[0, 1, 0]]), ValueError, "observed of a shape that broadcasts with (2, 4); got (3, 4)."),
        ((ints(3, 1, 4), KNOWN.expand(5, 2, 4)), ValueError, "got labels (3, 1), observed (5, 2)."),
        ((LABELS, [True] * 4), TypeError, "Expected observed to be of class Tensor; got list."),
        (
            (LABELS, KNOWN.to("meta")),
            ValueError,
            "Expected observed.device == cpu (device of the potentials); got meta.",
        ),
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
        ((UNARY.to("meta"),), ValueError, "Expected unary.device == cpu (device of the potentials); got meta."),
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
    fails(ValueError, "Expected unary to be finite; got -inf.", d.expectation, IMPOSSIBLE)
    fails(ValueError, "Expected unary to be finite; got nan.", d.expectation, UNARY * NAN)
    fails(ValueError, "Expected transition to be finite; got -inf.", d.expectation, UNARY, LOOP)
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
        ((LABELS, STEP.to("meta")), ValueError, "Expected cost.device == cpu (device of the potentials); got meta."),
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
        (lambda: crf(zeros(2, 4, 2), zeros(2, 2)), "Expected the same numbers of sites and labels; got (4, 3) and (4, 2)."),
        (lambda: crf(zeros(2, 5, 3)), "Expected the same numbers of sites and labels; got (4, 3) and (5, 3)."),
        (lambda: crf(zeros(3, 4, 3)), "Expected batch shapes that broadcast; got p (2,), q (3,)."),
        (lambda: crf(lengths=torch.tensor([4, 3])), "Expected distributions of equal lengths; got 4 and 3."),
        (lambda: crf(UNARY.to("meta"), STEP.to("meta")), "Expected distributions on the same device; got cpu and meta."),
        (lambda: dist.Normal(zeros(2, 4), 1.0).to_event(1), "OneHotCategorical with to_event(1), to compare with a LinearChainCRF; got"),
        (lambda: dist.Bernoulli(zeros(2, 4)).to_event(1), "OneHotCategorical with to_event(1), to compare with a LinearChainCRF; got"),
        (lambda: dist.Categorical(logits=UNARY).to_event(2), "with to_event(1), to compare with a LinearChainCRF; got Independent"),
        (lambda: dist.Categorical(logits=UNARY[..., :2]).to_event(1), "sites and labels; got (4, 3) and (4, 2)."),
        (lambda: dist.Categorical(logits=UNARY[:, :3]).to_event(1), "sites and labels; got (4, 3) and (3, 3)."),
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
    fails(
        ValueError,
        "Expected the same numbers of sites and labels; got (4, 3) and (5, 3).",
        kl_divergence,
        ragged,
        longer,
    )
    fails(
        ValueError,
        "Expected the same numbers of sites and labels; got (5, 3) and (4, 3).",
        kl_divergence,
        longer,
        ragged,
    )


@pytest.mark.parametrize("other", [lambda: dist.Normal(0.0, 1.0), lambda: dist.Categorical(logits=UNARY), lambda: None])
def test_divergences_of_other_families(other):
    text = f"No KL(p || q) is implemented for p type LinearChainCRF and q type {type(other()).__name__}"
    fails(NotImplementedError, text, kl_divergence, crf(), other())
    fails(NotImplementedError, text, crf().cross_entropy, other())


def test_enumerate_support():
    fails(
        ValueError,
        "Expected at most 1048576 label sequences for enumeration; got 2^21.",
        crf(zeros(21, 2), zeros(2, 2)).enumerate_support,
    )
    fails(
        NotImplementedError,
        "Expected rows of equal lengths for enumeration; got lengths [2, 4].",
        crf(lengths=RAGGED).enumerate_support,
    )
