"""Speed, memory and accuracy of a masked autoregressive flow, beside Pyro, zuko and nflows, in one process.

    python tests/benchmarks/speed.py [--rounds 7] [--sizes 8,64,256,784] [--markdown] [--validate]
                                     [--sections table,memory,agreement]

* table: medians over interleaved rounds, and our time over the fastest peer's. Every masked network has two hidden layers. Argument
  validation is off for all (on: --validate). Memory is the peak of live tensors that the call makes.
* memory: peak of our rsample + backward as the number of features grows.
* agreement: our sequential and parallel directions undo each other, with opposite log-determinants.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from timing import HERE, Call, Measurement, import_zuko, measured, measurement, parser, peak_megabytes, run, show
from torch import Tensor, nn

import pyro_genexact as gx

TRAIN, LOG_PROB, SAMPLE, RSAMPLE = "training step", "log_prob", "sample", "rsample + backward"
PEER_BYTES = 6e9  # a peer's rsample + backward that needs more is left out


class Size(NamedTuple):
    features: int
    hidden: tuple[int, int]
    batch: int
    transforms: int


class Model(NamedTuple):
    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    rsample: Callable[[int], Tensor]  # with gradients


SIZES = {
    8: Size(8, (64, 64), 1024, 5),
    64: Size(64, (512, 512), 256, 5),
    256: Size(256, (512, 512), 100, 1),
    784: Size(784, (1024, 1024), 100, 1),
}


def called(module: nn.Module, flow: Callable[[], Any]) -> Model:
    """The model of which each call of `flow` makes a distribution."""
    return Model(module, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), lambda n: flow().rsample((n,)))


def build_genexact(size: Size) -> Model:
    flow = gx.flows.maf(size.features, transforms=size.transforms, hidden=size.hidden)
    return called(flow, flow)


def build_pyro(size: Size) -> Model:
    flip = torch.arange(size.features).flip(0)
    parts: list[Any] = []
    for i in range(size.transforms):
        parts += [dist.transforms.Permute(flip)] if i else []
        parts.append(dist.transforms.affine_autoregressive(size.features, hidden_dims=list(size.hidden)))

    def flow() -> Any:
        # Emptied caches: a transform remembers its last value by identity, even after an optimiser step, and
        # TransformedDistribution.clear_cache does not reach through `.inv`.
        for part in parts:
            part._cached_x_y, part._cached_log_scale = (None, None), None
        base = dist.Normal(torch.zeros(size.features), torch.ones(size.features)).to_event(1)
        return dist.TransformedDistribution(base, [p if hasattr(p, "permutation") else p.inv for p in parts])

    return called(nn.ModuleList(part for part in parts if isinstance(part, nn.Module)), flow)


def build_zuko(size: Size) -> Model:
    flow = import_zuko().flows.MAF(size.features, 0, transforms=size.transforms, hidden_features=size.hidden)
    return called(flow, flow)


def build_nflows(size: Size) -> Model:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, ReversePermutation
    from nflows.transforms import MaskedAffineAutoregressiveTransform as Affine

    parts: list[nn.Module] = []
    for i in range(size.transforms):
        parts += [ReversePermutation(size.features)] if i else []
        # One feed-forward block between the first and the last layer: two hidden layers.
        parts.append(Affine(size.features, size.hidden[0], num_blocks=1, use_residual_blocks=False))
    flow = Flow(CompositeTransform(parts), StandardNormal([size.features]))
    return Model(flow, flow.log_prob, flow.sample, flow.sample)


BUILDERS = {HERE: build_genexact, "Pyro": build_pyro, "zuko": build_zuko, "nflows": build_nflows}


def operations(model: Model, size: Size) -> dict[str, Call]:
    x = torch.randn(size.batch, size.features)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-4)

    def train() -> None:
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()

    def rsample() -> None:
        optimizer.zero_grad()
        model.rsample(size.batch).square().sum().backward()

    log_prob, sample = torch.no_grad()(model.log_prob), torch.no_grad()(model.sample)
    return {TRAIN: train, LOG_PROB: lambda: log_prob(x), SAMPLE: lambda: sample(size.batch), RSAMPLE: rsample}


def rsample_bytes(size: Size) -> float:
    """What a peer's graph holds at least: each of its D passes a transform saves its masked weights."""
    (d, (h1, h2)) = size.features, size.hidden
    return 4.0 * size.transforms * d * (d * h1 + h1 * h2 + h2 * 2 * d)


def label(size: Size) -> str:
    transforms = f"{size.transforms} transform{'s' * (size.transforms > 1)}"
    return f"D={size.features}, hidden {size.hidden[0]}, batch {size.batch}, {transforms}"


def table(options: argparse.Namespace) -> list[Measurement]:
    found = []
    for size in (SIZES[int(d)] for d in options.sizes.split(",")):
        calls: dict[tuple[str, str, str], Call] = {}
        for name, build in BUILDERS.items():
            if name != HERE and not importlib.util.find_spec(name.lower()):
                print(f"left out: {name} is not installed")
                continue
            made = operations(build(size), size)
            if name != HERE and rsample_bytes(size) > PEER_BYTES:
                del made[RSAMPLE]
                print(f"left out: {RSAMPLE} of {name} at D={size.features} needs {rsample_bytes(size) / 1e9:.0f} GB")
            calls |= {(label(size), operation, name): call for operation, call in made.items()}
        found += measured(calls, options.rounds)
        kept = {key: call for key, call in calls.items() if key[1] in (TRAIN, RSAMPLE)}
        found += [measurement(key, "MB", [peak_megabytes(call, warm=True)]) for key, call in kept.items()]
    return found


def memory(options: argparse.Namespace) -> list[Measurement]:
    widths = (64, 128, 256, 512, 784)
    sizes = [Size(d, (512, 512), 100, 1) for d in widths]
    peaks = [peak_megabytes(operations(build_genexact(size), size)[RSAMPLE]) for size in sizes]
    slope, constant = statistics.linear_regression(widths, peaks)
    worst = max(abs(constant + slope * d - p) / p for d, p in zip(widths, peaks, strict=True))
    power = statistics.linear_regression([*map(math.log, widths)], [*map(math.log, peaks)]).slope
    print(f"{constant:.2f} MB + {slope:.4f} MB x D, worst residual {worst:.1%}; log-log slope {power:.2f}\n")
    return [measurement((label(size), RSAMPLE, HERE), "MB", [peak]) for size, peak in zip(sizes, peaks, strict=True)]


def push(transforms: Iterable[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(x.shape[:-1])
    for t in transforms:
        y = t(x)
        jacobian = t.log_abs_det_jacobian(x, y)
        total = total + (jacobian.sum(-1) if jacobian.dim() == x.dim() else jacobian)
        x = y
    return x, total


@torch.no_grad()
def agreement(options: argparse.Namespace) -> list[Measurement]:
    """Both round trips from standard normal rows, through weights disturbed away from the identity."""
    size, rows = SIZES[784], []
    flow = build_genexact(size).module
    for p in flow.parameters():
        p.add_(0.5 / math.sqrt(p.shape[-1:].numel()) * torch.randn_like(p))
    for dtype in (torch.float64, torch.float32):
        flow.to(dtype)
        start = torch.randn(size.batch, size.features, dtype=dtype)
        for title, first in (("noise -> sample -> noise", 1), ("data -> noise -> data", -1)):
            # A new distribution and a copy each way, so that nothing remembered is served.
            ways = {1: list(flow().transforms), -1: [t.inv for t in reversed(flow().transforms)]}
            middle, there = push(ways[first], start)
            end, back = push(ways[-first], middle.clone())
            pairs = ((start, end), (there, -back))
            absolute = [f"{(a - b).abs().max():.1e}" for a, b in pairs]
            relative = [f"{((a - b).abs() / a.abs().clamp(min=1)).max():.1e}" for a, b in pairs]
            rows.append([str(dtype)[6:], title, *absolute, *relative, f"{middle.std():.2f}", f"{there.std():.2f}"])
    errors = [f"{of}, {kind}" for kind in ("absolute", "relative") for of in ("values", "log-dets")]
    print(f"agreement at D={size.features}: largest differences, and standard deviations in the middle")
    show(["dtype", "round trip", *errors, "sd of values", "sd of log-det"], rows, options.markdown)
    return []


if __name__ == "__main__":
    found = parser(__doc__, [table, memory, agreement])
    found.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of features")
    run(found, quick={"sizes": "8"})
