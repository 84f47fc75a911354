"""Building the library: where it is, what is reported, and errors."""

import os
import subprocess
import sys

import pytest

from pyro_genexact import native
from pyro_genexact.native.__main__ import main


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


def test_a_broken_library_is_not_used(tmp_path, library):
    code = """if True:
        import warnings, torch, pyro_genexact as gx
        path = gx.native.library_path()
        path.parent.mkdir(parents=True)
        path.write_text("no library")
        with warnings.catch_warnings(record=True) as found:
            gx.flows.maf(2)().sample((3,))
        assert any("cannot be loaded" in str(w.message) for w in found), found
    """
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
