"""What import-linter does not see: cycles of files through ``__init__``, imports within functions, private names."""

from __future__ import annotations

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from torch import nn
from torch.distributions import Transform

import pyro_genexact

ROOT = Path(pyro_genexact.__file__).parent
OPTIONAL = {
    "arviz",
    "arviz_plots",
    "arviz_stats",
    "lightning_fabric",
    "matplotlib",
    "sacrebleu",
    "sklearn",
    "transformers",
    "xarray",
}
"""Heavy packages that are imported when first needed."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}


def is_package(module: str) -> bool:
    return (ROOT.parent / module.replace(".", "/")).is_dir()


def imported(module: str, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names, in full."""
    if not node.level:
        return node.module or ""
    package = module.split(".")[: None if is_package(module) else -1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def imports(module: str) -> list[tuple[ast.ImportFrom, str, str]]:
    """The statements of a module that import from this package: each with the module and the name."""
    nodes = [node for node in ast.walk(trees()[module]) if isinstance(node, ast.ImportFrom)]
    found = [(node, imported(module, node), alias.name) for node in nodes for alias in node.names]
    return [entry for entry in found if entry[1].split(".")[0] == "pyro_genexact"]


def reached(module: str) -> set[str]:
    """What runs when a module is imported: what it imports, and the packages of these that are not its own."""
    direct = {f"{source}.{name}" if f"{source}.{name}" in trees() else source for _, source, name in imports(module)}
    packages = {".".join(parts[:n]) for parts in (other.split(".") for other in direct) for n in range(2, len(parts))}
    return {other for other in direct | packages if not f"{module}.".startswith(f"{other}.")}


def test_no_file_cycle():
    TopologicalSorter({module: reached(module) for module in trees()}).prepare()  # a CycleError names the files


def private_imports(module: str) -> list[str]:
    wrong = [
        f"{source}.{name}" for _, source, name in imports(module) if name.startswith("_") and name != "__version__"
    ]
    modules = {name for _, source, name in imports(module) if f"{source}.{name}" in trees()}
    wrong += [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(trees()[module])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in modules and node.attr.startswith("_")
    ]
    return wrong


@functools.cache
def private_names(module: str) -> set[str]:
    """The private names that a module defines: functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


FOREIGN = {"_mask", "_inv", "_validate_args"} | set(dir(nn.Module())) | set(dir(Transform()))
"""Private names of torch's and Pyro's objects."""


def private_attributes(module: str) -> list[str]:
    others = (
        set().union(*(private_names(other) for other in trees() if other != module)) - private_names(module) - FOREIGN
    )
    wrong = [
        ast.unparse(node)
        for node in ast.walk(trees()[module])
        if isinstance(node, ast.Attribute) and node.attr in others
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))  # of a base class
    ]
    return wrong


def inner_imports(module: str) -> set[str]:
    functions = [
        node for node in ast.walk(trees()[module]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    inner = {
        node for function in functions for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    names = {
        part
        for node in inner
        for part in ([node.module or "."] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    return {name.split(".")[0] for name in names} - OPTIONAL


@pytest.mark.parametrize("wrong_in", [private_imports, private_attributes, inner_imports])
def test_no_module_has(wrong_in):
    assert not {module: wrong for module in trees() if (wrong := wrong_in(module))}
