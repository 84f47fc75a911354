"""Many cases by hand: ``python tests/fuzz/run.py --cases 10000 --seed 7``; or one, ``--case "Case(...)"``.

Goes on after a violation; each new one (another kind of model, check or text) is made small first. Whatever is printed as
``Case(...)`` can be given back, and shows where it fails.
"""

from __future__ import annotations

import argparse
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress

import hypothesis
import torch
from cases import KINDS
from checks import CHECKS
from descriptions import Case
from hypothesis import HealthCheck, Phase, settings
from truths import Subject

CHUNK = 250
NUMBERS = re.compile("[-+0-9.e]*[0-9][0-9.e+-]*")  # violations of one cause have one text but for these


def violations(case: Case, checks: Collection[str] = tuple(CHECKS)) -> list[tuple[str, Exception]]:
    """Which checks fail, and how; "made" if there is nothing to check."""
    try:
        subject = Subject(case)
        if subject.exploded:
            return []
    except Exception as error:
        return [("made", error)]
    found = []
    for name in checks:
        try:
            torch.manual_seed(case.seed)
            CHECKS[name](subject)
        except Exception as error:
            found.append((name, error))
    return found


def through(kind: str, count: int, seed: int, use: Callable[[Case], None]) -> None:
    """Calls ``use`` with so many cases of a kind, the same for a seed; where it raises, with ever smaller ones that do."""
    options = settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate, Phase.shrink])
    quiet = settings(options, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)

    def each(case: Case) -> None:
        use(case)

    hypothesis.seed(seed)(quiet(hypothesis.given(KINDS[kind]())(each)))()


def smallest(kind: str, count: int, seed: int, check: str, text: str) -> Case:
    """The smallest case that is found with this violation, among so many."""
    found: list[Case] = []

    def use(case: Case) -> None:
        if any((check, text) == (name, brief(error)) for name, error in violations(case, {check} - {"made"})):
            found.append(case)
            raise AssertionError

    with suppress(AssertionError):
        through(kind, count, seed, use)
    return found[-1]


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {NUMBERS.sub('#', str(error))[:90]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS))
    parser.add_argument("--without", default="", help="checks to leave out, of " + ", ".join(CHECKS))
    parser.add_argument("--as-found", action="store_true", help="print violations as they are, not made small")
    parser.add_argument("--case", help="one description")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checks = [name for name in CHECKS if name not in args.without.split(",")]
    if args.case:
        for name, error in violations(eval(args.case), checks):
            print(f"{name}: {''.join(traceback.format_exception(error))}")
        return
    kinds = [args.kind] if args.kind else list(KINDS)
    seen: Counter[tuple[str, str, str]] = Counter()
    done: Counter[str] = Counter()
    start, number = time.perf_counter(), 0
    while (left := args.cases - done.total()) > 0:
        kind, seed, count = kinds[number % len(kinds)], 1000 * args.seed + number // len(kinds), min(CHUNK, left)
        drawn: list[Case] = []
        through(kind, count, seed, drawn.append)
        for case in drawn:
            done[kind] += 1
            for name, error in violations(case, checks):
                seen[what := (kind, name, brief(error))] += 1
                if seen[what] == 1:
                    case = case if args.as_found else smallest(kind, count, seed, *what[1:])
                    print(
                        f"VIOLATION {kind}, {name}: {type(error).__name__}: {str(error)[:300]}\n    {case}", flush=True
                    )
        number += 1
        took = 1000 * (time.perf_counter() - start) / done.total()
        print(f"{done.total()} cases, {took:.0f} ms each, {dict(done)}, {seen.total()} violations", flush=True)
    for (kind, name, text), count in seen.most_common():
        print(f"{count:6} {kind}, {name}: {text}")
    print(f"{done.total()} cases with seed {args.seed}: {seen.total()} violations of {len(seen)} kinds")
    raise SystemExit(bool(seen))


if __name__ == "__main__":
    main()
