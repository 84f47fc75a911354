"""Measures, keeps the figures in ``docs/benchmarks.json``, and makes the tables of the pages from it.

    python tests/benchmarks/run.py                          # all scripts, each with its numbers of threads, one after the other
    python tests/benchmarks/run.py speed speed_crf --threads 1 2 [--rounds 7] [--brief] [--quick] [--out FILE]
    python tests/benchmarks/run.py --tables                 # writes the tables from the file
    python tests/benchmarks/run.py --compare OLD NEW        # ratios of two files, the largest first

Each script runs in a fresh process for each number of threads. Its sections replace those of the same name and number of threads in the
file; all others stay. ``--brief`` runs what fits into 25 minutes of a quiet machine with two cores, ``--quick`` small sizes in one
round. How a script joins is described in ``timing.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from measurements import FILE, compared, lines, pages, read, with_tables

FOLDER = Path(__file__).parent
SECTIONS = "--sections"


class Script(NamedTuple):
    """With how many threads a script is measured, its arguments, and those of a brief run (without them it has none)."""

    threads: tuple[int, ...] = (1,)
    arguments: tuple[str, ...] = ()
    brief: tuple[str, ...] | None = None


SCRIPTS = {
    "speed": Script((1, 2), (SECTIONS, "table,memory"), (SECTIONS, "table,memory", "--rounds", "5")),
    "speed_bijections": Script(
        (1, 2), (SECTIONS, "table,umnn", "--steps", "400"), (SECTIONS, "table", "--steps", "200")
    ),
    "speed_autoregressive": Script((1, 2), (), ()),
    "speed_crf": Script((1,), (), (SECTIONS, "train,memory,viterbi,struct,sample")),
    "speed_hmm": Script((1,), (), (SECTIONS, "log_prob")),
    "speed_sequences": Script((1,), (), (SECTIONS, "sample,train,decode,stopping")),
    "speed_guides": Script((1, 2), (), (SECTIONS, "step,external")),
    "images": Script((1,), (), ("--rounds", "3")),
    "tarflow": Script((1,), (SECTIONS, "speed"), (SECTIONS, "speed")),
    "fixed_point": Script((1,), (), None),
    "encoders": Script((1,), (), None),
}


def measure(names: Sequence[str], options: argparse.Namespace) -> None:
    for name in names:
        script = SCRIPTS[name]
        arguments = script.brief if options.brief else script.arguments
        if arguments is None:
            print(f"{name}: not part of a brief run", flush=True)
            continue
        chosen = [*([] if options.quick else arguments), *(["--quick"] if options.quick else [])]
        chosen += ["--rounds", str(options.rounds)] if options.rounds else []
        for threads in options.threads or script.threads:
            start = time.perf_counter()
            words = [sys.executable, f"{name}.py", *chosen, "--threads", str(threads), "--json", options.out.resolve()]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            code = subprocess.run(words, cwd=FOLDER, env=environment).returncode
            ended = f"ended with code {code}" if code else f"{time.perf_counter() - start:.0f} s"
            print(f"=== {name}, {threads} threads: {ended}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), metavar="script", help=", ".join(SCRIPTS))
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"))
    options = parser.parse_args()
    if options.compare:
        old, new = map(read, options.compare)
        print(*lines(compared(old, new), markdown=False), sep="\n")
    elif options.tables:
        runs = read(options.out)
        for page in pages():
            page.write_text(with_tables(page.read_text(), runs))
    else:
        unknown = [name for name in options.scripts if name not in SCRIPTS]
        if unknown:
            parser.error(f"Expected scripts among {', '.join(SCRIPTS)}; got {', '.join(unknown)}.")
        measure(options.scripts, options)


if __name__ == "__main__":
    main()
