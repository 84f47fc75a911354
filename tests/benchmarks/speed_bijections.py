"""Speed of the flows whose transformer is a spline, a polynomial, a sigmoid or a network, beside zuko's and Pyro's.

    OMP_NUM_THREADS=1 python tests/benchmarks/speed_bijections.py [--only nsf,naf] [--rounds 7] [--markdown] [--steps 400]
                                                                  [--sections table,umnn,accuracy]

Medians over interleaved rounds in one process, as in speed.py: D=16, hidden (128, 128), batch 256, 3 transforms,
float32, validation off for all. The number of numbers a site (bins, degree, signal) is the peer's default.

* training step: log_prob of 256 rows, backward, a step of Adam.
* sample: 256 rows, without gradients.
* umnn: untrained. zuko's sample takes minutes, so it is called once. Its training step is timed with its
  default of 32 nodes, fewer than it needs for the accuracy of ours (--sections accuracy).
* --steps: train our flows so long first, on bent and correlated rows, since roots take more evaluations away from the
  identity, where a flow starts; what a peer's bisection costs does not change.
* bnaf: beside Pyro's BlockAutoregressive, which has no inverse.
* accuracy: how far the log-derivative of either UMNN is from a central difference of its own values, in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from timing import HERE, Call, Measurement, import_zuko, measured, measurement, parser, run, seconds, with_native
from torch import Tensor, nn

import pyro_genexact as gx
from pyro_genexact import native

D, HIDDEN, BATCH, TRANSFORMS = 16, (128, 128), 256, 3
TRAIN, SAMPLE = "training step", "sample"
SIZES: dict[str, Any] = {"transforms": TRANSFORMS, "hidden": HIDDEN}


def zuko_flow(name: str) -> nn.Module:
    flow: nn.Module = getattr(import_zuko().flows, name)(D, 0, transforms=TRANSFORMS, hidden_features=HIDDEN)
    return flow


class PyroBNAF(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            dist.transforms.BlockAutoregressive(D, hidden_factors=[8, 8], residual="gated") for _ in range(TRANSFORMS)
        )

    def forward(self) -> Any:
        for part in self.parts:  # caches, which hold the last value by identity
            part._cached_x_y, part._cached_logDetJ = (None, None), None
        base = dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1)
        return dist.TransformedDistribution(base, [part.inv for part in self.parts])


MODELS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "nsf": {
        HERE: lambda: gx.flows.nsf(D, **SIZES),
        "zuko": lambda: zuko_flow("NSF"),
    },
    "naf": {
        HERE: lambda: gx.flows.naf(D, **SIZES),
        "zuko": lambda: zuko_flow("NAF"),
    },
    "sospf": {
        HERE: lambda: gx.flows.sospf(D, **SIZES),
        "zuko": lambda: zuko_flow("SOSPF"),
    },
    "bpf": {
        HERE: lambda: gx.flows.bpf(D, **SIZES),
        "zuko": lambda: zuko_flow("BPF"),
    },
    "umnn": {
        HERE: lambda: gx.flows.umnn(D, **SIZES),
        "zuko": lambda: zuko_flow("UNAF"),
    },
    "bnaf": {
        HERE: lambda: gx.flows.bnaf(D, transforms=TRANSFORMS, hidden=(8, 8)),
        "Pyro": PyroBNAF,
    },
}


def calls(flow: nn.Module) -> dict[str, Call]:
    x = torch.randn(BATCH, D)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4)

    def train() -> None:
        optimizer.zero_grad()
        (-flow().log_prob(x).mean()).backward()
        optimizer.step()

    return {TRAIN: train, SAMPLE: torch.no_grad()(lambda: flow().sample((BATCH,)))}


def train(flow: nn.Module, steps: int) -> None:
    z = torch.randn(4000, D)
    x = 2 * torch.tanh(z @ torch.randn(D, D) / 4) + 0.1 * torch.randn(4000, D) + (z[:, :1] > 0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow().log_prob(x[torch.randint(len(x), (BATCH,))]).mean()).backward()
        optimizer.step()


def table(options: argparse.Namespace) -> list[Measurement]:
    return compare(options.only.split(","), options.steps, options.rounds)


def umnn(options: argparse.Namespace) -> list[Measurement]:
    return compare(["umnn"], 0, options.rounds)


def compare(names: list[str], steps: int, rounds: int) -> list[Measurement]:
    found = []
    for name in names:
        timed: dict[tuple[str, str, str], Call] = {}
        for library, build in MODELS[name].items():
            flow = build()
            if library == HERE:
                train(flow, steps)
            made = calls(flow)
            if library == "Pyro" or (name == "umnn" and library != HERE):
                sample = made.pop(SAMPLE)
                if library == "zuko":
                    found.append(measurement((name, SAMPLE, library), "ms", [1e3 * seconds(sample)]))
            timed |= {(name, operation, library): call for operation, call in made.items()}
            if library == HERE and native.is_built():
                timed[name, SAMPLE, f"{HERE}, native"] = with_native(made[SAMPLE])
        found += measured(timed, rounds)
    return found


def accuracy(options: argparse.Namespace) -> list[Measurement]:
    """The largest |log-derivative - log of the central difference| of one transform of each, in float64."""
    torch.set_default_dtype(torch.float64)
    zuko = import_zuko()
    x, step = torch.linspace(-6, 6, 97), 1e-4
    head = gx.heads.IntegratedPositive().double()
    phi = torch.randn(32, 1, head.num_params)
    report("here", head(phi), x.expand(32, -1).clone(), step)
    network = zuko.flows.neural.UMNN(signal=16, hidden_features=(64, 64)).double()
    for nodes in (16, 32, 64, 128, 256):
        t = network(torch.randn(32, 1, 16), torch.zeros(32, 1))
        t.transforms[0].n = nodes
        report(f"zuko, {nodes} nodes", t, x.expand(32, -1).clone(), step)
    torch.set_default_dtype(torch.float32)
    return []


def report(name: str, t: Any, x: Tensor, step: float) -> None:
    with torch.no_grad():
        slope = (t(x + step) - t(x - step)) / (2 * step)
        error = (t.log_abs_det_jacobian(x, t(x)) - slope.log()).abs().max()
    print(f"{name}: {error:.1e}")


if __name__ == "__main__":
    found = parser(__doc__, [table, umnn, accuracy])
    found.set_defaults(sections="table")
    found.add_argument("--only", default="nsf,naf,sospf,bpf,bnaf")
    found.add_argument("--steps", type=int, default=0)
    run(found, quick={"only": "nsf"})
