"""The law of compiled functions on every entry of the registry, which takes minutes: ``python tests/laws/compile_all.py``.

Arguments are parts of names, to run some of them. Entries that ``support.compiled.SLOW`` lists are named, not run.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from support.compiled import CASES, SLOW

LIMIT = 60  # seconds of an entry


def give_up(*_):
    raise TimeoutError(f"takes more than {LIMIT} s")


def main(parts: list[str]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGVTALRM, give_up)
    failed = 0
    for case, (law, name) in CASES.items():
        if parts and not any(part in case for part in parts):
            continue
        if case in SLOW and case not in parts:
            print(f"{case}: left out ({SLOW[case]})", flush=True)
            continue
        torch.manual_seed(0)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
        try:
            law(name)
            text = "compiles"
        except Exception as error:
            failed += 1
            lines = [line.strip() for line in str(error).splitlines() if line.strip() and "^^^" not in line]
            text = " | ".join([f"FAILS {type(error).__name__}", *lines[:3], "...", *lines[-7:-1]])[:900]
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(f"{case}: {text} ({time.process_time() - start:.1f} s)", flush=True)
    sys.exit(f"{failed} of them fail" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
