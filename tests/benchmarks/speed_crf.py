"""Speed of the linear-chain CRF beside pytorch-crf and torch-struct, in one process.

    python tests/benchmarks/speed_crf.py [--rounds 9] [--markdown] [--sections train,viterbi,struct,sample,ragged,queries]

* train: log-likelihood of labels and its gradient in all potentials, against pytorch-crf.
* viterbi: the best labels, against pytorch-crf's ``decode``; both find the same but for rounding: ours is exact in float64.
* struct: log Z and its gradient at (32, 64, 23), against torch-struct.
* sample: 1000 label strings of one row (1, 1024, 50), against its log Z with gradient.
* ragged: log Z and gradient of rows of random lengths at once, masked, against parts of the rows, sorted by length, each cut to its
  longest.
* queries: what each costs at (32, 64, 23), without and with a gradient.

float32, medians over interleaved rounds after a warm-up.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from speed import interleave, show
from torch import Tensor
from torchcrf import CRF

import pyro_genexact as gx

SIZES = ((32, 64, 23), (32, 256, 23), (8, 1024, 50))


def drawn(batch: int, sites: int, labels: int) -> tuple[CRF, Tensor, Tensor, Callable[[], gx.LinearChainCRF]]:
    """pytorch-crf's model, emissions, labels, and ours of the same potentials."""
    torch.manual_seed(0)
    model = CRF(labels, batch_first=True)
    emissions = torch.randn(batch, sites, labels, requires_grad=True)
    tags = torch.randint(labels, (batch, sites))

    def ours() -> gx.LinearChainCRF:
        return gx.LinearChainCRF(
            emissions, model.transitions, initial=model.start_transitions, final=model.end_transitions
        )

    return model, emissions, tags, ours


def compare(title: str, calls: dict[str, dict[str, Callable[[], object]]], rounds: int, markdown: bool) -> None:
    """A row a case, of calls whose first is ours."""
    rows = []
    for case, of in calls.items():
        times = [1e3 * t for t in interleave(of, rounds).values()]
        rows.append([case, *(f"{t:.3g}" for t in times), f"{times[1] / times[0]:.2f}"])
    show([title, *(f"{name}, ms" for name in of), "ratio"], rows, markdown)


def train(rounds: int, markdown: bool) -> None:
    calls = {}
    for size in SIZES:
        model, emissions, tags, ours = drawn(*size)
        theirs = torch.autograd.grad(model(emissions, tags), (emissions, model.transitions))
        mine = torch.autograd.grad(ours().log_prob(tags).sum(), (emissions, model.transitions))
        assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(mine, theirs, strict=True))
        calls[str(size)] = {
            "here": lambda ours=ours, tags=tags: ours().log_prob(tags).sum().backward(),
            "pytorch-crf": lambda model=model, emissions=emissions, tags=tags: model(emissions, tags).backward(),
        }
    compare("log-likelihood + backward", calls, rounds, markdown)


@torch.no_grad()
def viterbi(rounds: int, markdown: bool) -> None:
    calls = {}
    for size in SIZES:
        model, emissions, _, ours = drawn(*size)
        found = torch.tensor(model.decode(emissions))
        assert (ours().log_prob(found) <= ours().max_log_prob + 1e-3).all()
        assert (ours().mode == found).float().mean() > 0.99
        calls[str(size)] = {
            "here": lambda ours=ours: ours().mode,
            "pytorch-crf": lambda model=model, emissions=emissions: model.decode(emissions),
        }
    compare("Viterbi", calls, rounds, markdown)


def struct(rounds: int, markdown: bool) -> None:
    import torch_struct  # which takes long

    _, emissions, _, _ = drawn(*SIZES[0])
    transition = torch.randn(SIZES[0][-1], SIZES[0][-1], requires_grad=True)

    def theirs() -> Tensor:  # scores of a step are [to, from]
        potentials = transition.T + emissions[:, 1:, :, None]
        first = emissions[:, :1, None, :].expand(-1, 1, emissions.shape[-1], -1)
        return torch_struct.LinearChainCRF(torch.cat([potentials[:, :1] + first, potentials[:, 1:]], 1)).partition

    def ours() -> Tensor:
        return gx.LinearChainCRF(emissions, transition).log_partition

    assert torch.allclose(ours(), theirs(), rtol=1e-4)
    calls = {"here": lambda: ours().sum().backward(), "torch-struct": lambda: theirs().sum().backward()}
    compare("log Z + backward", {str(SIZES[0]): calls}, max(rounds // 3, 2), markdown)


def sample(rounds: int, markdown: bool) -> None:
    emissions = torch.randn(1, 1024, 50, requires_grad=True)
    transition = torch.randn(50, 50, requires_grad=True)
    calls = {
        "log Z + backward": lambda: gx.LinearChainCRF(emissions, transition).log_partition.sum().backward(),
        "1000 samples": lambda: gx.LinearChainCRF(emissions, transition).sample((1000,)),
    }
    compare("draws", {"(1, 1024, 50)": calls}, rounds, markdown)


def ragged(rounds: int, markdown: bool) -> None:
    for batch, sites in ((32, 256), (256, 128)):
        emissions = torch.randn(batch, sites, 23, requires_grad=True)
        transition = torch.randn(23, 23, requires_grad=True)
        lengths = torch.randint(1, sites + 1, (batch,))

        def parts(count: int, emissions: Tensor = emissions, lengths: Tensor = lengths) -> None:
            each = [(emissions[rows], lengths[rows]) for rows in lengths.argsort().chunk(count)]
            cut = [gx.LinearChainCRF(e[:, : n.max()], transition, lengths=n).log_partition.sum() for e, n in each]  # noqa: B023
            sum(cut).backward()

        calls = {"masks": lambda parts=parts: parts(1)}
        calls |= {f"{k} parts": lambda parts=parts, k=k: parts(k) for k in (2, 4)}
        compare("log Z + backward", {f"({batch}, {sites}, 23), lengths 1 to {sites}": calls}, rounds, markdown)


def queries(rounds: int, markdown: bool) -> None:
    _, emissions, tags, ours = drawn(*SIZES[0])
    other = gx.LinearChainCRF(torch.randn_like(emissions), torch.randn(23, 23))
    of = {
        "log_prob": lambda d: d.log_prob(tags),
        "log_partition": lambda d: d.log_partition,
        "marginals": lambda d: d.marginals,
        "pair_marginals": lambda d: d.pair_marginals,
        "entropy": lambda d: d.entropy(),
        "kl_divergence": lambda d: torch.distributions.kl_divergence(d, other),
        "log_marginal_of": lambda d: d.log_marginal_of(tags, tags > 10),
        "risk": lambda d: d.risk(tags),
    }
    without = {
        "mode": lambda d: d.mode,
        "k_best(5)": lambda d: d.k_best(5),
        "sample": lambda d: d.sample(),
        "sample((100,))": lambda d: d.sample((100,)),
    }
    calls = {}
    for name, query in (of | without).items():

        def quick(query: Callable[..., Tensor] = query) -> None:
            with torch.no_grad():
                query(ours())

        calls[name] = {"no gradient": quick}
        if name in of:
            calls[name]["+ backward"] = lambda query=query: query(ours()).sum().backward()
    rows = []
    for name, both in calls.items():
        times = [f"{1e3 * t:.3g}" for t in interleave(both, rounds).values()]
        rows.append([name, *times, *[""] * (2 - len(times))])
    show(["(32, 64, 23)", "no gradient, ms", "+ backward, ms"], rows, markdown)


def main() -> None:
    sections = {f.__name__: f for f in (train, viterbi, struct, sample, ragged, queries)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--sections", default=",".join(sections))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="where received a uint8")
    for name in args.sections.split(","):
        sections[name](args.rounds, args.markdown)


if __name__ == "__main__":
    main()
