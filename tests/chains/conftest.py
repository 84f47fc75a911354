"""Small label chains of every kind; files that need others override ``cases``."""

from __future__ import annotations

import pytest

from support.label_chains import EACH, all_sizes


@pytest.fixture(params=EACH, ids=str)
def cases(request):
    """Of at most 64 strings."""
    return [c for c in all_sizes(*request.param) if c.labels**c.sites <= 64]
