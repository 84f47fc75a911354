"""Building the library: where it is, what is reported, and errors."""

import sys
from types import SimpleNamespace

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import native
from pyro_genexact.native.__main__ import main
from pyro_genexact.native.build import _threads
from pyro_genexact.native.library import forget


def test_command(capsys, monkeypatch, tmp_path):
    main([])
    assert capsys.readouterr().out == f"built: {native.library_path()}\n"
    main(["build"])
    assert capsys.readouterr().out == f"built: {native.library_path()}\n"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert native.library_path().parent == tmp_path / "pyro_genexact"
    main([])
    assert capsys.readouterr().out == "not built (python -m pyro_genexact.native build)\n"


@pytest.mark.parametrize(
    ("compiler", "path", "message"),
    [
        ("no-such-compiler", None, r"Expected the compiler no-such-compiler \(from CXX\) on the PATH"),
        ("", "", r"Expected a C\+\+ compiler \(g\+\+, clang\+\+, c\+\+, or \$CXX\) on the PATH.*found none"),
        (f"{sys.executable} -c 1/0", None, r"to build the native library; it failed:(.|\n)*ZeroDivisionError"),
    ],
)
def test_errors(compiler, path, message, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    with pytest.raises(RuntimeError, match=message):
        native.build()
    with pytest.raises(SystemExit, match=message):
        main(["build"])


@pytest.mark.parametrize(
    "error", [PermissionError, FileNotFoundError, RuntimeError("Could not determine home directory.")]
)
def test_a_library_that_cannot_be_looked_for_is_not_used(error, monkeypatch, capsys):
    def unknown():
        raise error

    monkeypatch.setattr(native.library, "library_path", unknown)
    forget()
    try:
        assert gx.flows.maf(2)().sample((3,)).shape == (3, 2)
        assert not native.is_built()
    finally:
        forget()


def test_a_folder_that_cannot_be_written_is_reported_without_a_traceback(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(SystemExit, match="Not a directory"):
        main(["build"])


def test_what_cannot_be_loaded_is_not_installed(monkeypatch, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\ntest "$last" = --version || touch "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"it failed:(.|\n)*file too short"):
        native.build()
    assert not native.library_path().exists()


@pytest.mark.parametrize(("version", "flags"), [("g++ 13", ["-fopenmp"]), ("clang version 18", [])])
def test_threads_of_the_compiler(version, flags, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert _threads(["echo", version]) == flags


def test_a_broken_library_is_not_used(tmp_path, monkeypatch):
    def load_library(path):
        raise OSError("invalid ELF header")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native.library_path().parent.mkdir(parents=True)
    native.library_path().write_text("")
    monkeypatch.setattr(torch, "ops", SimpleNamespace(pyro_genexact=SimpleNamespace(), load_library=load_library))
    forget()
    with pytest.warns(UserWarning, match="cannot be loaded, so it is not used: invalid ELF header"):
        assert gx.flows.maf(2)().sample((3,)).shape == (3, 2)
    forget()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="on the PATH"):
        native.build()  # builds it again
