"""The tables of measured times are those that the file of measurements gives, and its ratios are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.measurements import (
    BLOCK,
    FILE,
    MADE_OF_ALL,
    Measurement,
    Run,
    compared,
    merged,
    pages,
    read,
    slower,
    summary,
    table,
    with_tables,
    write,
)

SCRIPTS = Path(__file__).parent / "benchmarks"
ENVIRONMENT = {
    "date": "2026-01-01",
    "commit": "abc",
    "cpu": "x",
    "cores": 2,
    "memory_gb": 8,
    "versions": {"torch": "2"},
}


def run(threads: int = 1, section: str = "table", unit: str = "ms", **medians: float) -> Run:
    ways = {way.replace("_", ", "): value for way, value in medians.items()}
    values = [Measurement("D=8", "sample", way, unit, v, 0.9 * v, 1.1 * v, 7) for way, v in ways.items()]
    return Run("speed", section, threads, False, ENVIRONMENT, values)


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_pages_have_the_tables_of_the_file(page: Path) -> None:
    """If this fails: ``python tests/benchmarks/run.py --tables``."""
    assert with_tables(page.read_text(), read(FILE)) == page.read_text()


def test_blocks_name_sections_of_scripts() -> None:
    found = [match[2] for page in pages() for match in BLOCK.finditer(page.read_text())]
    names = [name.strip().split(".") for what in found if what not in MADE_OF_ALL for name in what.split(",")]
    assert len(names) > 10
    for script, section in names:
        assert f"def {section}(options" in (SCRIPTS / f"{script}.py").read_text(), (script, section)


def test_each_script_is_run_by_the_runner_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from benchmarks import run as runner

    found = {path.stem for path in SCRIPTS.iterdir() if path.suffix == ".py" or (path / "__main__.py").exists()}
    assert sorted([*runner.SCRIPTS, *runner.ALONE, "run", "timing", "measurements"]) == sorted(found)
    for name in runner.SCRIPTS:
        assert "run(parser(__doc__" in (text := (SCRIPTS / f"{name}.py").read_text()) or "parser(__doc__, [" in text, (
            name
        )


def test_file_has_no_paths_and_survives_writing(tmp_path: Path) -> None:
    runs = read(FILE)
    assert runs and all(run.environment.keys() == ENVIRONMENT.keys() for run in runs)
    assert "/home" not in FILE.read_text() and "/tmp" not in FILE.read_text()
    write(tmp_path / "copy.json", runs)
    assert (tmp_path / "copy.json").read_text() == FILE.read_text()


def test_new_sections_replace_old_ones(tmp_path: Path) -> None:
    old, new = [run(here=1.0), run(2, here=2.0), run(section="memory", here=3.0)], [run(here=4.0, Pyro=5.0)]
    found = merged(old, new)
    assert [(r.section, r.threads, r.measurements[0].median) for r in found] == [
        ("memory", 1, 3.0), ("table", 1, 4.0), ("table", 2, 2.0)]  # fmt: skip
    write(tmp_path / "runs.json", found)
    assert read(tmp_path / "runs.json") == found


def test_summary_is_median_and_quartiles() -> None:
    assert summary([0.001, 0.002, 0.003, 0.004, 0.1], 1e3) == (3.0, 2.0, 4.0, 5)
    assert summary([2.0]) == (2.0, 2.0, 2.0, 1)


def test_ratios_are_to_the_best_other_for_each_number_of_threads() -> None:
    one, two = run(1, here=3.0, here_native=1.0, Pyro=4.0, zuko=2.0), run(2, here=3.0, here_native=0.1, Pyro=6.0)
    cells = table([[one], [two]])
    pairs = ("here / best other", "here, native / best other", "here, native / here")
    assert cells[0] == ["case", "operation (1 thread)", "here", "here, native", "Pyro", "zuko",
                        *(f"{pair}, {n}" for pair in pairs for n in ("1 thread", "2 threads"))]  # fmt: skip
    assert cells[1] == ["D=8", "sample, ms", "3", "1", "4", "2", "1.50", "1/2.0", "1/2.0", "1/60", "1/3.0", "1/30"]
    assert table([[run(here=3.0)], [run(2, here=4.0)]])[0][2:] == ["here, 1 thread", "here, 2 threads"]


def test_slower_lists_peers_alone() -> None:
    runs = [run(1, here=3.0, Pyro=2.0, zuko=4.0), run(2, here=3.0, Pyro=6.0)]
    assert slower([*runs, run(1, here=1.0, Pyro=2.0, unit="MB")])[1:] == [["D=8", "sample", "1.50", "0.50"]]
    assert slower([run(here=3.0, **{"4 parts": 1.0})])[1:] == []


def test_comparison_divides_by_what_the_peers_did() -> None:
    (row,) = [row for row in compared([run(here=1.0, Pyro=2.0)], [run(here=3.0, Pyro=4.0)])[1:] if row[3] == "here"]
    assert row[4:] == ["1", "3 ms", "3.00", "apart", "1.50"]
    same = compared([run(here=1.0)], [run(here=1.1)])[1]
    assert same[6:] == ["1.10", "overlap", "-"]
    assert compared([run(here=1.0)], [run(2, here=1.0)])[1:] == []
