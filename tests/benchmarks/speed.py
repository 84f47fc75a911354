"""Speed, memory and accuracy of a masked autoregressive flow, beside Pyro, zuko and nflows, in one process.

    python tests/benchmarks/speed.py [--rounds 7] [--sizes 8,64,256,784] [--markdown] [--validate]
                                     [--sections table,memory,ratio,agreement]

* table: medians over interleaved rounds, and our time over the fastest peer's. After a warm-up, each round
  calls every library and operation in turn; calls under 20 ms are repeated, calls over a second get three
  rounds. Every masked network has two hidden layers. Argument validation is off for all (on: --validate).
* memory: peak of our rsample + backward as the number of features grows.
* ratio: our rsample + backward over our sample without grad.
* agreement: our sequential and parallel directions undo each other, with opposite log-determinants.

Memory is the peak of live tensor storage made within the call, summed after each dispatched operation. It
counts saved activations, buffers and gradients; not parameters, optimiser state made before, scratch inside a
kernel or the allocator's slack.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Call = Callable[[], object]
OURS = "pyro_genexact"
TRAIN, LOG_PROB, SAMPLE, RSAMPLE = "training step", "log_prob", "sample", "rsample + backward"
SHAPE = "D, hidden, batch, transforms"
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
    import pyro_genexact as gx

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
    # Importing zuko switches validation off for all of torch and Pyro.
    base: Any = torch.distributions.Distribution
    before = base._validate_args, base.arg_constraints
    import zuko

    base._validate_args, base.arg_constraints = before
    flow = zuko.flows.MAF(size.features, 0, transforms=size.transforms, hidden_features=size.hidden)
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


BUILDERS = {OURS: build_genexact, "pyro": build_pyro, "zuko": build_zuko, "nflows": build_nflows}


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


class PeakBytes(TorchDispatchMode):
    """Peak of the live storage that is made within the block (see the module's docstring)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in storages((args, kwargs)):
            self.known[storage] = True  # made outside the block, or counted already
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.known:
                self.known[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def release(self, nbytes: int) -> None:
        self.live -= nbytes


def storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_megabytes(call: Call) -> float:
    call()  # optimiser state and the like exist already
    with PeakBytes() as memory:
        call()
    return memory.peak / 1e6


def seconds(call: Call, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(calls: dict[Any, Call], rounds: int) -> dict[Any, float]:
    """Median seconds a call, round robin after a warm-up round."""
    warm = {key: seconds(call) for key, call in calls.items()}
    warm = {key: min(warm[key], seconds(call)) if warm[key] < 1 else warm[key] for key, call in calls.items()}
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for i in range(rounds):
        for key, call in calls.items():
            if i < 3 or warm[key] < 1:
                times[key].append(seconds(call, max(1, min(20, int(0.02 / warm[key])))))
    return {key: statistics.median(values) for key, values in times.items()}


def show(header: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool) -> None:
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left, between, right = ("| ", " | ", " |") if markdown else ("", "  ", "")
    lines = [left + between.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + right for row in cells]
    lines.insert(1, left + between.join("-" * w for w in widths) + right)
    print(*lines, sep="\n", end="\n\n", flush=True)


def label(size: Size) -> str:
    return f"{size.features}, {size.hidden[0]}, {size.batch}, {size.transforms}"


def table(sizes: Sequence[Size], libraries: Sequence[str], rounds: int, markdown: bool) -> None:
    rows, left_out = [], []
    for size in sizes:
        print(f"timing D={size.features} ...", file=sys.stderr, flush=True)
        calls: dict[tuple[str, str], Call] = {}
        for name in libraries:
            made = operations(BUILDERS[name](size), size)
            if name != OURS and rsample_bytes(size) > PEER_BYTES:
                del made[RSAMPLE]
                left_out.append(f"{name} at D={size.features} ({rsample_bytes(size) / 1e9:.0f} GB)")
            calls |= {(operation, name): call for operation, call in made.items()}
        times = {key: 1e3 * value for key, value in interleave(calls, rounds).items()}
        for operation in (TRAIN, LOG_PROB, SAMPLE, RSAMPLE):
            rows.append(row(size, f"{operation}, ms", operation, libraries, times))
        kept = {key: peak_megabytes(call) for key, call in calls.items() if key[0] in (TRAIN, RSAMPLE)}
        for operation in (TRAIN, RSAMPLE):
            rows.append(row(size, f"{operation}, peak MB", operation, libraries, kept))
    show([SHAPE, "operation", *libraries, "ours / best peer"], rows, markdown)
    if left_out:
        print(f"left out, since rsample + backward needs too much memory: {', '.join(left_out)}\n")


def row(
    size: Size, title: str, operation: str, libraries: Sequence[str], values: dict[tuple[str, str], float]
) -> list[str]:
    found = {name: values[operation, name] for name in libraries if (operation, name) in values}
    peers = [value for name, value in found.items() if name != OURS]
    ratio = f"{found[OURS] / min(peers):.3f}" if peers and OURS in found else "-"
    return [label(size), title, *(f"{found[n]:.4g}" if n in found else "-" for n in libraries), ratio]


def memory(markdown: bool) -> None:
    widths = (64, 128, 256, 512, 784)
    sizes = [Size(d, (512, 512), 100, 1) for d in widths]
    peaks = [peak_megabytes(operations(build_genexact(size), size)[RSAMPLE]) for size in sizes]
    rows = [[label(size), f"{peak:.2f}"] for size, peak in zip(sizes, peaks, strict=True)]
    show([SHAPE, "rsample + backward, peak MB"], rows, markdown)
    slope, constant = statistics.linear_regression(widths, peaks)
    worst = max(abs(constant + slope * d - p) / p for d, p in zip(widths, peaks, strict=True))
    power = statistics.linear_regression([*map(math.log, widths)], [*map(math.log, peaks)]).slope
    print(f"{constant:.2f} MB + {slope:.4f} MB x D, worst residual {worst:.1%}; log-log slope {power:.2f}\n")


def ratio(rounds: int, markdown: bool) -> None:
    rows = []
    for size in (SIZES[64]._replace(transforms=1), SIZES[64], SIZES[784]):
        made = operations(build_genexact(size), size)
        times = interleave({name: made[name] for name in (SAMPLE, RSAMPLE)}, rounds)
        sample, rsample = 1e3 * times[SAMPLE], 1e3 * times[RSAMPLE]
        rows.append([label(size), f"{sample:.4g}", f"{rsample:.4g}", f"{rsample / sample:.2f}"])
    show([SHAPE, "sample, ms", "rsample + backward, ms", "ratio"], rows, markdown)


def push(transforms: Iterable[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(x.shape[:-1])
    for t in transforms:
        y = t(x)
        jacobian = t.log_abs_det_jacobian(x, y)
        total = total + (jacobian.sum(-1) if jacobian.dim() == x.dim() else jacobian)
        x = y
    return x, total


@torch.no_grad()
def agreement(markdown: bool) -> None:
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
    show(["dtype", "round trip", *errors, "sd of values", "sd of log-det"], rows, markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of features")
    parser.add_argument("--sections", default="table,memory,ratio,agreement")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--validate", action="store_true", help="argument validation on, for all libraries")
    args = parser.parse_args()
    libraries = [name for name in BUILDERS if importlib.util.find_spec(name)]
    for name in BUILDERS.keys() - libraries:
        print(f"left out: {name} is not installed")
    if "zuko" in libraries:
        build_zuko(SIZES[8])  # its import is over before validation is set
    pyro.enable_validation(args.validate)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, validation {args.validate}\n")
    sections = args.sections.split(",")
    if "table" in sections:
        table([SIZES[int(d)] for d in args.sizes.split(",")], libraries, args.rounds, args.markdown)
    if "memory" in sections and OURS in libraries:
        memory(args.markdown)
    if "ratio" in sections and OURS in libraries:
        ratio(args.rounds, args.markdown)
    if "agreement" in sections and OURS in libraries:
        agreement(args.markdown)


if __name__ == "__main__":
    main()
