"""The documentation and its sources agree."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REFERENCES = ROOT / "docs" / "references.bib"
SOURCES = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts),
    *sorted((ROOT / "pyro_genexact").rglob("*.py")),
]


@pytest.fixture(scope="module")
def bibliography():
    return REFERENCES.read_text()


def test_arxiv_numbers_are_in_the_bibliography(bibliography):
    """Each paper that a page or a docstring links on arXiv is in references.bib."""
    found = {
        (number, path.relative_to(ROOT).as_posix())
        for path in SOURCES
        for number in re.findall(r"arxiv(?:\.org/(?:abs|pdf)/|:\s*)(\d{4}\.\d{4,5})", path.read_text(), re.IGNORECASE)
    }
    known = set(re.findall(r"eprint = \{(\d{4}\.\d{4,5})\}", bibliography))
    assert {(number, path) for number, path in found if number not in known} == set()
    assert known


def test_entries_of_the_bibliography_are_closed(bibliography):
    entries = re.split(r"^(?=@)", bibliography, flags=re.MULTILINE)
    assert [entry for entry in entries if entry.count("{") != entry.count("}")] == []


def test_citations_are_in_the_bibliography(bibliography):
    keys = re.findall(r"^@\w+\{(\w+),", bibliography, re.MULTILINE)
    assert len(keys) == len(set(keys))
    cited = {
        (key, path.relative_to(ROOT).as_posix())
        for path in SOURCES
        if path.suffix == ".md"
        for group in re.findall(r"\{cite:\w+\}`([^`]+)`", path.read_text())
        for key in re.split(r",\s*", group)
    }
    assert {(key, path) for key, path in cited if key not in keys} == set()


@pytest.mark.parametrize("project", ["torch", "pyro"])
def test_listed_names_exist(project):
    """The names that pages link to, listed for builds without a network, are names of the installed release."""
    lines = (ROOT / "docs" / "inventories" / f"{project}.txt").read_text().splitlines()
    entries = [line.split() for line in lines if not line.startswith("#")]
    assert all(len(entry) == 3 and entry[1].startswith("py:") for entry in entries)
    for name, _, _ in entries:
        if name.startswith(f"{project}."):
            pkgutil.resolve_name(name)
