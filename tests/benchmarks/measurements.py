"""Measurements as data: the file ``docs/benchmarks.json``, the tables that are made from it, and the ratios of two files.

The file holds runs. A run is a section of a script with a number of threads: when, where and by which versions it was measured,
and its measurements. This module needs the standard library alone, so that a test can hold the tables against the file.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "benchmarks.json"
HERE, OTHERS, MEMORY = "here", "best other", "MB"
PEERS = ("Pyro", "zuko", "nflows", "pytorch-crf", "torch-struct", "GPT-2", "mambapy", "plain PyTorch")
SLOWER = 1.02  # a ratio to a peer above it is listed
HEADLINES = (  # of README: title, section, beginning of the case, operation; one thread
    ("MAF, 64 features: 256 samples", "speed.table", "D=64,", "sample"),
    ("NAF, 16 features: 256 samples", "speed_bijections.table", "naf", "sample"),
    (
        "CRF, 32 rows of 256 sites, 23 labels: gradient of log p",
        "speed_crf.train",
        "(32, 256,",
        "log-likelihood + backward",
    ),
    ("MAF, 8 features: training step", "speed.table", "D=8,", "training step"),
)
BLOCK = re.compile(r"(<!-- table: ([^;>]+?)(?:; threads ([\d, ]+?))? -->\n).*?(<!-- end of table -->)", re.DOTALL)


class Measurement(NamedTuple):
    """One quantity of which less is better: median and quartiles over the rounds."""

    case: str  # what is computed on: sizes
    operation: str
    way: str  # "here", or whose computation it is; those of this package begin with "here"
    unit: str
    median: float
    lower: float
    upper: float
    rounds: int


class Run(NamedTuple):
    """A section of a script, measured with a number of threads."""

    script: str
    section: str
    threads: int
    quick: bool  # small sizes or few rounds: not to be compared with
    environment: dict[str, Any]
    measurements: list[Measurement]

    @property
    def name(self) -> str:
        return f"{self.script}.{self.section}"


def read(path: Path) -> list[Run]:
    """The runs of a file; none if there is no file."""
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    return [
        Run(
            *(run[name] for name in Run._fields[:-2]),
            environment=data["environments"][run["environment"]],
            measurements=[Measurement(*values) for values in run["measurements"]],
        )
        for run in data["runs"]
    ]  # fmt: skip


def write(path: Path, runs: Iterable[Run]) -> None:
    """One line a measurement, so that a difference of two versions is readable; equal environments are written once."""
    runs, environments, parts = list(runs), list[dict[str, Any]](), []
    for run in runs:
        if run.environment not in environments:
            environments.append(run.environment)
        head = json.dumps(run._asdict() | {"environment": environments.index(run.environment), "measurements": []})
        lines = ",\n".join("   " + json.dumps(m) for m in run.measurements)
        parts.append(f"  {head[:-2]}\n{lines}]}}")
    fields = ", ".join(Measurement._fields)
    top = json.dumps({"measurement": fields, "environments": environments}, indent=1)[:-2]
    path.write_text(f'{top},\n "runs": [\n' + ",\n".join(parts) + "\n ]\n}\n")


def merged(old: Iterable[Run], new: Iterable[Run]) -> list[Run]:
    """The runs of both, in order of names and threads, where a new one replaces the old one of the same section and threads."""
    found = {run[:3]: run for run in (*old, *new)}
    return [found[key] for key in sorted(found)]


def rounded(value: float) -> float:
    """Four digits, or a whole number."""
    return value if float(value).is_integer() else float(f"{value:.4g}")


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def summary(times: Sequence[float], factor: float = 1.0) -> tuple[float, float, float, int]:
    """Median, quartiles and number of times, multiplied by a factor."""
    lower, middle, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * [times[0]]
    return rounded(factor * middle), rounded(factor * lower), rounded(factor * upper), len(times)


Row = tuple[str, str, str]  # case, operation, unit


def rows_of(run: Run) -> dict[Row, dict[str, Measurement]]:
    """The measurements of each row of a table, by way."""
    rows: dict[Row, dict[str, Measurement]] = {}
    for m in run.measurements:
        rows.setdefault((m.case, m.operation, m.unit), {})[m.way] = m
    return rows


def best(row: dict[str, Measurement], among: tuple[str, ...] | None = None) -> Measurement | None:
    """The least of the others' (of those of some libraries)."""
    others = [m for way, m in row.items() if not way.startswith(HERE) and (among is None or way.startswith(among))]
    return min(others, key=lambda m: m.median, default=None)


def shown(ratio: float) -> str:
    """A ratio; below a half, as the fraction that says how many times less."""
    return f"{ratio:.2f}" if ratio > 0.5 else f"1/{1 / ratio:.{'1f' if ratio > 0.1 else '0f'}}"


def quotient(row: dict[str, Measurement], way: str, against: str) -> str:
    other = best(row) if against == OTHERS else row.get(against)
    return "-" if other is None or way not in row else shown(row[way].median / other.median)


def table(groups: Sequence[Sequence[Run]]) -> list[list[str]]:
    """Cells of runs of some sections; the first group's figures, and the ratios of all groups (one for each number of threads)."""
    rows = [{key: row for run in runs for key, row in rows_of(run).items()} for runs in groups]
    ways = list(dict.fromkeys(way for row in rows[0].values() for way in row))
    ours = [way for way in ways if way.startswith(HERE)]
    pairs = [(way, OTHERS) for way in ours if len(ours) < len(ways)]
    pairs += [(way, HERE) for way in ours if way != HERE and HERE in ours]
    ratios = [(*pair, i) for pair in pairs for i in range(len(groups))]
    many = rows if not ratios else rows[:1]  # with nothing to compare with, the times of each number of threads
    titles = [f"{way}, {count(runs)}" if len(many) > 1 else way for runs in groups[: len(many)] for way in ways]
    heads = [f"{way} / {by}" + (f", {count(groups[i])}" if len(groups) > 1 else "") for way, by, i in ratios]
    what = f"operation ({count(groups[0])})" if ratios and len(groups) > 1 else "operation"
    cells, last = [["case", what, *titles, *heads]], ""
    for key in rows[0]:
        case, operation, unit = key
        values = [digits(r[key][way].median) if key in r and way in r[key] else "-" for r in many for way in ways]
        shares = [quotient(rows[i].get(key, {}), way, by) for way, by, i in ratios]
        cells.append(["" if case == last else case, f"{operation}, {unit}", *values, *shares])
        last = case
    return cells


def count(runs: Sequence[Run]) -> str:
    return f"{runs[0].threads} thread{'s' * (runs[0].threads > 1)}"


def lines(cells: Sequence[Sequence[str]], markdown: bool = True) -> list[str]:
    """A table of cells, the first row of which is the head."""
    if markdown:
        return ["| " + " | ".join(row) + " |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [rows[0], "  ".join("-" * width for width in widths), *rows[1:]]


def slower(runs: Sequence[Run]) -> list[list[str]]:
    """Where this package takes more than a peer: each operation, with its ratio to the fastest peer by number of threads."""
    threads = sorted({run.threads for run in runs})
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for run in runs:
        for (case, operation, unit), row in rows_of(run).items():
            peer, ours = (
                best(row, PEERS),
                row.get(HERE, next((m for way, m in row.items() if way.startswith(HERE)), None)),
            )
            if peer is not None and ours is not None and unit != MEMORY:
                found.setdefault((run.name, case, operation), {})[run.threads] = ours.median / peer.median
    return [
        ["case", "operation", *(f"cost compared with the fastest peer, {n} thread{'s' * (n > 1)}" for n in threads)],
        *(
            [*key[1:], *(f"{ratios[n]:.2f}" if n in ratios else "-" for n in threads)]
            for key, ratios in found.items()
            if max(ratios.values()) > SLOWER
        ),
    ]


def origins(runs: Sequence[Run]) -> list[list[str]]:
    """Where, when and by which versions each script was measured."""
    found: dict[tuple[str, ...], dict[str, set[int]]] = {}
    for run in runs:
        e = run.environment
        versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
        key = e["date"], e["commit"], f"{e['cpu']}, {e['cores']} cores, {e['memory_gb']} GB", versions
        script = f"`{run.script}`{' (quick)' * run.quick}"
        found.setdefault(key, {}).setdefault(script, set()).add(run.threads)
    cells = [["date", "commit", "machine", "versions", "scripts, and their numbers of threads"]]
    for key, scripts in found.items():
        words = (f"{script} {' and '.join(map(str, sorted(threads)))}" for script, threads in scripts.items())
        cells.append([*key, "; ".join(words)])
    return cells


def headlines(runs: Sequence[Run]) -> list[list[str]]:
    """The cases of README with one thread."""
    cells = [["case, one thread of a machine with two cores", "this package", "fastest other library", "ratio"]]
    for title, name, start, what in HEADLINES:
        for run in (run for run in runs if run.name == name and run.threads == 1):
            for (case, operation, unit), row in rows_of(run).items():
                peer = best(row, PEERS)
                if case.startswith(start) and operation == what and unit == "ms" and peer:
                    ours = row[HERE].median
                    ratio = peer.median / ours
                    words = f"{ratio:.2g} times faster" if ratio > 1 else f"**{1 / ratio:.2f} times slower**"
                    cells.append([title, f"{digits(ours)} ms", f"{digits(peer.median)} ms ({peer.way})", words])
    return cells


MADE_OF_ALL = {"slower": slower, "origins": origins, "headlines": headlines}


def block(runs: Sequence[Run], what: str, threads: Sequence[int]) -> list[str]:
    """The lines of a table of the documentation: ``script.section, script.section`` or one made of all runs."""
    names = [name.strip() for name in what.split(",")]
    groups = [[run for name in names for run in runs if run.name == name and run.threads == n] for n in threads]
    groups = [runs] if what in MADE_OF_ALL else [group for group in groups if group]
    if not any(groups):
        return ["*Not measured yet.*"]
    cells = MADE_OF_ALL[what](runs) if what in MADE_OF_ALL else table(groups)
    quick = ["", "*From a quick run, which only shows the form of the table.*"]
    return lines(cells) + quick * any(run.quick for group in groups for run in group)


def with_tables(text: str, runs: Sequence[Run]) -> str:
    """A page whose blocks ``<!-- table: speed.table; threads 2, 1 -->`` hold what the runs give."""

    def filled(match: re.Match[str]) -> str:
        start, what, threads, end = match.groups()
        numbers = [int(n) for n in threads.split(",")] if threads else sorted({run.threads for run in runs})
        return start + "\n" + "\n".join(block(runs, what, numbers)) + "\n\n" + end

    return BLOCK.sub(filled, text)


def pages() -> Iterator[Path]:
    """The pages with tables of this kind."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if "_build" not in path.parts and BLOCK.search(path.read_text()):
            yield path


def compared(old: Iterable[Run], new: Iterable[Run]) -> list[list[str]]:
    """Ratios new / old of what both measured, largest first, and whether the quartiles overlap.

    The last column divides by the median ratio of the peers in the same run, whose code is the same: it leaves out what
    the machine did.
    """
    before = {run[:3]: {m[:4]: m for m in run.measurements} for run in old}
    found: list[tuple[float, list[str]]] = []
    for run in new:
        pairs = [(before[run[:3]][m[:4]], m) for m in run.measurements if m[:4] in before.get(run[:3], ())]
        others = [b.median / a.median for a, b in pairs if b.way.startswith(PEERS) and b.unit != MEMORY]
        for a, b in pairs:
            ratio = b.median / a.median
            apart = "apart" if a.upper < b.lower or b.upper < a.lower else "overlap"
            relative = f"{ratio / statistics.median(others):.2f}" if others and b.unit != MEMORY else "-"
            names = [f"{run.name}, {count([run])}", b.case, b.operation, b.way]
            values = [
                digits(a.median),
                f"{digits(b.median)} {b.unit}",
                f"{ratio:.2f}",
                apart if min(a.rounds, b.rounds) > 2 else "-",
            ]
            found.append((ratio, [*names, *values, relative]))
    head = ["run", "case", "operation", "way", "old", "new", "new / old", "quartiles", "relative to the peers"]
    return [head, *(row for _, row in sorted(found, key=lambda pair: -pair[0]))]
