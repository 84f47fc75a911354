"""Text chunking by a linear-chain CRF with the templates of CRFsuite, CoNLL-2000, beside known figures.

    OMP_NUM_THREADS=1 python tests/benchmarks/published_crf.py --data DIR [--progress]
    OMP_NUM_THREADS=1 python tests/benchmarks/published.py --data DIR --only conll2000 [--progress]

DIR holds conll2000/train.txt; the README.md beside it tells format, templates, objective, published figures.

The 19 templates of CRFsuite's chunking example and a bias make 20 attributes a token; a token past either end of the sentence
is a symbol of its own at each distance. Weights are those of the pairs of attribute and label, and of label and next label,
that training has seen; all others are 0. L-BFGS from 0 in float64 minimises

    sum_sentences -log p(labels | words, tags) + |weights|^2.

* objective: trained on all 8936 sentences, the objective beside the 12799.8 of an independent CRF package.
* development: trained without the last 1000 sentences; token accuracy, and precision, recall and F1 of exact chunks
  (as conlleval counts them) on those. No setting was chosen by them.

Where the time of an evaluation goes is told too: sparse products of attributes and weights, the CRF with its gradient, and the
rest (L-BFGS itself). Two threads nearly halve an evaluation on idle cores, but wait for each other where cores are shared.

Seen on one core: 338552 attributes, 456490 weights, objective 12799.6 after 194 iterations and 161 s; development accuracy
96.39, precision 94.16, recall 93.99, F1 94.08 after 175 iterations and 140 s.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import pyro_genexact as gx

Array = NDArray[np.int64]
Batch = tuple[Tensor, dict[str, Tensor]]  # labels (B, N); their attributes (B, N, 20) and lengths (B)
Sentence = list[list[str]]  # word, part of speech, chunk tag of each token

REACH = 2  # how far templates look to each side
WORD, TAG = 0, 1
TEMPLATES = [
    *(((WORD, i),) for i in range(-2, 3)),
    *(((WORD, i), (WORD, i + 1)) for i in (-1, 0)),
    *(((TAG, i),) for i in range(-2, 3)),
    *(((TAG, i), (TAG, i + 1)) for i in range(-2, 2)),
    *(((TAG, i), (TAG, i + 1), (TAG, i + 2)) for i in range(-2, 1)),
]
HELD_OUT = 1000  # last sentences, the development part
BATCH = 2048  # sentences of like length that are computed at once
OBJECTIVE, F1 = 12799.8, 93.0  # to be met: the first within 0.1 %, the second at least


def read(path: Path) -> list[Sentence]:
    return [[line.split() for line in block.split("\n")] for block in path.read_text().strip().split("\n\n")]


def attributes(sentences: list[Sentence]) -> list[Array]:
    """Of each sentence (N, 20) numbers of attributes, counted from 0."""
    lengths = np.array([len(s) for s in sentences])
    first = np.cumsum(lengths + 2 * REACH) - lengths - REACH
    token = np.concatenate([np.arange(i, i + n) for i, n in zip(first, lengths, strict=True)])
    streams = []
    for column in (WORD, TAG):
        padded = (["<-2>", "<-1>", *(token[column] for token in s), "<+1>", "<+2>"] for s in sentences)
        symbols, stream = np.unique([symbol for s in padded for symbol in s], return_inverse=True)
        streams.append((len(symbols), stream))
    found, count = [], 0
    for template in TEMPLATES:
        key = np.zeros(len(token), dtype=np.int64)
        for column, offset in template:
            size, stream = streams[column]
            key = key * size + stream[token + offset]
        values, number = np.unique(key, return_inverse=True)
        found.append(number + count)
        count += len(values)
    found.append(np.full(len(token), count))  # the bias
    return np.split(np.stack(found, 1), np.cumsum(lengths)[:-1])


class Seen(nn.Module):
    """A matrix whose entries are 0 but for some, the parameters.

    Args:
        places: of these, in the flat matrix.
        shape: of the matrix.
    """

    places: Tensor

    def __init__(self, places: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("places", places.unique())
        self.shape = shape

    def forward(self, values: Tensor) -> Tensor:
        return values.new_zeros(math.prod(self.shape)).index_put((self.places,), values).view(self.shape)

    def right_inverse(self, matrix: Tensor) -> Tensor:
        return matrix.flatten()[self.places]


class Emissions(nn.EmbeddingBag):
    """(B, N, V), the sums of the weights of the attributes (B, N, 20) of tokens."""

    def forward(self, attributes: Tensor) -> Tensor:
        return super().forward(attributes.flatten(0, 1)).unflatten(0, attributes.shape[:2])


def batches(attributes: list[Array], labels: list[Array]) -> tuple[list[Array], list[Batch]]:
    """The places of sentences of like length, and their labels (B, N), attributes and lengths, padded."""
    lengths = np.array([len(y) for y in labels])
    places = np.array_split(np.argsort(lengths, kind="stable"), -(-len(labels) // BATCH))

    def padded(rows: list[Array]) -> Tensor:
        return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)

    return places, [
        (
            padded([labels[i] for i in index]),
            {"context": padded([attributes[i] for i in index]), "lengths": torch.from_numpy(lengths[index])},
        )
        for index in places
    ]


def chunker(attributes: list[Array], labels: list[Array], size: int, num_labels: int) -> gx.CRF:
    """A CRF of the weights that the data has, without weights of the ends."""
    crf = gx.CRF(num_labels, Emissions(size, num_labels, mode="sum")).double().requires_grad_(False)
    seen = [(a * num_labels + y[:, None]).ravel() for a, y in zip(attributes, labels, strict=True)]
    steps = [y[:-1] * num_labels + y[1:] for y in labels]
    for module, name, places in ((crf.emissions, "weight", seen), (crf, "transition", steps)):
        matrix = getattr(module, name)
        nn.init.zeros_(matrix)
        flat = torch.from_numpy(np.concatenate(places))
        register_parametrization(module, name, Seen(flat, tuple(matrix.shape)))
        module.parametrizations[name].original.requires_grad_(True)
    return crf


def squares(crf: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in crf.parameters() if p.requires_grad]).sum()


def train(name: str, crf: gx.CRF, data: list[Batch], progress: bool) -> float:
    """Fits by L-BFGS, one step of which goes through all batches; returns the objective."""
    count = sum(len(labels) for labels, _ in data)
    result = gx.fit(
        crf,
        DataLoader(data, batch_size=None),
        accumulate=len(data),
        optimizer=partial(torch.optim.LBFGS, history_size=10, line_search_fn="strong_wolfe"),
        penalty=lambda crf: squares(crf) / count,
        progress=progress,
    )
    with torch.no_grad():
        nats = sum(float(crf(**context).log_prob(labels).sum()) for labels, context in data)
        objective = float(squares(crf)) - nats
    weights = sum(p.numel() for p in crf.parameters() if p.requires_grad)
    print(
        f"conll2000, {name}: {weights} weights, {result.steps} steps, {result.seconds:.0f} s, {objective:.1f}",
        flush=True,
    )
    return objective


@torch.no_grad()
def decoded(crf: gx.CRF, places: list[Array], data: list[Batch]) -> list[Array]:
    """The most probable labels of each sentence, in the order of the data."""
    found: dict[int, Array] = {}
    for index, (_, context) in zip(places, data, strict=True):
        rows = zip(index, crf(**context).mode, context["lengths"], strict=True)
        found.update((i, row[:n].numpy()) for i, row, n in rows)
    return [found[i] for i in range(len(found))]


def chunks(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Start, end and type of the chunks of a sentence, as conlleval reads tags B-, I-, O.

    A chunk starts at B-, and at an I- whose predecessor is O or of another type.
    """
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        if i and tag.startswith("I-") and tag[2:] == tags[i - 1][2:]:
            continue
        if start is not None:
            found.add((start, i, tags[start][2:]))
        start = None if tag == "O" else i
    return found


def scores(truth: list[list[str]], guess: list[list[str]]) -> tuple[float, float, float, float]:
    """Token accuracy, precision, recall and F1 of exact chunks, per cent."""
    right = tokens = 0
    both = true = guessed = 0
    for y, z in zip(truth, guess, strict=True):
        right, tokens = right + sum(a == b for a, b in zip(y, z, strict=True)), tokens + len(y)
        of_truth, of_guess = chunks(y), chunks(z)
        both, true, guessed = both + len(of_truth & of_guess), true + len(of_truth), guessed + len(of_guess)
    return 100 * right / tokens, 100 * both / guessed, 100 * both / true, 200 * both / (true + guessed)


def check_scores() -> None:
    """Hand-made cases."""
    assert chunks(["B-NP", "I-NP", "O", "B-VP", "B-VP"]) == {(0, 2, "NP"), (3, 4, "VP"), (4, 5, "VP")}
    assert chunks(["I-NP", "I-VP", "I-VP", "O", "I-NP"]) == {(0, 1, "NP"), (1, 3, "VP"), (4, 5, "NP")}
    assert chunks(["O", "O"]) == chunks([]) == set()
    truth = [["B-NP", "I-NP", "O", "B-VP"], ["B-NP", "B-NP"]]
    guess = [["B-NP", "I-NP", "B-PP", "B-VP"], ["B-NP", "I-NP"]]  # of 4 true and 4 guessed chunks 2 are the same
    assert scores(truth, truth) == (100, 100, 100, 100)
    assert scores(truth, guess) == (100 * 4 / 6, 50, 50, 50)


def conll2000(data: Path, progress: bool) -> None:
    check_scores()
    sentences = read(data / "conll2000" / "train.txt")
    names, flat = np.unique([token[2] for s in sentences for token in s], return_inverse=True)
    labels = np.split(flat, np.cumsum([len(s) for s in sentences])[:-1])
    found = attributes(sentences)
    size = int(found[-1][0, -1]) + 1
    print(f"conll2000: {len(sentences)} sentences, {len(flat)} tokens, {size} attributes, {len(names)} labels")
    value = train("all sentences", chunker(found, labels, size, len(names)), batches(found, labels)[1], progress)
    print(
        f"conll2000: objective {value:.1f}, known {OBJECTIVE} ({100 * (value / OBJECTIVE - 1):+.4f} %, aim within 0.1 %)"
    )
    kept = found[:-HELD_OUT], labels[:-HELD_OUT]
    crf = chunker(*kept, size, len(names))
    train(f"without the last {HELD_OUT}", crf, batches(*kept)[1], progress)
    start = time.perf_counter()
    guess = decoded(crf, *batches(found[-HELD_OUT:], labels[-HELD_OUT:]))
    seconds = time.perf_counter() - start
    tags = [[[str(names[y]) for y in row] for row in rows] for rows in (labels[-HELD_OUT:], guess)]
    accuracy, precision, recall, f1 = scores(*tags)
    print(
        f"conll2000: of the last {HELD_OUT} sentences token accuracy {accuracy:.2f}, precision {precision:.2f}, "
        f"recall {recall:.2f}, F1 {f1:.2f} (aim {F1}), decoded in {seconds:.2f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    conll2000(args.data, args.progress)
