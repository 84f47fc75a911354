"""Every law runs on every entry of the registry, on every device there is."""

from __future__ import annotations

import pytest
import registry
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=registry.CONDITIONERS)
def conditioner(request, device):
    return registry.move(registry.CONDITIONERS[request.param](), device)


@pytest.fixture(params=registry.HEADS)
def head(request, device):
    return registry.move(registry.HEADS[request.param](), device)


@pytest.fixture(params=registry.TRANSFORMS)
def transform(request, device):
    """A transform or module, values and a context or None."""
    return registry.move(registry.TRANSFORMS[request.param](), device)


@pytest.fixture(params=registry.DISTRIBUTIONS)
def distribution(request, device):
    """A module and a context or None."""
    return registry.move(registry.DISTRIBUTIONS[request.param](), device)
