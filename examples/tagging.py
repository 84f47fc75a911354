"""Segmentation and tagging of Turkish words with a conditional random field (CRF).

    python examples/tagging.py [--out FILE] [--smoke-test]

A Turkish word is a string of parts, and each part has a part of speech of its own:
bitirmenin, "of finishing", is bit (verb: end), ir (verb: cause to) and menin (noun: of
doing that). The data are sentences of at most 100 characters from the Turkish Web
Treebank, segmented and tagged by people (Kayadelen, Öztürel, Bohnet, "A gold standard
dependency treebank for Turkish", LREC 2020). They come with the package
turkish-treebanks and are split as its authors do.

Each character is a site. Its label is B-tag at the beginning of a part, I-tag inside
it, and O for a space. A recurrent network reads the sentence in both directions. Its
outputs are the inputs of three models:

* independent labels: a softmax for each character;
* independent, legal: the same weights, decoded to the most probable string in which
  each I-tag follows a B-tag or I-tag of the same tag;
* CRF: has weights for pairs of neighbouring labels, too, and gives no probability to
  illegal strings, in training as well.

A part is right if its place and its tag are right. The table has these columns:

* nats: the mean log-probability per character of the test labels.
* labels, %: the share of characters, spaces excluded, whose label is right.
* F1: 2 hits / (found + true parts), in percent.
* over 1st, over 2nd: the gain in F1 over the first and the second model, with one
  standard error over sentences.
* one given: F1 when the true label of one character per sentence, the least certain
  one, is given. Conditioning the CRF on this label may change all other labels; among
  independent labels only the given one changes.

The confidence of a part is the exact probability that it is there, with its tag and
its length, summed over the labels of all other characters.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from importlib.metadata import files
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import torch
from _tagging_figure import Sentence, picture
from torch import Tensor, nn

import pyro_genexact as gx

TAGS = ["NOUN", "VERB", "ADJ", "ADV", "PRON", "NUM", "DET", "ADP"]
TAGS += ["CONJ", "PRT", "PUNCT", "X"]
OTHER = {"ONOM": "X", "AFFIX": "X"}  # sixteen parts in all
LABELS = ["O"] + [f"{place}-{tag}" for tag in TAGS for place in "BI"]
INDEX = {label: k for k, label in enumerate(LABELS)}
BEGIN = torch.tensor([INDEX[f"B-{tag}"] for tag in TAGS])
INSIDE = torch.tensor([INDEX[f"I-{tag}"] for tag in TAGS])
# LEGAL[a, b]: whether label b may follow label a; FIRST: whether it may come first.
LEGAL = torch.tensor([[b[0] != "I" or b[2:] == a[2:] for b in LABELS] for a in LABELS])
FIRST = torch.tensor([label[0] != "I" for label in LABELS])
LONGEST, HIDDEN, V = 100, 96, len(LABELS)
# Test sentences that are printed; those with a translation are in the picture.
SHOWN = (3, 8, 21)
ENGLISH = {
    3: "It returns to normal within 1 or 2 hours at the latest.",
    8: "If you are still weak though you sleep regularly, you may lack iron.",
}

Span = tuple[int, int, str]  # the first character, the one after the last, the tag


class Corpus(NamedTuple):
    """Sentences as strings and as tensors."""

    sentences: list[str]
    text: Tensor  # (S, LONGEST) codes of the characters, 0 for padding
    labels: Tensor  # (S, LONGEST)
    lengths: Tensor  # (S,)

    def take(self, rows: list[int]) -> Corpus:
        sentences = [self.sentences[row] for row in rows]
        return Corpus(sentences, *(x[rows] for x in self[1:]))


def treebank() -> tuple[list[Corpus], int]:
    """Training, validation and test sentences, and the number of character codes."""
    parts: list[list[tuple[str, list[str]]]] = [[], [], []]
    for file in files("turkish-treebanks"):
        if file.suffix == ".conllu":
            blocks = file.read_text(encoding="utf-8").strip().split("\n\n")
            for k, block in enumerate(blocks):
                text, labels = read(block)
                if len(text) <= LONGEST:
                    parts[max(0, k % 10 - 7)].append((text, labels))
    counts = Counter(character for text, _ in parts[0] for character in text)
    known = [character for character, count in counts.items() if count >= 5]
    numbers = {character: k for k, character in enumerate(known, 2)}  # 1: others
    return [tensors(part, numbers) for part in parts], len(numbers) + 2


def read(block: str) -> tuple[str, list[str]]:
    """Text and labels of a sentence in CoNLL-U format.

    A line is a part, with number, form, lemma, tag, ..., spacing.
    """
    text, labels = "", []
    for line in block.splitlines():
        if not line.startswith("#"):
            _, form, _, tag, *_, spacing = line.split("\t")
            tag, space = OTHER.get(tag, tag), spacing != "SpaceAfter=No"
            text += form + " " * space
            labels += [f"B-{tag}"] + [f"I-{tag}"] * (len(form) - 1) + ["O"] * space
    return text.rstrip(), labels[: len(text.rstrip())]


def tensors(part: list[tuple[str, list[str]]], numbers: dict[str, int]) -> Corpus:
    """The sentences of a part of the data as tensors."""
    text, labels = torch.zeros(2, len(part), LONGEST, dtype=torch.long)
    for row, (characters, names) in enumerate(part):
        codes = [numbers.get(character, 1) for character in characters]
        text[row, : len(names)] = torch.tensor(codes)
        labels[row, : len(names)] = torch.tensor([INDEX[name] for name in names])
    sentences = [characters for characters, _ in part]
    return Corpus(sentences, text, labels, (text > 0).sum(-1))


class Encoder(nn.Module):
    """Scores (*batch, N, V) of the labels from text (*batch, N), in both directions."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 48, padding_idx=0)
        self.convolution = nn.Conv1d(48, HIDDEN, 5, padding=2)
        self.recurrent = nn.GRU(HIDDEN, HIDDEN, batch_first=True, bidirectional=True)
        self.dropout, self.scores = nn.Dropout(0.1), nn.Linear(2 * HIDDEN, V)

    def forward(self, text: Tensor) -> Tensor:
        x = self.dropout(self.embedding(text))
        x = self.dropout(self.convolution(x.mT).relu().mT)
        return self.scores(self.dropout(self.recurrent(x)[0]))


class Independent(nn.Module):
    """A softmax for each character: a CRF whose weights of pairs are 0."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, context: Tensor, lengths: Tensor) -> gx.LinearChainCRF:
        unary = self.encoder(context)
        return gx.LinearChainCRF(unary, unary.new_zeros(V, V), lengths=lengths)


def fit(model: nn.Module, train: Corpus, validation: Corpus, epochs: int) -> nn.Module:
    """Maximises the log-probability of the labels given the text."""
    data, held_out = (
        (part.labels, {"context": part.text, "lengths": part.lengths})
        for part in (train, validation)
    )
    gx.fit(model, *data, validation=held_out, epochs=epochs, batch_size=32, lr=1e-2)
    return model.eval()


def spans(labels: Tensor, lengths: Tensor) -> list[list[Span]]:
    """The parts in strings of labels (S, N).

    An I-tag that continues no part begins one, as in conlleval.
    """
    strings = [
        [LABELS[k] for k in row[:n]]
        for row, n in zip(labels.tolist(), lengths.tolist(), strict=True)
    ]
    return [spans_of(string) for string in strings]


def spans_of(labels: list[str]) -> list[Span]:
    """The parts in one string of labels."""
    found, begin, tag = [], 0, ""
    for t, label in enumerate([*labels, "O"]):
        if tag and label != f"I-{tag}":
            found.append((begin, t, tag))
            tag = ""
        if not tag and label != "O":
            begin, tag = t, label[2:]
    return found


class F1(NamedTuple):
    """An F1, and the influence (S,) of each sentence on it.

    By the delta method, the standard error of F1 is that of the mean influence.
    """

    value: float
    influence: Tensor

    def gain(self, other: F1) -> str:
        difference = self.influence - other.influence
        error = difference.std() / math.sqrt(len(difference))
        return f"{100 * (self.value - other.value):+.1f} ± {100 * error:.1f}"


def f1(found: list[list[Span]], true: list[list[Span]]) -> F1:
    pairs = list(zip(found, true, strict=True))
    hits = torch.tensor([2.0 * len({*a} & {*b}) for a, b in pairs])
    total = torch.tensor([float(len(a) + len(b)) for a, b in pairs])
    value = hits.sum() / total.sum()
    return F1(value.item(), (hits - value * total) / total.mean())


def one_given(crf: gx.LinearChainCRF, labels: Tensor) -> gx.LinearChainCRF:
    """The CRF given the label of the character whose best label is least probable."""
    best = crf.marginals.amax(-1)
    least = best.masked_fill(best == 0, 1).argmin(-1, keepdim=True)  # 0 in the padding
    return crf.given(labels, torch.arange(LONGEST) == least)


@torch.no_grad()
def confidence(model: nn.Module, corpus: Corpus, found: list[list[Span]]) -> Tensor:
    """The exact probability of each part, one after the other.

    A part has B-tag at its first character, I-tag up to its end, and no I-tag after it.
    """
    flat = [(row, *span) for row, part in enumerate(found) for span in part]
    allowed = torch.ones(len(flat), LONGEST, V, dtype=torch.bool)
    for k, (_, a, b, tag) in enumerate(flat):
        allowed[k, a:b] = False
        allowed[k, a, INDEX[f"B-{tag}"]] = True
        allowed[k, a + 1 : b, INDEX[f"I-{tag}"]] = True
        allowed[k, b : b + 1, INDEX[f"I-{tag}"]] = False
    part = corpus.take([row for row, *_ in flat])
    return model(part.text, part.lengths).log_marginal_of(allowed).exp()


@torch.no_grad()
def report(models: dict[str, nn.Module], test: Corpus) -> None:
    """Prints the table."""
    crfs = {name: model(test.text, test.lengths) for name, model in models.items()}
    unary = crfs["independent labels"].unary
    transition, initial = (
        torch.zeros(x.shape).masked_fill(~x, -math.inf) for x in (LEGAL, FIRST)
    )
    crfs["independent, legal"] = gx.LinearChainCRF(
        unary, transition, initial=initial, lengths=test.lengths
    )
    true, letters = spans(test.labels, test.lengths), test.labels > 0
    titles = ("nats", "labels, %", "F1", "over 1st", "over 2nd", "one given")
    widths = (9, 11, 8, 14, 14, 11)
    cells = zip(titles, widths, strict=True)
    print(f"{'':<20}" + "".join(f"{title:>{width}}" for title, width in cells))
    scores: list[F1] = []
    for name in ("independent labels", "independent, legal", "CRF"):
        crf = crfs[name]
        nats = crf.log_prob(test.labels).sum() / test.lengths.sum()
        right = (crf.mode == test.labels)[letters].float().mean()
        scores.append(f1(spans(crf.mode, test.lengths), true))
        first, second = [*(scores[-1].gain(other) for other in scores[:-1]), "", ""][:2]
        after = f1(spans(one_given(crf, test.labels).mode, test.lengths), true).value
        numbers = f"{nats:>9.3f}{100 * right:>11.1f}{100 * scores[-1].value:>8.1f}"
        print(f"{name:<20}{numbers}{first:>14}{second:>14}{100 * after:>11.1f}")


@torch.no_grad()
def show(model: nn.Module, one: Corpus) -> None:
    """Prints a decoded sentence: its parts with confidence, and missed true parts."""
    text, crf = one.sentences[0], model(one.text, one.lengths)
    found, true = spans(crf.mode, one.lengths)[0], spans(one.labels, one.lengths)[0]
    words: list[list[str]] = [[] for _ in text.split()]
    sure = confidence(model, one, [found]).tolist()
    for (a, b, tag), p in zip(found, sure, strict=True):
        wrong = "" if (a, b, tag) in true else "*"
        words[text[:a].count(" ")].append(
            f"{wrong}{text[a:b]}/{tag}\u00a0{100 * p:.0f}"
        )
    decoded = " | ".join(" + ".join(word) for word in words)
    print(f"\n{text}")
    print(fill(decoded, 88, initial_indent="  ", subsequent_indent="    "))
    missed = [f"{text[a:b]}/{tag}" for a, b, tag in true if (a, b, tag) not in found]
    if missed:
        print(fill(f"  * true: {', '.join(missed)}", 88, subsequent_indent="    "))


def calibration(model: nn.Module, test: Corpus) -> tuple[Tensor, Tensor, int]:
    """Mean confidence and share of right parts in tenths of the found parts.

    Also the number of parts in a tenth.
    """
    found = spans(model(test.text, test.lengths).mode, test.lengths)
    true = spans(test.labels, test.lengths)
    pairs = zip(found, true, strict=True)
    right = torch.tensor([float(span in b) for a, b in pairs for span in a])
    sure = confidence(model, test, found)
    groups = sure.argsort().tensor_split(10)
    x, y = (torch.stack([values[g].mean() for g in groups]) for values in (sure, right))
    return x, y, len(groups[-1])


def following(crf: gx.LinearChainCRF) -> Tensor:
    """Expected numbers (6, 6) of pairs of adjacent parts in a word, by their tags."""
    pairs = crf.pair_marginals.sum((0, 1))[:, BEGIN[:6]]
    return pairs[BEGIN[:6]] + pairs[INSIDE[:6]]


@torch.no_grad()
def sentences(crf: nn.Module, test: Corpus) -> list[Sentence]:
    """The sentences of the picture, with marginals and true parts."""
    rows = list(ENGLISH)
    shown = test.take(rows)
    marginals = crf(shown.text, shown.lengths).marginals
    result = []
    for p, true, row in zip(marginals, spans(*shown[2:]), rows, strict=True):
        p, parts = p[: test.lengths[row]], [(a, b, TAGS.index(t)) for a, b, t in true]
        tags, begins = (p[:, BEGIN] + p[:, INSIDE]).T, p[:, BEGIN].sum(-1)
        text = test.sentences[row]
        result.append(Sentence(text, ENGLISH[row], tags, begins, parts))
    return result


@torch.no_grad()
def draw(models: dict[str, nn.Module], test: Corpus, out: Path) -> None:
    """Computes what the picture shows, and draws it."""
    curves = {name: calibration(model, test) for name, model in models.items()}
    crf = models["CRF"](test.text, test.lengths)
    pairs = following(crf), following(crf.given(test.labels))
    picture(sentences(models["CRF"], test), curves, pairs, TAGS, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = Path("tagging.png")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE")
    parser.add_argument("--smoke-test", action="store_true", help="a short test run")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    start = time.perf_counter()
    (train, validation, test), characters = treebank()
    if args.smoke_test:
        few = list(range(64))
        train, validation, test = (part.take(few) for part in (train, validation, test))
    sizes = f"{len(test.text)} test sentences of {test.lengths.sum()} characters"
    print(f"{len(train.text)} training sentences, {sizes}\n")

    epochs, models = 1 if args.smoke_test else 8, {}
    torch.manual_seed(0)
    independent = Independent(Encoder(characters))
    models["independent labels"] = fit(independent, train, validation, epochs)
    torch.manual_seed(0)
    crf = gx.CRF(V, context=Encoder(characters), allowed=LEGAL, allowed_initial=FIRST)
    models["CRF"] = fit(crf, train, validation, epochs)

    report(models, test)
    print("\nDecoded by the CRF, with confidence in percent (* wrong):")
    for row in SHOWN:
        show(models["CRF"], test.take([row]))
    draw(models, test, args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
