"""README: its Python blocks run in order, its links lead to files, and its lines fit a page."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pyro
import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_blocks_run() -> None:
    assert len(BLOCKS) >= 4
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    names: dict[str, object] = {}
    start = time.process_time()  # other processes do not count
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)  # the blocks share their names, as for a reader
    assert time.process_time() - start < 60
    draws = names["draws"]
    assert isinstance(draws, torch.Tensor) and draws.shape == (500, 100, 2)
    assert names["check"].khat < 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_to_files(target: str) -> None:
    assert (ROOT / target).is_file()


def test_code_fits_88_columns() -> None:
    assert max(len(line) for block in BLOCKS for line in block.splitlines()) <= 88
