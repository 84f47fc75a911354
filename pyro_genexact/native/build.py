"""Builds the native library by one call of a C++ compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from .library import SOURCES, capability, forget, is_built, library_path

_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


def build() -> Path:
    """Builds the library, unless it is built, and returns its file, see :func:`library_path`.

    It takes about 20 seconds. The compiler is ``$CXX``, or the first of ``g++``, ``clang++`` and ``c++`` that is
    installed. What ``clang++`` builds runs in one thread. The library depends on torch and the instruction set, but not
    on the version of Python. A file that cannot be loaded is built again.

    Raises:
        RuntimeError: if there is no compiler, it fails, or what it makes cannot be loaded.
        OSError: if the file cannot be written.
    """
    file = library_path()
    if is_built():
        return file
    compiler = _compiler()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        if is_built():  # by another process
            return file
        compiled, linked = f"{folder}/made.o", f"{folder}/made.so"
        _run([*compiler, *_threads(compiler), *_compile_flags(), "-c", str(SOURCES[0]), "-o", compiled])
        _run([*compiler, *_link_flags(), compiled, *_libraries(), "-o", linked])
        _run([sys.executable, "-c", "import sys, torch; torch.ops.load_library(sys.argv[1])", linked])
        os.replace(linked, file)  # at once, so that no other process loads a part of it
    forget()
    return file


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["clang++"], ["c++"]]
    found = next((command for command in candidates if shutil.which(command[0])), None)
    if found is None:
        expected = f"the compiler {named[0]} (from CXX)" if named else "a C++ compiler (g++, clang++, c++, or $CXX)"
        raise RuntimeError(f"Expected {expected} on the PATH, to build the native library; found none.")
    return found


def _threads(compiler: list[str]) -> list[str]:
    # clang's OpenMP needs symbols of libomp, which torch's OpenMP library may lack
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return [] if sys.platform == "darwin" or "clang" in version else ["-fopenmp"]


def _compile_flags() -> list[str]:
    include, kind = Path(torch.__file__).parent / "include", capability()
    kind = kind if kind in _INSTRUCTIONS else "DEFAULT"
    macros = [
        f"-DCPU_CAPABILITY={kind}",
        f"-DCPU_CAPABILITY_{kind}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    headers = [word for path in (include, include / "torch/csrc/api/include") for word in ("-isystem", str(path))]
    return ["-O3", "-std=c++20", "-fPIC", "-fno-math-errno", *_INSTRUCTIONS.get(kind, []), *macros, *headers]


def _link_flags() -> list[str]:
    return ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]


def _libraries() -> list[str]:
    # without OpenMP's own library, so that the one of torch is used and the threads are shared
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Expected {command[0]} to build the native library; it failed:\n{done.stderr[-4000:]}")
