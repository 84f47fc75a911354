"""Builds the native library or says whether it is built: ``python -m pyro_genexact.native [build]``."""

from __future__ import annotations

import argparse
import sys

from .build import build
from .library import is_built, library_path


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m pyro_genexact.native", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["build"], help="build the library")
    command = parser.parse_args(arguments).command
    try:
        if command or is_built():
            print(f"built: {build() if command else library_path()}")
        else:
            print("not built (python -m pyro_genexact.native build)")
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
