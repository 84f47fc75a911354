"""The layout of the tests: shared helpers are in ``support``, and no test module imports from another."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported(path: Path) -> set[str]:
    """All modules and names of modules that a file imports, as the parts of their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            found.update([*(node.module or "").split("."), *(alias.name for alias in node.names)])
    return found


def test_no_test_imports_from_a_test():
    files = list(TESTS.rglob("*.py"))
    names = {path.stem for path in files if path.stem.startswith("test_")} | {"conftest"}
    wrong = {str(path.relative_to(TESTS)): names & imported(path) for path in files}
    assert len(names) > 50 and not {path: found for path, found in wrong.items() if found}
