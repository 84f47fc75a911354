"""Speed of the linear-chain CRF beside pytorch-crf and torch-struct, in one process.

    python tests/benchmarks/speed_crf.py [--rounds 9] [--markdown] [--sections train,memory,viterbi,struct,sample,ragged,queries]

* train: log-likelihood of labels and its gradient in all potentials, against pytorch-crf.
* memory: the peak of live tensors that ``train`` makes.
* viterbi: the best labels, against pytorch-crf's ``decode``; both find the same but for rounding: ours is exact in float64.
* struct: log Z and its gradient at (32, 64, 23), against torch-struct.
* sample: 1000 label strings of one row (1, 1024, 50), and its log Z with gradient.
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
from timing import HERE, Call, Measurement, Named, measured, measurement, parser, peak_megabytes, run
from torch import Tensor
from torchcrf import CRF

import pyro_genexact as gx

PEER = "pytorch-crf"
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


def training() -> dict[Named, Call]:
    calls: dict[Named, Call] = {}
    for size in SIZES:
        model, emissions, tags, ours = drawn(*size)
        theirs = torch.autograd.grad(model(emissions, tags), (emissions, model.transitions))
        mine = torch.autograd.grad(ours().log_prob(tags).sum(), (emissions, model.transitions))
        assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(mine, theirs, strict=True))
        what = str(size), "log-likelihood + backward"
        calls[*what, HERE] = lambda ours=ours, tags=tags: ours().log_prob(tags).sum().backward()
        calls[*what, PEER] = lambda model=model, emissions=emissions, tags=tags: model(emissions, tags).backward()
    return calls


def train(options: argparse.Namespace) -> list[Measurement]:
    return measured(training(), options.rounds)


def memory(options: argparse.Namespace) -> list[Measurement]:
    return [measurement(key, "MB", [peak_megabytes(call)]) for key, call in training().items()]


@torch.no_grad()
def viterbi(options: argparse.Namespace) -> list[Measurement]:
    calls: dict[Named, Call] = {}
    for size in SIZES:
        model, emissions, _, ours = drawn(*size)
        found = torch.tensor(model.decode(emissions))
        assert (ours().log_prob(found) <= ours().max_log_prob + 1e-3).all()
        assert (ours().mode == found).float().mean() > 0.99
        calls[str(size), "Viterbi", HERE] = lambda ours=ours: ours().mode
        calls[str(size), "Viterbi", PEER] = lambda model=model, emissions=emissions: model.decode(emissions)
    return measured(calls, options.rounds)


def struct(options: argparse.Namespace) -> list[Measurement]:
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
    what = str(SIZES[0]), "log Z + backward"
    calls = {
        (*what, HERE): lambda: ours().sum().backward(),
        (*what, "torch-struct"): lambda: theirs().sum().backward(),
    }
    return measured(calls, options.rounds)


def sample(options: argparse.Namespace) -> list[Measurement]:
    emissions = torch.randn(1, 1024, 50, requires_grad=True)
    transition = torch.randn(50, 50, requires_grad=True)
    calls = {
        ("(1, 1024, 50)", "log Z + backward", HERE): lambda: (
            gx.LinearChainCRF(emissions, transition).log_partition.sum().backward()
        ),
        ("(1, 1024, 50)", "1000 samples", HERE): lambda: gx.LinearChainCRF(emissions, transition).sample((1000,)),
    }
    return measured(calls, options.rounds)


def ragged(options: argparse.Namespace) -> list[Measurement]:
    found = []
    for batch, sites in ((32, 256), (256, 128)):
        emissions = torch.randn(batch, sites, 23, requires_grad=True)
        transition = torch.randn(23, 23, requires_grad=True)
        lengths = torch.randint(1, sites + 1, (batch,))

        def parts(count: int, emissions: Tensor = emissions, lengths: Tensor = lengths) -> None:
            each = [(emissions[rows], lengths[rows]) for rows in lengths.argsort().chunk(count)]
            cut = [gx.LinearChainCRF(e[:, : n.max()], transition, lengths=n).log_partition.sum() for e, n in each]  # noqa: B023
            sum(cut).backward()

        what = f"({batch}, {sites}, 23), lengths 1 to {sites}", "log Z + backward"
        calls = {
            (*what, f"{k} parts" if k > 1 else HERE): lambda parts=parts, k=k: parts(k)  # type: ignore[misc]
            for k in (1, 2, 4)
        }
        found += measured(calls, options.rounds)
    return found


def queries(options: argparse.Namespace) -> list[Measurement]:
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
    calls: dict[Named, Call] = {}
    for name, query in (of | without).items():
        calls[str(SIZES[0]), name, HERE] = torch.no_grad()(lambda query=query: query(ours()))
        if name in of:
            calls[str(SIZES[0]), name, f"{HERE}, with backward"] = lambda query=query: query(ours()).sum().backward()
    return measured(calls, options.rounds)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="where received a uint8")
    found = parser(__doc__, [train, memory, viterbi, struct, sample, ragged, queries], rounds=9)
    found.set_defaults(validate=True)  # the default of torch and Pyro
    run(found, quick={"sections": "train,memory,viterbi,sample,queries"})
