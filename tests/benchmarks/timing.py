"""What the scripts of benchmarks share: interleaved times, peaks of memory, and a command line of sections.

How a script joins: each *section* is a function of the options that returns a list of measurements. They are made by
``measured({(case, operation, way): call}, options.rounds)`` from calls without arguments, or by ``measurement`` from figures
that the section has by other means; less must be better. The way is "here" for this package ("here, compiled" or "here, native"
for a variant of it), and the name of the library for a peer. Calls of equal case and operation stand in one row of a table. Its last
columns divide each way that begins with "here" by the best of the other ways of its row, and each variant by "here". The script ends with
``run(parser(__doc__, [section, ...]), quick={...})``, where ``quick`` has other defaults of the script's own options, for a run
of seconds. A line in ``JOBS`` of ``run.py`` gives the numbers of threads and the arguments. The two lines
``<!-- table: script.section; threads 2, 1 -->`` and ``<!-- end of table -->`` in a page are a block, which
``python tests/benchmarks/run.py --tables`` fills; several sections are separated by commas. ``PEERS`` in ``measurements.py`` has the
names of peers.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import measurements as data
import pyro
import torch
from measurements import HERE, Measurement, Run, lines, summary, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pyro_genexact import native

__all__ = ["HERE", "Call", "Measurement", "Named", "interleaved", "measured", "measurement", "parser", "run", "show"]

Call = Callable[[], object]
Section = Callable[[argparse.Namespace], Sequence[Measurement]]
Named = tuple[str, str, str]  # case, operation, way
Key = TypeVar("Key", bound=Hashable)
FACTORS = {"s": 1.0, "ms": 1e3, "µs": 1e6}
PACKAGES = ("torch", "pyro-ppl", "zuko", "nflows", "pytorch-crf", "torch-struct", "transformers")
SHORT, LONG, ONCE = (
    0.02,
    1.0,
    100.0,
)  # seconds: shorter calls are repeated; longer ones have fewer rounds, or one warm-up


def with_native(call: Call) -> Call:
    """The call with the native operator, if that is built; everything else is measured without."""

    def run() -> object:
        with native.enabled(True):
            return call()

    return run


def seconds(call: Call, repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean seconds of a call; with a GPU, until it has finished."""
    start = clock()
    for _ in range(repeats):
        call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def interleaved(calls: Mapping[Key, Call], rounds: int) -> dict[Key, list[float]]:
    """Seconds of each call in each round, in another order in each, since a call pays for what the one before left behind.

    Each is called twice before. Calls under 20 ms are repeated within a round; calls over a second have at most three rounds.
    """
    warm = {key: seconds(call) for key, call in calls.items()}
    # the first call may compile
    warm = {key: min(warm[key], seconds(call)) if warm[key] < ONCE else warm[key] for key, call in calls.items()}
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order, shuffled = [*calls.items()], random.Random(0)
    for i in range(rounds):
        shuffled.shuffle(order)
        for key, call in order:
            if i < 3 or warm[key] < LONG:
                times[key].append(seconds(call, max(1, min(20, int(SHORT / warm[key])))))
    return times


def measured(
    calls: Mapping[Named, Call], rounds: int, unit: str = "ms", per: Mapping[Named, float] | None = None
) -> list[Measurement]:
    """Times of calls, each divided by its number in ``per``, where there is one: the unit is then "µs per step" or the like."""
    factor = FACTORS[unit.split()[0]]
    times = interleaved(calls, rounds)
    return [Measurement(*key, unit, *summary(found, factor / (per or {}).get(key, 1))) for key, found in times.items()]


def measurement(key: Named, unit: str, values: Sequence[float]) -> Measurement:
    """One that has its figures by other means."""
    return Measurement(*key, unit, *summary(values))


class PeakBytes(TorchDispatchMode):
    """Peak of the live tensor storage that is made within the block, summed after each dispatched operation.

    It counts saved activations, buffers and gradients; not parameters, optimiser state made before, scratch inside a kernel or the
    allocator's slack.
    """

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


def peak_megabytes(call: Call, warm: bool = False) -> float:
    """The peak of a call that has run before, so that optimiser state and the like exist."""
    if not warm:
        call()
    with PeakBytes() as memory:
        call()
    return memory.peak / 1e6


def import_zuko() -> Any:
    """The library zuko, whose import switches validation off for all of torch and Pyro: here it leaves it as it was."""
    base: Any = torch.distributions.Distribution
    before = base._validate_args, base.arg_constraints
    import zuko

    base._validate_args, base.arg_constraints = before
    return zuko


def show(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    print(*lines([header, *rows], markdown), sep="\n", end="\n\n", flush=True)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def command(*words: str) -> str:
    return subprocess.run(words, cwd=data.ROOT, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, Any]:
    """Machine and versions, without names of hosts and paths."""
    cpus = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    models = [line.split(":")[1].strip() for line in cpus.splitlines() if line.startswith("model name")]
    changed = "+" if command("git", "status", "--porcelain", "-uno", "--", "pyro_genexact") else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": command("git", "rev-parse", "--short=9", "HEAD") + changed,
        "cpu": models[0] if models else "-",
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "versions": {"python": sys.version.split()[0]} | {package: version(package) for package in PACKAGES},
    }


def parser(description: str | None, sections: Sequence[Section], rounds: int = 7) -> argparse.ArgumentParser:
    """The command line of a script with sections; a script adds its own options."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.set_defaults(known={section.__name__: section for section in sections})
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--sections", default=",".join(section.__name__ for section in sections))
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--validate", action="store_true", help="argument validation on, for all libraries")
    found.add_argument("--markdown", action="store_true")
    found.add_argument(
        "--quick", action="store_true", help="small sizes and one round: whether it runs, and how it looks"
    )
    found.add_argument("--json", type=Path, help="a file into which the measurements are merged")
    return found


def run(found: argparse.ArgumentParser, quick: Mapping[str, Any]) -> None:
    """Runs the chosen sections, prints the table of each, and keeps the measurements."""
    options = found.parse_args()
    if options.quick:  # other defaults, which options that are given override
        found.set_defaults(rounds=1, **quick)
        options = found.parse_args()
    import_zuko()  # its import is over before validation is set
    pyro.enable_validation(options.validate)
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, validation {options.validate}\n")
    script = Path(sys.argv[0]).stem
    with native.enabled(False):  # a section that measures the native operator switches it on
        for name in options.sections.split(","):
            print(f"{script}.{name} ...", file=sys.stderr, flush=True)
            torch.manual_seed(0)
            values = list(options.known[name](options))
            if not values:
                continue
            new = Run(script, name, options.threads, options.quick or options.rounds < 3, environment(), values)
            cells = table([[new]])
            print(name)
            show(cells[0], cells[1:], options.markdown)
            if options.json:
                data.write(options.json, data.merged(data.read(options.json), [new]))
