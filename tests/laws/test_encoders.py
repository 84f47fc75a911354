"""Encoders: the order of items, padding, missing entries, sizes; and what all modules have."""

import copy
import pickle

import pyro
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact import testing
from pyro_genexact.contexts import PaddedSequence, unpadded
from pyro_genexact.encoders import DeepSet, Encoder, Standardized
from pyro_genexact.testing import encoder_inputs
from pyro_genexact.testing.helpers import gradients_of, same, within
from support import registry
from support.values import built

SETS = pytest.mark.parametrize("encoder", registry.SETS, indirect=True)
SEVERAL = pytest.mark.parametrize(
    "encoder", [n for n in registry.ENCODERS if n not in ("Standardized", "Vector")], indirect=True
)


def ragged(x):
    return PaddedSequence(x, torch.arange(len(x), device=x.device) % (x.shape[1] + 1))


def moved(values):
    return PaddedSequence(*(t.to("meta") for t in values)) if isinstance(values, tuple) else values.to("meta")


def inputs(encoder):
    """Of each kind that the encoder takes."""
    x = encoder_inputs(encoder)
    return [x, ragged(x)] if encoder.event_dim > 1 else [x]


def gradients(encoder, values):
    return gradients_of(encoder(values).square().sum(), [*encoder.parameters()])


@SETS
def test_permutation(encoder):
    testing.permutation(encoder)


@SETS
def test_size(encoder):
    testing.size(encoder)


@SEVERAL
def test_padding(encoder):
    testing.padding(encoder)


def test_missing(encoder):
    if not isinstance(encoder, Standardized):
        testing.missing(encoder)


def test_batch_shapes(encoder):
    """Each observation of any batch has the features that it has alone, and a batch may be empty."""
    x = encoder_inputs(encoder)
    c = encoder(x)
    same("encoder", "shape", tuple(c.shape), (6, encoder.features))
    batches = encoder(x.unflatten(0, (2, 1, 3))).flatten(0, 2)
    torch.testing.assert_close(batches, c, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoder(x[1]), c[1], rtol=1e-12, atol=1e-12)
    same("encoder", "empty batch", tuple(encoder(x[:0]).shape), (0, encoder.features))
    testing.empty(lambda rows: {"features": lambda: encoder(x[:rows])}, [*encoder.parameters()])


def test_copies(encoder):
    x = encoder_inputs(encoder)
    c = encoder(x)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(x), c)
    testing.reloading(encoder, lambda other: other(x))


def test_saving(encoder, tmp_path):
    x = encoder_inputs(encoder)
    gx.save(encoder, tmp_path / "encoder.pt")
    assert torch.equal(gx.load(tmp_path / "encoder.pt")(x), encoder(x))


def test_devices(encoder):
    for values in inputs(encoder):
        testing.device(lambda values=values: encoder(values))
        testing.meta(encoder, lambda e, values=values: e(moved(values)))
        with pyro.validation_enabled(False):
            testing.waits(lambda values=values: gradients(encoder, values))


def test_per_example(encoder):
    if type(encoder).__name__ == "Series" and isinstance(encoder.conditioner, gx.conditioners.Recurrent):
        return  # fused calls
    if not [*encoder.parameters()]:
        return
    testing.per_example(encoder, lambda call, x: call(x).sin().sum(), encoder_inputs(encoder, 3))


def test_precision(encoder):
    """Under autocast, layers round, and the features keep the dtype of the parameters."""
    encoder = encoder.float()
    for values in inputs(encoder):
        c = encoder(values)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(values)
        same("encoder", "dtype", rounded.dtype, torch.float32)
        within("encoder", "under autocast", rounded, c, 0.1 * (1 + c.detach().abs().max()))


def test_gradients(encoder):
    assert all(grad.abs().max() > 0 for grad in gradients(encoder, inputs(encoder)[-1]))


@pytest.mark.parametrize("name", registry.JOINTS)
def test_joint(name):
    encoder = registry.JOINTS[name]()
    values = {"y": encoder_inputs(encoder.encoders[0]), "x.z": ragged(encoder_inputs(encoder.encoders[1]))}
    expected = torch.cat([part(values[key]) for key, part in zip(values, encoder.encoders, strict=True)], -1)
    assert torch.equal(encoder(values), expected) and expected.shape[-1] == encoder.features
    testing.reloading(encoder, lambda e: e(values))


class OfOrder(DeepSet):
    def summaries(self, items, present, count):
        return super().summaries(items * torch.arange(items.shape[1])[:, None], present, count)


class ReadsPadding(DeepSet):
    def entries(self, values):
        found = super().entries(values)
        x, _ = unpadded(values)
        return found._replace(z=x.nan_to_num(posinf=9.0))


class Uncounted(DeepSet):
    def summaries(self, items, present, count):
        count[:] = 1
        return super().summaries(items, present, count) / present.sum(-1, keepdim=True)


class MeanForMissing(Encoder):
    def __init__(self):
        super().__init__(2, 3)
        self.layer = nn.Linear(2, 3)

    def forward(self, values):
        return self.layer(self.entries(values).z)


@pytest.mark.parametrize(
    ("law", "encoder", "message"),
    [
        (testing.permutation, lambda: OfOrder(2, 3), r"permutation broken \[features\]"),
        (testing.padding, lambda: ReadsPadding(2, 3), r"padding broken \[infinity, features\]"),
        (testing.missing, MeanForMissing, r"missing broken \[the mean in their place\]: changes the features by 0,"),
        (testing.size, lambda: Uncounted(2, 3), r"size broken \[each item twice\]"),
    ],
)
def test_laws_have_power(law, encoder, message):
    with pytest.raises(AssertionError, match=message):
        law(built(encoder()))
