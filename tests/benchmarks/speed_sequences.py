"""Speed of sequences of random length beside Hugging Face's transformers, in one process.

    python tests/benchmarks/speed_sequences.py [--rounds 5] [--markdown] [--sections sample,train,growth,decode,stopping]

* sample: tokens a second of 256 tokens by a Transformer of 4 layers, width 256 and 8 heads over 64 tokens, against ``generate`` of a
  GPT-2 of that size with its cache; ends are impossible, and suppressed there; our calls of the network are counted.
* train: log_prob + backward of that Transformer, batch 16, against forward, loss and backward of that GPT-2, on as many tokens.
* growth: sampling one row of 64 to 4096 tokens, milliseconds a token and the peak of its tensors.
* decode: greedy and beam search (width 4) through ``Pretrained``, against ``generate`` of the same model, on random prompts: how many
  results are identical, the largest difference of log-probabilities, and the time for both, with log-probabilities.
* stopping: 1024 rows of geometric lengths of mean 10 in arrays of 512: rows x steps that the network ran over tokens drawn, and the time
  against drawing all 512 steps of every row.

float32, medians over interleaved rounds after a warm-up. ``--tokens`` (256) and ``--prompts`` (100) scale all sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from speed import interleave, peak_megabytes, show
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import pyro_genexact as gx
from pyro_genexact.conditioners import Pretrained, Recurrent, Transformer
from pyro_genexact.decoding import beam_search, greedy

V, WIDTH, DEPTH, HEADS = 64, 256, 4, 8
BOS, EOS = 0, 1


def gpt2(tokens: int, eos: int | None = None, **options: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": V, "n_positions": tokens, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=BOS, eos_token_id=eos, **sizes, **rates, **options)).eval()


def transformer(tokens: int) -> gx.Sequence:
    """One whose sequences do not end."""
    net = Transformer(V, V, width=WIDTH, depth=DEPTH, num_heads=HEADS)
    with torch.no_grad():
        net.last.bias[EOS] = -1e4
    return gx.Sequence(net, gx.heads.Categorical(V), eos=EOS, max_len=tokens).eval()


@contextmanager
def counted(net: Any) -> Iterator[list[int]]:
    """How many sites each call of ``extend`` read, of all rows."""
    sites: list[int] = []
    extend = type(net).extend

    def counting(self: Any, y: Tensor, state: Any) -> Any:
        sites.append(y.numel())
        return extend(self, y, state)

    type(net).extend = counting
    try:
        yield sites
    finally:
        type(net).extend = extend


def sample(options: argparse.Namespace) -> None:
    tokens, model, theirs = options.tokens, transformer(options.tokens), gpt2(options.tokens + 1)  # with a beginning
    rows = []
    for batch in (16, 1):
        begin = torch.full((batch, 1), BOS)

        def generate(begin: Tensor = begin) -> Tensor:
            return theirs.generate(begin, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=EOS)

        calls = {"here": lambda batch=batch: model().sample((batch,)), "GPT-2": generate}
        assert generate().shape == (batch, tokens + 1)
        with counted(model.conditioner) as reads:
            assert (model().sample((batch,)) != EOS).all()
        assert sum(reads) == batch * (tokens - 1)
        speeds = [batch * tokens / t for t in interleave(calls, options.rounds).values()]
        rows.append([str(batch), *(f"{s:.4g}" for s in speeds), f"{speeds[0] / speeds[1]:.2f}", str(len(reads) + 1)])
    show(
        [f"sampling {tokens} tokens, batch", "here, tokens/s", "GPT-2, tokens/s", "ratio", "calls"],
        rows,
        options.markdown,
    )


def train(options: argparse.Namespace) -> None:
    model, theirs = transformer(options.tokens), gpt2(options.tokens)
    y = torch.randint(EOS + 1, V, (16, options.tokens))

    def ours() -> None:
        model.zero_grad()
        (-model().log_prob(y).mean()).backward()

    def loss() -> None:
        theirs.zero_grad()
        theirs(y, labels=y, use_cache=False).loss.backward()

    times = [1e3 * t for t in interleave({"here": ours, "GPT-2": loss}, options.rounds).values()]
    title = f"log_prob + backward, batch 16, {options.tokens} tokens"
    show(
        [title, "here", "GPT-2", "ratio"],
        [["ms", *(f"{t:.4g}" for t in times), f"{times[1] / times[0]:.2f}"]],
        options.markdown,
    )


def growth(options: argparse.Namespace) -> None:
    lengths = [n for n in (64, 128, 256, 512, 1024, 2048, 4096) if n <= 16 * options.tokens]
    model = transformer(1)
    calls = {n: lambda n=n: model(max_len=n).sample() for n in lengths}
    times = interleave(calls, min(options.rounds, 3))
    rows = [
        [str(n), f"{1e3 * t:.4g}", f"{1e3 * t / n:.3g}", f"{peak_megabytes(calls[n]):.1f}"] for n, t in times.items()
    ]
    show(["sampling one row, tokens", "ms", "ms a token", "peak MB"], rows, options.markdown)


def generated(model: GPT2LMHeadModel, tokens: Tensor, sites: int, **beams: Any) -> tuple[Tensor, Tensor]:
    """What ``generate`` finds after the tokens, in full length, and its log-probabilities, (prompts, sites) and (prompts)."""
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=sites,
        pad_token_id=EOS,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **beams,
    )
    found = out.sequences[:, tokens.shape[1] :]
    padded = torch.nn.functional.pad(found, (0, sites - found.shape[1]), value=EOS)
    if beams:
        return padded, out.sequences_scores
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    ends = found == EOS
    return padded, scores.masked_fill(ends.cumsum(1) > ends, 0.0).sum(1)


def decode(options: argparse.Namespace) -> None:
    sites, given = max(options.tokens // 8, 2), 8
    model = gpt2(1 + given + sites, EOS, initializer_range=0.2, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2  # so that a good part of the results ends
    lm = gx.Sequence(Pretrained(model, BOS), gx.heads.Categorical(V), eos=EOS, max_len=given + sites)
    prompts = torch.randint(EOS + 1, V, (options.prompts, given))
    tokens = torch.cat([torch.full((len(prompts), 1), BOS), prompts], 1)

    def after() -> Any:
        return lm().conditional_on_prefix(prompts)

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "greedy": (lambda: greedy(after()), lambda: generated(model, tokens, sites)),
        "beam, width 4": (
            lambda: beam_search(after(), width=4, unfinished=True),
            lambda: generated(model, tokens, sites, num_beams=4, length_penalty=0.0, early_stopping="never"),
        ),
    }
    rows = []
    for name, (ours, theirs) in pairs.items():
        found, (sequences, scores) = ours(), theirs()
        same, ended = (found.sequences == sequences).all(1), (sequences == EOS).any(1)
        difference = (found.log_prob - scores).abs()
        speeds = interleave({"here": ours, "generate": theirs}, options.rounds)
        mine, other = (1e3 * speeds[key] for key in ("here", "generate"))
        counts = [f"{int(same.sum())} of {len(same)}", str(int(ended.sum())), f"{difference.max():.1e}"]
        rows.append([name, *counts, f"{mine:.4g}", f"{other:.4g}", f"{other / mine:.2f}"])
    title = f"{len(prompts)} prompts of {given} tokens, {sites} more"
    show([title, "identical", "ended", "score difference", "here, ms", "generate, ms", "ratio"], rows, options.markdown)


def stopping(options: argparse.Namespace) -> None:
    rows, sites, mean, symbols = 4 * options.tokens, 2 * options.tokens, 10, 8
    head, odds = gx.heads.Categorical(symbols), torch.full((symbols,), mean / (symbols - 1))
    odds[0] = 1.0  # of an end, so that as many as mean symbols come before it on average
    nets = (Recurrent(symbols, symbols, hidden=64), Transformer(symbols, symbols, width=64, depth=1, num_heads=4))
    table = []
    for net in nets:
        with torch.no_grad():
            net.last.weight.zero_()
            net.last.bias.copy_(odds.log())
        model, fixed = gx.Sequence(net, head, eos=0, max_len=sites), gx.Autoregressive(net, head, (sites,))
        with counted(net) as reads:
            y = model().sample((rows,))
        drawn, work = int((model().lengths_of(y) + 1).clamp(max=sites).sum()), rows + sum(reads)
        calls = {
            "stops": lambda model=model: model().sample((rows,)),
            "all": lambda fixed=fixed: fixed().sample((rows,)),
        }
        stops, whole = (1e3 * t for t in interleave(calls, options.rounds).values())
        ratios = [f"{work / drawn:.3f}", f"{stops:.4g}", f"{whole:.4g}", f"{stops / whole:.3f}"]
        table.append([type(net).__name__, str(drawn), str(work), *ratios])
    title = f"{rows} rows of mean length {mean} in {sites}"
    header = [title, "tokens", "rows x steps", "ratio", "ms", f"all {sites} steps, ms", "ratio"]
    show(header, table, options.markdown)


def main() -> None:
    sections = {f.__name__: f for f in (sample, train, growth, decode, stopping)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--sections", default=",".join(sections))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in options.sections.split(","):
        sections[name](options)


if __name__ == "__main__":
    main()
