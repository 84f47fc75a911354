"""Names letter by letter: a distribution over strings of any length, and the decisions that one may take from it.

    python examples/names.py [--out names.png] [--smoke-test]

The data are the 88,799 distinct surnames of the United States census of 1990, of 2 to 13 letters, each taken once however
common it is, from a file that comes with the package names. A symbol is a letter or the end. 10,000 names are held out, half
of them to choose by (validation), half for the test.

The model is a recurrent network with a softmax a symbol. A Transformer learns this more slowly: in 100 s of one core, one of
width 64 with 2 layers comes to 2.116 nats a symbol of the validation names, a recurrent network of width 192 to 2.098, and
this one of 256, in 110 s, to 2.086. The baselines are n-grams: a symbol given the n - 1 before it, by its counts in the
training names and a share of the shorter n-gram,

    p_n(y | h) = (count(h y) + a p_{n-1}(y | h')) / (count(h) + a),

where h' is h without its first symbol, p_0 is uniform and a is chosen on the validation names. All of them give a name its
exact probability. Nats a symbol are minus the log-probabilities of the test names over the number of their symbols, the
ends counted, with 2 standard errors over names. "Mass" is the exact probability that a draw is one of the training names,
or one of the held-out names, which no model was trained on.

* Decisions: greedy takes the best next symbol, a beam search the best of 5 prefixes, the mode is the most probable string,
  proven; minimum Bayes risk (MBR) takes the name that is most similar, on average, to the names that the model draws.
  Similarity is 1 - edit distance / length of the longer name. "Not empty" is the mode under the filter MinLength. "More
  probable" is the share of the samples that are more probable than the choice.
* The rest of a test name, given its first five letters, under the same rules. "Promised" is the mean probability of what is
  chosen, which a model that is right keeps.
* Filters: each makes another exact distribution of the same network. "Kept" is the model's own probability of what is not
  filtered out (a share of samples); "lost" are test names that have no probability left.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from importlib.metadata import files
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.functional import pad

import pyro_genexact as gx
from pyro_genexact import decoding, heads

SYMBOLS = ".ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # the end first
V, LONGEST, GIVEN = len(SYMBOLS), 14, 5
HELD_OUT, SHOWN = 5000, ("KOWALEWSKI", "MCGILLIVRAY")
similarity = decoding.utilities.edit_similarity(eos=0)


def surnames() -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test names (N, LONGEST)."""
    file = next(file for file in files("names") if file.name == "dist.all.last")
    y = strings([line.split()[0] for line in file.read_text().splitlines()])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    train, validation, test = y.split([len(y) - 2 * HELD_OUT, HELD_OUT, HELD_OUT])
    return train, validation, test


def strings(names: list[str], width: int = LONGEST) -> Tensor:
    """(N, width), 0 from a name's end on."""
    return torch.tensor(
        [[SYMBOLS.index(letter) for letter in name.ljust(width, ".")] for name in names]
    )


def text(y: Tensor) -> str:
    return "".join(SYMBOLS[k] for k in y.tolist()).split(".")[0]


def symbols(y: Tensor) -> Tensor:
    """How many symbols (N) names have, the end counted."""
    return (y > 0).sum(-1) + 1


def mean(x: Tensor, digits: int = 3) -> str:
    """The mean with 2 standard errors."""
    return f"{x.mean():.{digits}f} ± {2 * x.std() / math.sqrt(len(x)):.{digits}f}"


def nats(log_prob: Tensor, y: Tensor) -> Tensor:
    """Numbers (N) whose mean is the nats a symbol, and whose standard error is that of this ratio (delta method)."""
    size = symbols(y).to(log_prob)
    ratio = -log_prob.sum() / size.sum()
    return ratio - (log_prob + ratio * size) / size.mean()


def windows(y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The number in base V of each symbol with the n - 1 before it, and which ones are part of a name, both (N, LONGEST)."""
    places = pad(y, (n - 1, 0)).unfold(1, n, 1)
    return (places * V ** torch.arange(n - 1, -1, -1)).sum(-1), torch.arange(
        LONGEST
    ) < symbols(y).unsqueeze(1)


class NGram:
    """A table of n-gram probabilities (V^n) on top of that of a shorter one.

    Args:
        train, validation: names, to count and to choose by.
        shorter: of n - 1; None for n = 1.
    """

    def __init__(
        self, train: Tensor, validation: Tensor, shorter: NGram | None = None
    ) -> None:
        self.n = 1 if shorter is None else shorter.n + 1
        below = (
            torch.full((1, V), 1 / V)
            if shorter is None
            else shorter.table.reshape(-1, V)
        )
        code, inside = windows(train, self.n)
        counts = (
            torch.bincount(code[inside], minlength=V**self.n).double().reshape(-1, V)
        )
        below = below.repeat(len(counts) // len(below), 1)

        def table(a: float) -> Tensor:
            return ((counts + a * below) / (counts.sum(1, keepdim=True) + a)).flatten()

        self.a = max(
            (1, 3, 10, 30, 100), key=lambda a: self.log_prob(validation, table(a)).sum()
        )
        self.table = table(self.a)

    def log_prob(self, y: Tensor, table: Tensor | None = None) -> Tensor:
        """(N) of names (N, LONGEST)."""
        code, inside = windows(y, self.n)
        return torch.where(
            inside, (self.table if table is None else table)[code].log(), 0.0
        ).sum(-1)


def ngrams(train: Tensor, validation: Tensor) -> dict[str, NGram]:
    models, shorter = {}, None
    for name in ("unigram", "bigram", "trigram", "4-gram", "5-gram"):
        models[name] = shorter = NGram(train, validation, shorter)
    return models


def log_probs(d: gx.distributions.SequenceDistribution, y: Tensor) -> Tensor:
    return torch.cat([d.log_prob(rows) for rows in y.split(5000)])


def report_nats(
    scores: dict[str, Tensor], sizes: list[int], test: Tensor
) -> dict[str, Tensor]:
    """Prints the table; scores are log-probabilities of all names, in the order training, validation, test."""
    print(
        f"{'':<11}{'nats a symbol':>17}{'gain':>17}{'mass: training':>17}{'held out':>10}{'new':>8}"
    )
    results: dict[str, Tensor] = {}
    for name, log_prob in scores.items():
        old = list(results.values())
        results[name] = nats(log_prob[-len(test) :], test)
        gain = mean(old[-1] - results[name]) if old else ""
        seen, held_out = (
            part.exp().sum() for part in log_prob.split([sizes[0], sum(sizes[1:])])
        )
        print(
            f"{name:<11}{mean(results[name]):>17}{gain:>17}{seen:>17.4f}{held_out:>10.4f}{1 - seen - held_out:>8.4f}"
        )
    return results


def report_samples(samples: Tensor, train: Tensor, held_out: Tensor) -> None:
    drawn = [text(y) for y in samples]
    seen, unseen = ({text(y) for y in part} for part in (train, held_out))
    marks = ["" if name in seen else "+" if name in unseen else "*" for name in drawn]
    shown = ", ".join(
        (name or "(empty)") + mark
        for name, mark in zip(drawn[:40], marks, strict=False)
    )
    print(f"\n{len(drawn)} samples, * new, + held out: {shown}, ...")
    shares = [
        mean(torch.tensor([float(mark == kind) for mark in marks]), 4)
        for kind in ("", "+", "*")
    ]
    print(
        "share of training names {}, of held-out names {}, of new ones {}".format(
            *shares
        )
    )


def report_completions(
    d: gx.distributions.SequenceDistribution, known: set[str]
) -> None:
    prefixes = ["SCHW", "MAC", "O", "KOWAL"]
    given = d.conditional_on_prefix(
        strings(prefixes, 5),
        torch.tensor([len(prefix) for prefix in prefixes]),
        LONGEST,
    )
    best = decoding.beam_search(given, width=50, k=5)
    print(
        "\nThe five best completions by a beam search of width 50, with their exact probabilities (* no name of the census):"
    )
    for k, prefix in enumerate(prefixes):
        rests = [text(y) for y in best.sequences[:, k]]
        names = [
            f"{prefix}-{rest}{'' if prefix + rest in known else '*'}" for rest in rests
        ]
        print(
            "  "
            + "  ".join(
                f"{name} {p:.3f}"
                for name, p in zip(names, best.log_prob[:, k].exp(), strict=True)
            )
        )


def decide(
    d: gx.distributions.SequenceDistribution, draws: int
) -> dict[str, decoding.Decoded]:
    """What each rule takes; also one draw."""
    mode, samples = decoding.exact_mode(d, budget=100_000), d.sample((draws,))
    if mode.gap.any():
        print(
            f"{int((mode.gap > 0).sum())} modes are not proven, by at most {mode.gap.max():.2f} nats"
        )
    risk = decoding.minimum_bayes_risk(d, samples, samples, similarity)
    sample = d.sample()
    return {
        "greedy": decoding.greedy(d),
        "beam 5": decoding.beam_search(d, width=5),
        "exact mode": decoding.Decoded(mode.sequences, mode.log_prob),
        "MBR": decoding.Decoded(risk.sequences, risk.log_prob),
        "a sample": decoding.Decoded(sample, d.log_prob(sample)),
    }


def report_decisions(
    d: gx.distributions.SequenceDistribution, samples: Tensor, known: set[str]
) -> dict[str, float]:
    log_p = log_probs(d, samples)
    print(
        f"\nDecisions; samples have a log-probability of {mean(log_p, 2)} (minus the entropy)"
    )
    print(
        f"{'':<12}{'name':<15}{'of the census':>13}{'log_prob':>10}{'more probable':>15}{'mean similarity':>18}"
    )
    some = decoding.exact_mode(
        d.with_head(heads.MinLength(d.head, 1, eos=0)), budget=100_000
    ).sequences
    chosen = decide(d, 600) | {"not empty": decoding.Decoded(some, d.log_prob(some))}
    for rule, (y, log_prob) in chosen.items():
        above, alike = (
            (log_p > log_prob + 1e-4).float().mean(),
            similarity(y.unsqueeze(0), samples)[0],
        )
        name, real = text(y) or "(empty)", "yes" if text(y) in known else "no"
        print(
            f"{rule:<12}{name:<15}{real:>13}{log_prob:>10.2f}{above:>15.4f}{mean(alike):>18}"
        )
    rules = ("greedy", "beam 5", "exact mode", "MBR")
    return {
        f"{rule}: {text(chosen[rule][0]) or '(empty)'}": chosen[rule][1].item()
        for rule in rules
    }


def report_rest(d: gx.distributions.SequenceDistribution, test: Tensor) -> None:
    test = test[symbols(test) > GIVEN]
    rest = test[:, GIVEN:]
    print(f"\nThe rest of {len(test)} test names given {GIVEN} letters")
    print(f"{'':<12}{'log_prob':>18}{'promised':>10}{'right':>17}{'similarity':>17}")
    for rule, (y, log_prob) in decide(
        d.conditional_on_prefix(test[:, :GIVEN]), 40
    ).items():
        right, alike = (
            (y == rest).all(-1).float(),
            similarity(y.unsqueeze(0), rest.unsqueeze(0))[0, 0],
        )
        print(
            f"{rule:<12}{mean(log_prob, 2):>18}{log_prob.exp().mean():>10.3f}{mean(right):>17}{mean(alike):>17}"
        )


def report_filters(model: gx.Sequence, test: Tensor, draws: int) -> None:
    head, d = model.head, model()
    print(
        f"\n{'':<22}{'entropy':>14}{'log_prob by model':>19}{'kept':>8}{'mass of test':>14}{'lost, %':>9}"
    )
    filters = {
        "none": head,
        "Tempered 0.7": heads.Tempered(head, 0.7),
        "TopK 5": heads.TopK(head, 5),
        "TopP 0.9": heads.TopP(head, 0.9),
        "MinP 0.1": heads.MinP(head, 0.1),
        "Tempered 0.7, TopP 0.9": heads.TopP(heads.Tempered(head, 0.7), 0.9),
    }
    samples = d.sample((draws,))
    for name, filtered in filters.items():
        q = d.with_head(filtered)
        y, of_test = q.sample((draws,)), log_probs(q, test)
        entropy, by_model = mean(-log_probs(q, y), 2), mean(log_probs(d, y), 2)
        kept, lost = (
            (log_probs(q, samples) > -math.inf).float().mean(),
            (of_test == -math.inf).float().mean(),
        )
        print(
            f"{name:<22}{entropy:>14}{by_model:>19}{kept:>8.3f}{of_test.exp().sum():>14.4f}{100 * lost:>9.1f}"
        )


def report_lengths(
    d: gx.distributions.SequenceDistribution, test: Tensor
) -> tuple[Tensor, Tensor]:
    """Prints P(letters <= t) of the test and of the model; returns the model's curve and its error, t from 0 on."""
    curve = d.termination_curve(max_len=LONGEST + 4, num_samples=4000)
    print("\nletters at most      " + "".join(f"{t:>8}" for t in range(2, 16)))
    data = [(symbols(test) - 1 <= t).float().mean() for t in range(2, 16)]
    print("share of test names  " + "".join(f"{p:>8.4f}" for p in data))
    print(
        "model                " + "".join(f"{p:>8.4f}" for p in curve.probability[2:16])
    )
    print(
        "  2 standard errors  "
        + "".join(f"{2 * p:>8.4f}" for p in curve.standard_error[2:16])
    )
    return curve.probability, curve.standard_error


def heat(axes: plt.Axes, model: gx.Sequence, name: str) -> None:
    """Probabilities of the next symbol along a name, those of its own symbols framed and written below."""
    y = strings([name], len(name) + 1)
    probs = model.head(model.conditioner(y)).probs[0]  # (T, V)
    own = probs[range(len(name) + 1), y[0]]
    axes.imshow(probs.T, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto")
    for t, k in enumerate(y[0].tolist()):
        axes.add_patch(
            Rectangle(
                (t - 0.5, k - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=1.5
            )
        )
    letters = zip([*name, "end"], own.tolist(), strict=True)
    axes.set_xticks(
        range(len(name) + 1), [f"{letter}\n{p:.2g}" for letter, p in letters]
    )
    axes.set_yticks(range(V), ["end", *SYMBOLS[1:]], fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(f"{name}, a test name of probability {own.prod():.1e}")


def bars(axes: plt.Axes, results: dict[str, Tensor]) -> None:
    names = list(results)
    x = torch.stack([x.mean() for x in results.values()])
    error = torch.stack([2 * x.std() / math.sqrt(len(x)) for x in results.values()])
    axes.barh(
        names,
        x,
        xerr=error,
        color=["tab:gray"] * (len(names) - 1) + ["tab:blue"],
        capsize=3,
    )
    for k, value in enumerate(x.tolist()):
        axes.text(0.05, k, f"{value:.3f}", va="center", color="white")
    axes.invert_yaxis()
    axes.set(xlabel="nats a symbol, test names")


def histogram(
    axes: plt.Axes, samples: Tensor, test: Tensor, marks: dict[str, float]
) -> None:
    """Log-probabilities (N) of names, and those of decisions."""
    edges = torch.arange(-40.0, -3.0).numpy()
    axes.hist(
        samples, edges, density=True, color="tab:blue", alpha=0.5, label="samples"
    )
    axes.hist(
        test, edges, density=True, histtype="step", color="black", label="test names"
    )
    for k, (rule, value) in enumerate(marks.items()):
        axes.axvline(
            value, color=f"C{k + 1}", label=rule, linestyle=("-", "--", ":", "-.")[k]
        )
    axes.set(xlabel="log-probability of a name, nats", ylabel="density")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def lengths(axes: plt.Axes, curve: Tensor, test: Tensor) -> None:
    share = torch.bincount(symbols(test) - 1, minlength=len(curve)) / len(test)
    error = 2 * (share * (1 - share) / len(test)).sqrt()
    axes.bar(
        range(len(curve)),
        share,
        yerr=error,
        color="lightgray",
        capsize=3,
        label="test names",
    )
    axes.plot(
        range(len(curve)),
        curve.diff(prepend=curve.new_zeros(1)),
        "o",
        color="tab:blue",
        label="model",
    )
    axes.set(xlabel="letters", ylabel="probability")
    axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("names.png"), metavar="FILE")
    parser.add_argument(
        "--smoke-test",
        action="store_true",
        help="one epoch and few names, to see that everything runs",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    train, validation, test = surnames()
    draws, asked = 10_000, 1000
    if args.smoke_test:
        train, validation, test, draws, asked = (
            train[:2000],
            validation[:500],
            test[:500],
            500,
            20,
        )
    parts = (train, validation, test)
    print(
        f"{len(train)} training names, {len(test)} test names of {symbols(test).sum()} symbols\n"
    )

    torch.manual_seed(0)
    network = gx.conditioners.Recurrent(V, V, hidden=256, width=32)
    model = gx.Sequence(network, heads.Categorical(V), eos=0, max_len=LONGEST)
    optimizer = partial(torch.optim.AdamW, lr=4e-3, weight_decay=0.01)
    gx.fit(
        model,
        train,
        validation=validation,
        epochs=1 if args.smoke_test else 4,
        batch_size=128,
        optimizer=optimizer,
    )
    model.eval().requires_grad_(False)

    d, every = model(), torch.cat(parts)
    scores = {
        name: baseline.log_prob(every)
        for name, baseline in ngrams(train, validation).items()
    }
    scores["recurrent"] = log_probs(d, every)
    results = report_nats(scores, [len(part) for part in parts], test)
    samples, known = d.sample((draws,)), {text(y) for y in every}
    report_samples(samples, train, torch.cat([validation, test]))
    report_completions(d, known)
    marks = report_decisions(d, samples, known)
    report_rest(d, test[:asked])
    report_filters(model, test, draws // 4)
    curve, _ = report_lengths(d, test)

    plt.rcParams.update(
        {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure = plt.figure(figsize=(14, 10), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    for axes, name in zip(upper.subplots(1, 2), SHOWN, strict=True):
        heat(axes, model, name)
    upper.suptitle(
        "Probability of the next symbol (blue, by its square root) given those before it; the true one in a frame"
    )
    left, middle, right = lower.subplots(1, 3, width_ratios=(1, 1.5, 1))
    bars(left, results)
    histogram(middle, log_probs(d, samples), scores["recurrent"][-len(test) :], marks)
    lengths(right, curve, test)
    figure.savefig(args.out, dpi=100)
    print(f"\n{time.perf_counter() - start:.0f} s; saved {args.out}")


if __name__ == "__main__":
    main()
