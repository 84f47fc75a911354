"""Each test starts from seed 0 and an empty param store. Every law runs on every entry of the registry and every device."""

from __future__ import annotations

import gc

import pyro
import pytest
import torch

from pyro_genexact import native
from support import registry
from support.values import built

torch.set_num_threads(1)  # tensors are tiny, and threads that wait for each other on a busy machine cost minutes
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_collection_finish():
    """Thousands of tests are no garbage, and need not be searched for it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def without_native():
    """Tests outside of ``tests/native`` do not depend on a library that happens to be built."""
    with native.enabled(False):
        yield


@pytest.fixture(autouse=True)
def seeded():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):  # torch switches it off for good when it compiles for the first time
        yield


@pytest.fixture
def double_by_default():
    """Tensors are made in float64 unless a test says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=registry.CONDITIONERS)
def conditioner_name(request):
    return request.param


@pytest.fixture
def conditioner(conditioner_name, device):
    return registry.move(registry.CONDITIONERS[conditioner_name](), device)


@pytest.fixture(params=registry.ENCODERS)
def encoder(request, device):
    return registry.move(registry.ENCODERS[request.param](), device)


@pytest.fixture(params=registry.HEADS)
def head(request, device):
    return registry.move(registry.HEADS[request.param](), device)


@pytest.fixture(params=registry.DISTRIBUTION_HEADS)
def distribution_head(request, device):
    return registry.move(built(registry.DISTRIBUTION_HEADS[request.param]()), device)


@pytest.fixture(params=registry.TRANSFORMS)
def transform_name(request):
    return request.param


@pytest.fixture
def transform(transform_name, device):
    """A transform or module, values and a context or None."""
    return registry.move(registry.TRANSFORMS[transform_name](), device)


@pytest.fixture(params=registry.DISTRIBUTIONS)
def distribution_name(request):
    return request.param


@pytest.fixture
def distribution(distribution_name, device):
    """A module and a context or None."""
    return registry.move(registry.DISTRIBUTIONS[distribution_name](), device)
