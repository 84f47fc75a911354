"""Measures, keeps the figures in ``docs/benchmarks.json``, and makes the tables of the pages from it.

    python tests/benchmarks/run.py                          # all scripts, each with its numbers of threads, one after the other
    python tests/benchmarks/run.py speed speed_crf --threads 1 2 [--rounds 7] [--brief] [--quick] [--out FILE]
    python tests/benchmarks/run.py --tables                 # writes the tables from the file
    python tests/benchmarks/run.py --compare OLD NEW        # ratios of two files, the largest first

Each script runs in a fresh process for each number of threads. Its sections replace those of the same name and number of
threads in the file; all others stay. ``--brief`` runs what the tables need, in about 18 minutes of a quiet machine with two cores;
``--quick`` runs small sizes in one round. How a script joins is described in ``timing.py``. The scripts in ``ALONE`` have figures of
other kinds, such as ELBOs and effective sample sizes, or need data. They print their own tables and are run by their own commands.
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


class Job(NamedTuple):
    """A script, with how many threads it is measured, its arguments, and those of a brief run (without them it has none)."""

    script: str
    threads: tuple[int, ...] = (1,)
    arguments: tuple[str, ...] = ()
    brief: tuple[str, ...] | None = None


FAST = (SECTIONS, "table,memory")
JOBS = [
    Job("speed", (1, 2), FAST, (*FAST, "--rounds", "5")),
    Job("speed_bijections", (1, 2), ("--steps", "400"), ("--steps", "200", "--rounds", "5")),
    Job("speed_bijections", (1,), (SECTIONS, "umnn"), (SECTIONS, "umnn", "--rounds", "3")),
    Job("speed_autoregressive", (1, 2), (), ("--rounds", "5")),
    Job("speed_crf", (1,), (), (SECTIONS, "train,memory,viterbi,struct,sample")),
    Job("speed_hmm", (1,), (), (SECTIONS, "log_prob")),
    Job("speed_sequences", (1,), (), ("--rounds", "3")),
    Job("speed_guides", (1, 2), (), (SECTIONS, "step,external")),
    Job("speed_native", (1, 2), (), ("--rounds", "5")),
    Job("speed_compiled", (1, 2), (), ("--rounds", "5")),
    Job("images", (1,), (), ("--rounds", "3")),
    Job("tarflow", (1,), (SECTIONS, "speed"), (SECTIONS, "speed")),
    Job("fixed_point", (1,), (), None),
    Job("encoders", (1,), (), None),
    Job("much_data", (1,), (), (SECTIONS, "step", "--models", "logistic")),
]
ALONE = (
    "direct", "encoders_of_sets", "enumerated", "fit_defaults", "fit_defaults_sets", "groups", "heavy_tail",
    "learned_likelihood", "loops", "modes", "neutra", "objectives", "posteriors", "precision", "processes", "published",
    "published_autoregressive", "published_crf", "published_sequences", "resume", "sample_posterior", "sbc", "simulators",
    "simulators_likelihood", "streaming", "your_machine",
)  # fmt: skip
SCRIPTS = list(dict.fromkeys(job.script for job in JOBS))


def measure(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Runs jobs one after the other; the number of those that failed."""
    failed = 0
    for name, of_job, full, brief in jobs:
        arguments = ("--quick",) if options.quick else brief if options.brief else full
        if arguments is None:
            print(f"{name}: not part of a brief run", flush=True)
            continue
        arguments += ("--rounds", str(options.rounds)) if options.rounds else ()
        for threads in options.threads or of_job:
            start = time.perf_counter()
            words = [
                sys.executable,
                f"{name}.py",
                *arguments,
                "--threads",
                str(threads),
                "--json",
                options.out.resolve(),
            ]
            code = subprocess.run(words, cwd=FOLDER, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode
            failed += code != 0
            ended = f"ended with code {code}" if code else f"{time.perf_counter() - start:.0f} s"
            print(f"=== {name} {' '.join(arguments)}, {threads} threads: {ended}\n", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, metavar="script", help=", ".join(SCRIPTS))
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
        if options.quick and options.out == FILE:
            parser.error("Expected --out with --quick, whose figures only show that a script runs.")
        unknown = [name for name in options.scripts if name not in SCRIPTS]
        if alone := [name for name in unknown if name in ALONE]:
            parser.error(f"Expected scripts with sections; run {', '.join(alone)} by the commands in their docstrings.")
        if unknown:
            parser.error(f"Expected scripts among {', '.join(SCRIPTS)}; got {', '.join(unknown)}.")
        jobs = [job for job in JOBS if job.script in options.scripts]
        if options.quick:  # of each script once
            jobs = [job for i, job in enumerate(jobs) if job.script not in [other.script for other in jobs[:i]]]
        sys.exit(measure(jobs, options))


if __name__ == "__main__":
    main()
