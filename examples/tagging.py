"""Words cut into parts and the parts tagged: Turkish text, a recurrent network and a conditional random field.

    python examples/tagging.py [--out tagging.png] [--smoke-test]

A Turkish word is a string of parts, each with a part of speech of its own: bitirmenin, "of finishing", is bit (verb: end),
ir (verb: cause to), menin (noun: of doing that). The data are sentences of the Turkish Web Treebank, cut and tagged by
people (Kayadelen, Öztürel, Bohnet, "A gold standard dependency treebank for Turkish", LREC 2020), from files that come with
the package turkish-treebanks: those of at most 100 characters, split as its authors do.

A character is a site. Its label is B-tag where a part begins, I-tag where it goes on, and O for a space. A network reads the
sentence in both directions, and its outputs go into one of:

* independent labels: a softmax a character;
* independent, legal: the same weights, but the best among the strings where I-tag follows B-tag or I-tag;
* CRF: weights of pairs of neighbours too, and no probability for any other string, in training as well.

A part is right if its place and its tag are. F1 is 2 hits / (found + true) over the test sentences, in percent, and a gain
has a standard error over sentences. "One told" is F1 once the true label of one character a sentence, the least sure one, is
known: the CRF given that label may change all others, of independent labels only that one changes. The confidence of a part
is the exact probability that it is there, with its tag and no longer, the rest summed out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from importlib.metadata import files
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import pyro_genexact as gx

TAGS = [
    "NOUN",
    "VERB",
    "ADJ",
    "ADV",
    "PRON",
    "NUM",
    "DET",
    "ADP",
    "CONJ",
    "PRT",
    "PUNCT",
    "X",
]
OTHER = {"ONOM": "X", "AFFIX": "X"}  # sixteen in all
LABELS = ["O"] + [f"{place}-{tag}" for tag in TAGS for place in "BI"]
INDEX = {label: k for k, label in enumerate(LABELS)}
BEGIN, INSIDE = (
    torch.tensor([INDEX[f"{place}-{tag}"] for tag in TAGS]) for place in "BI"
)
LEGAL = torch.tensor(
    [[b[0] != "I" or b[2:] == a[2:] for b in LABELS] for a in LABELS]
)  # whether b may follow a
FIRST = torch.tensor([label[0] != "I" for label in LABELS])
LONGEST, HIDDEN, V = 100, 96, len(LABELS)
SHOWN = (3, 8, 21)  # test sentences; the first two are in the picture

Span = tuple[int, int, str]  # first character, the one after the last, tag


class Corpus(NamedTuple):
    sentences: list[str]
    text: Tensor  # (S, LONGEST) numbers of characters, 0 in the padding
    labels: Tensor  # (S, LONGEST)
    lengths: Tensor  # (S,)

    def take(self, rows: list[int]) -> Corpus:
        return Corpus(
            [self.sentences[row] for row in rows],
            self.text[rows],
            self.labels[rows],
            self.lengths[rows],
        )


def treebank() -> tuple[list[Corpus], int]:
    """Training, validation and test sentences, and how many characters are told apart."""
    parts: list[list[tuple[str, list[str]]]] = [[], [], []]
    for file in files("turkish-treebanks"):
        if file.suffix == ".conllu":
            for k, block in enumerate(
                file.read_text(encoding="utf-8").strip().split("\n\n")
            ):
                text, labels = read(block)
                if len(text) <= LONGEST:
                    parts[max(0, k % 10 - 7)].append((text, labels))
    counts = Counter(character for text, _ in parts[0] for character in text)
    known = [character for character, count in counts.items() if count >= 5]
    numbers = {character: k for k, character in enumerate(known, 2)}  # 1 is any other
    return [tensors(part, numbers) for part in parts], len(numbers) + 2


def read(block: str) -> tuple[str, list[str]]:
    """Text and labels of a sentence in CoNLL-U: a line is a part, with number, form, lemma, tag, ..., spacing."""
    text, labels = "", []
    for line in block.splitlines():
        if not line.startswith("#"):
            _, form, _, tag, *_, spacing = line.split("\t")
            tag, space = OTHER.get(tag, tag), spacing != "SpaceAfter=No"
            text += form + " " * space
            labels += [f"B-{tag}"] + [f"I-{tag}"] * (len(form) - 1) + ["O"] * space
    return text.rstrip(), labels[: len(text.rstrip())]


def tensors(part: list[tuple[str, list[str]]], numbers: dict[str, int]) -> Corpus:
    text, labels = torch.zeros(2, len(part), LONGEST, dtype=torch.long)
    for row, (characters, names) in enumerate(part):
        text[row, : len(names)] = torch.tensor(
            [numbers.get(character, 1) for character in characters]
        )
        labels[row, : len(names)] = torch.tensor([INDEX[name] for name in names])
    return Corpus(
        [characters for characters, _ in part], text, labels, (text > 0).sum(-1)
    )


class Encoder(nn.Module):
    """Scores (*batch, N, V) of the labels from text (*batch, N), both sides of a character in view."""

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
    """A softmax a character: a CRF whose pairs weigh nothing."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, context: Tensor, lengths: Tensor) -> gx.LinearChainCRF:
        unary = self.encoder(context)
        return gx.LinearChainCRF(unary, unary.new_zeros(V, V), lengths=lengths)


def fit(model: nn.Module, train: Corpus, validation: Corpus, epochs: int) -> nn.Module:
    data, held_out = (
        (part.labels, {"context": part.text, "lengths": part.lengths})
        for part in (train, validation)
    )
    gx.fit(model, *data, validation=held_out, epochs=epochs, batch_size=32, lr=1e-2)
    return model.eval()


def spans(labels: Tensor, lengths: Tensor) -> list[list[Span]]:
    """The parts that strings of labels (S, N) mean; an I-tag that continues nothing begins a part, as conlleval has it."""
    strings = [
        [LABELS[k] for k in row[:n]]
        for row, n in zip(labels.tolist(), lengths.tolist(), strict=True)
    ]
    return [spans_of(string) for string in strings]


def spans_of(labels: list[str]) -> list[Span]:
    found, begin, tag = [], 0, ""
    for t, label in enumerate([*labels, "O"]):
        if tag and label != f"I-{tag}":
            found.append((begin, t, tag))
            tag = ""
        if not tag and label != "O":
            begin, tag = t, label[2:]
    return found


class F1(NamedTuple):
    value: float
    influence: Tensor  # (S,) of each sentence: by the delta method the value's error is that of their mean

    def gain(self, other: F1) -> str:
        error = (self.influence - other.influence).std() / math.sqrt(
            len(self.influence)
        )
        return f"{100 * (self.value - other.value):+.1f} ± {100 * error:.1f}"


def f1(found: list[list[Span]], true: list[list[Span]]) -> F1:
    pairs = list(zip(found, true, strict=True))
    hits = torch.tensor([2.0 * len({*a} & {*b}) for a, b in pairs])
    total = torch.tensor([float(len(a) + len(b)) for a, b in pairs])
    value = hits.sum() / total.sum()
    return F1(value.item(), (hits - value * total) / total.mean())


def told(crf: gx.LinearChainCRF, labels: Tensor) -> gx.LinearChainCRF:
    """The distribution given the label of the character whose best label is least probable."""
    best = crf.marginals.amax(-1)
    least = best.masked_fill(best == 0, 1).argmin(-1, keepdim=True)  # 0 in the padding
    return crf.given(labels, torch.arange(LONGEST) == least)


@torch.no_grad()
def confidence(model: nn.Module, corpus: Corpus, found: list[list[Span]]) -> Tensor:
    """The probability of each part, one after the other: B at its begin, I to its end, and not that I after it."""
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
    crfs = {name: model(test.text, test.lengths) for name, model in models.items()}
    unary = crfs["independent labels"].unary
    transition, initial = (
        torch.zeros(x.shape).masked_fill(~x, -math.inf) for x in (LEGAL, FIRST)
    )
    crfs["independent, legal"] = gx.LinearChainCRF(
        unary, transition, initial=initial, lengths=test.lengths
    )
    true, letters = spans(test.labels, test.lengths), test.labels > 0
    header = (
        "nats a character",
        "labels right, %",
        "F1",
        "over the first",
        "over the second",
        "F1, one told",
    )
    print(f"{'':<20}" + "".join(f"{title:>17}" for title in header))
    scores: list[F1] = []
    for name in ("independent labels", "independent, legal", "CRF"):
        crf = crfs[name]
        nats = crf.log_prob(test.labels).sum() / test.lengths.sum()
        right = (crf.mode == test.labels)[letters].float().mean()
        scores.append(f1(spans(crf.mode, test.lengths), true))
        first, second = [*(scores[-1].gain(other) for other in scores[:-1]), "", ""][:2]
        after = f1(spans(told(crf, test.labels).mode, test.lengths), true).value
        numbers = f"{nats:>17.3f}{100 * right:>17.1f}{100 * scores[-1].value:>17.1f}"
        print(f"{name:<20}{numbers}{first:>17}{second:>17}{100 * after:>17.1f}")


@torch.no_grad()
def show(model: nn.Module, one: Corpus) -> None:
    """A decoded sentence: its parts with confidence in percent, and what they should be where they are wrong."""
    text, crf = one.sentences[0], model(one.text, one.lengths)
    found, true = spans(crf.mode, one.lengths)[0], spans(one.labels, one.lengths)[0]
    words: list[list[str]] = [[] for _ in text.split()]
    for (a, b, tag), p in zip(
        found, confidence(model, one, [found]).tolist(), strict=True
    ):
        wrong = "" if (a, b, tag) in true else "*"
        words[text[:a].count(" ")].append(f"{wrong}{text[a:b]}/{tag} {100 * p:.0f}")
    print(f"\n{text}\n  " + " | ".join(" + ".join(word) for word in words))
    missed = [f"{text[a:b]}/{tag}" for a, b, tag in true if (a, b, tag) not in found]
    if missed:
        print(f"  * should be {', '.join(missed)}")


def heat(axes: plt.Axes, marginals: Tensor, text: str, true: list[Span]) -> None:
    """The marginals (N, V) of a sentence, of the tags and that a part begins, with frames around the true parts."""
    marginals = marginals[: len(text)]
    axes.imshow(
        (marginals[:, BEGIN] + marginals[:, INSIDE]).T,
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="auto",
    )
    begins = torch.arange(len(text)) - 0.5
    axes.vlines(
        begins,
        -0.5,
        len(TAGS) - 0.5,
        color="tab:red",
        alpha=marginals[:, BEGIN].sum(-1).clamp(0, 1),
    )
    for a, b, tag in true:
        axes.add_patch(
            Rectangle(
                (a - 0.5, TAGS.index(tag) - 0.5),
                b - a,
                1,
                fill=False,
                linewidth=1.5,
                zorder=3,
            )
        )
    axes.set_xticks(range(len(text)), text, fontsize=12)
    axes.set_yticks(range(len(TAGS)), TAGS, fontsize=8)
    axes.tick_params(length=0)


def calibration(
    axes: plt.Axes, model: nn.Module, test: Corpus, name: str, color: str
) -> None:
    """The share of parts that are right against their confidence, in tenths of the parts, with 2 standard errors."""
    found, true = (
        spans(model(test.text, test.lengths).mode, test.lengths),
        spans(test.labels, test.lengths),
    )
    right = torch.tensor(
        [float(span in b) for a, b in zip(found, true, strict=True) for span in a]
    )
    sure = confidence(model, test, found)
    order = sure.argsort()
    groups = [
        (sure[g].mean(), right[g].mean(), right[g].std() / math.sqrt(len(g)))
        for g in order.tensor_split(10)
    ]
    x, y, error = torch.tensor(groups).T
    axes.errorbar(x, y, 2 * error, fmt="o-", markersize=4, color=color, label=name)


def following(crf: gx.LinearChainCRF) -> Tensor:
    """The expected number of parts of one tag that follow those of another in the same word (6, 6), all rows together."""
    pairs = crf.pair_marginals.sum((0, 1))[:, BEGIN[:6]]
    return pairs[BEGIN[:6]] + pairs[INSIDE[:6]]


def counts(axes: plt.Axes, expected: Tensor, true: Tensor) -> None:
    axes.imshow(expected.log1p(), cmap="Blues", vmax=8)
    for i, j in ((expected >= 0.5) | (true > 0)).nonzero().tolist():
        axes.text(
            j,
            i,
            f"{expected[i, j]:.0f}\n({true[i, j]:.0f})",
            ha="center",
            va="center",
            fontsize=9,
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(6), TAGS[:6], fontsize=9)
    axes.tick_params(length=0)
    axes.set(
        xlabel="part that follows",
        ylabel="part of a word",
        title="Parts of a word: expected (and true) number in the test",
    )


@torch.no_grad()
def picture(models: dict[str, nn.Module], test: Corpus, out: Path) -> None:
    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure = plt.figure(figsize=(12, 10), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    upper.suptitle(
        "Probability of a tag (blue), and that a part begins (red); truth in frames",
        fontsize=12,
    )
    shown, true = test.take(list(SHOWN[:2])), spans(test.labels, test.lengths)
    crf = models["CRF"](shown.text, shown.lengths)
    for k, axes in enumerate(upper.subplots(2, 1)):
        heat(axes, crf.marginals[k], shown.sentences[k], true[SHOWN[k]])
    left, right = lower.subplots(1, 2)
    left.axline((0, 0), slope=1, color="black", linewidth=0.8)
    for (name, model), color in zip(
        models.items(), ("tab:orange", "tab:blue"), strict=True
    ):
        calibration(left, model, test, name, color)
    left.set(
        xlabel="confidence of a part",
        ylabel="share that is right",
        title="Calibration, in tenths of the parts that are found",
    )
    left.legend(frameon=False)
    crf = models["CRF"](test.text, test.lengths)
    counts(right, following(crf), following(crf.given(test.labels)))
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tagging.png"), metavar="FILE")
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="one epoch and few rows, to see that everything runs",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    (train, validation, test), characters = treebank()
    if args.smoke_test:
        train, validation, test = (
            part.take(list(range(64))) for part in (train, validation, test)
        )
    print(
        f"{len(train.text)} training sentences, {len(test.text)} test sentences of {test.lengths.sum()} characters\n"
    )

    epochs, models = 1 if args.smoke_test else 8, {}
    torch.manual_seed(0)
    models["independent labels"] = fit(
        Independent(Encoder(characters)), train, validation, epochs
    )
    torch.manual_seed(0)
    crf = gx.CRF(V, context=Encoder(characters), allowed=LEGAL, allowed_initial=FIRST)
    models["CRF"] = fit(crf, train, validation, epochs)

    report(models, test)
    print("\nDecoded by the CRF, with confidence in percent:")
    for row in SHOWN:
        show(models["CRF"], test.take([row]))
    picture(models, test, args.out)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
