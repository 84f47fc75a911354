"""Speed of sequences of random length beside Hugging Face's transformers, in one process.

    python tests/benchmarks/speed_sequences.py [--rounds 5] [--markdown] [--sections sample,train,growth,decode,stopping]

* sample: 256 tokens by a Transformer of 4 layers, width 256 and 8 heads over 64 tokens, against ``generate`` of a
  GPT-2 of that size with its cache; ends are impossible, and suppressed there.
* train: log_prob + backward of that Transformer, batch 16, against forward, loss and backward of that GPT-2, on as many tokens.
* growth: sampling one row of 64 to 4096 tokens, microseconds a token and the peak of its tensors.
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
from timing import HERE, Call, Measurement, Named, measured, measurement, parser, peak_megabytes, run
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import pyro_genexact as gx
from pyro_genexact.conditioners import Pretrained, Recurrent, Transformer
from pyro_genexact.decoding import beam_search, greedy

V, WIDTH, DEPTH, HEADS = 64, 256, 4, 8
BOS, EOS, PEER = 0, 1, "GPT-2"


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


def sample(options: argparse.Namespace) -> list[Measurement]:
    tokens, model, theirs = options.tokens, transformer(options.tokens), gpt2(options.tokens + 1)  # with a beginning
    calls: dict[Named, Call] = {}
    for batch in (16, 1):
        begin = torch.full((batch, 1), BOS)

        def generate(begin: Tensor = begin) -> Tensor:
            return theirs.generate(begin, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=EOS)

        assert generate().shape == (batch, tokens + 1)
        with counted(model.conditioner) as reads:
            assert (model().sample((batch,)) != EOS).all()
        assert sum(reads) == batch * (tokens - 1)
        what = f"batch {batch}", f"sampling {tokens} tokens"
        calls |= {(*what, HERE): lambda batch=batch: model().sample((batch,)), (*what, PEER): generate}
    return measured(calls, options.rounds)


def train(options: argparse.Namespace) -> list[Measurement]:
    model, theirs = transformer(options.tokens), gpt2(options.tokens)
    y = torch.randint(EOS + 1, V, (16, options.tokens))

    def ours() -> None:
        model.zero_grad()
        (-model().log_prob(y).mean()).backward()

    def loss() -> None:
        theirs.zero_grad()
        theirs(y, labels=y, use_cache=False).loss.backward()

    what = "batch 16", f"log_prob + backward, {options.tokens} tokens"
    return measured({(*what, HERE): ours, (*what, PEER): loss}, options.rounds)


def growth(options: argparse.Namespace) -> list[Measurement]:
    lengths = [n for n in (64, 256, 1024, 4096) if n <= 16 * options.tokens]
    model, per = transformer(1), {(f"one row of {n} tokens", "sampling", HERE): n for n in lengths}
    calls = {key: lambda n=n: model(max_len=n).sample() for key, n in per.items()}
    times = measured(calls, min(options.rounds, 3), "µs per token", per)
    return times + [measurement(key, "MB", [peak_megabytes(call, warm=True)]) for key, call in calls.items()]


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


def decode(options: argparse.Namespace) -> list[Measurement]:
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
        "beam search, width 4": (
            lambda: beam_search(after(), width=4, unfinished=True),
            lambda: generated(model, tokens, sites, num_beams=4, length_penalty=0.0, early_stopping="never"),
        ),
    }
    case, calls = f"{len(prompts)} prompts of {given} tokens, {sites} more", dict[Named, Call]()
    for name, (ours, theirs) in pairs.items():
        found, (sequences, scores) = ours(), theirs()
        same, ended = (found.sequences == sequences).all(1), (sequences == EOS).any(1)
        difference = (found.log_prob - scores).abs().max()
        counts = f"{int(same.sum())} of {len(same)} identical, of which {int(ended.sum())} ended"
        print(f"{name}: {counts}; log-probabilities differ by at most {difference:.1e}")
        calls |= {(case, name, HERE): ours, (case, name, PEER): theirs}
    return measured(calls, options.rounds)


def stopping(options: argparse.Namespace) -> list[Measurement]:
    rows, sites, mean, symbols = 4 * options.tokens, 2 * options.tokens, 10, 8
    head, odds = gx.heads.Categorical(symbols), torch.full((symbols,), mean / (symbols - 1))
    odds[0] = 1.0  # of an end, so that as many as mean symbols come before it on average
    nets = (Recurrent(symbols, symbols, hidden=64), Transformer(symbols, symbols, width=64, depth=1, num_heads=4))
    case, calls = f"{rows} rows of mean length {mean} in {sites}", dict[Named, Call]()
    for net in nets:
        with torch.no_grad():
            net.last.weight.zero_()
            net.last.bias.copy_(odds.log())
        model, fixed = gx.Sequence(net, head, eos=0, max_len=sites), gx.Autoregressive(net, head, (sites,))
        with counted(net) as reads:
            y = model().sample((rows,))
        drawn, work = int((model().lengths_of(y) + 1).clamp(max=sites).sum()), rows + sum(reads)
        print(f"{type(net).__name__}: {work} rows x steps of the network for {drawn} tokens, {work / drawn:.3f} each")
        what = case, f"sampling, {type(net).__name__}"
        calls[*what, HERE] = lambda model=model: model().sample((rows,))
        calls[*what, f"all {sites} steps"] = lambda fixed=fixed: fixed().sample((rows,))
    return measured(calls, options.rounds)


if __name__ == "__main__":
    found = parser(__doc__, [sample, train, growth, decode, stopping], rounds=5)
    found.set_defaults(validate=True)  # the default of torch and Pyro
    found.add_argument("--tokens", type=int, default=256)
    found.add_argument("--prompts", type=int, default=100)
    run(found, quick={"tokens": 32, "prompts": 8})
