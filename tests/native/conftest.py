"""Builds the native library once, if there is a compiler, and uses it in the tests of this folder."""

import os
import shutil

import pytest

from pyro_genexact import native


@pytest.fixture(scope="session")
def library():
    if not native.is_built() and not any(
        map(shutil.which, ["g++", "clang++", "c++", *os.environ.get("CXX", "").split()[:1]])
    ):
        pytest.skip("no C++ compiler")
    return native.build()


@pytest.fixture(autouse=True)
def natively(library):
    with native.enabled(True):
        yield
