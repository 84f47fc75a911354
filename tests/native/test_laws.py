"""The laws of models of MADE, once with the native operator."""

import pytest

from pyro_genexact import testing

TRANSFORMS = [
    "Autoregressive",
    "Autoregressive relu",
    "Autoregressive direct",
    "Autoregressive one site",
    "Autoregressive vectors",
    "Autoregressive inverse",
    "Autoregressive spline",
    "Autoregressive spline vectors",
    "Autoregressive sum of squares",
    "Autoregressive Bernstein inverse",
    "Autoregressive DeepSigmoid",
]
DISTRIBUTIONS = [
    "Autoregressive binary",
    "Autoregressive image",
    "Autoregressive categories",
    "maf context",
    "nsf",
    "iaf",
]


CONDITIONERS = [
    "MADE",
    "MADE context",
    "MADE band",
    "MADE linear",
    "MADE vectors",
    "MADE categories",
    "MADE mixed",
    "MADE panels",
]


@pytest.mark.parametrize("law", [testing.chunks, testing.reorder, testing.consumption])
@pytest.mark.parametrize("conditioner_name", CONDITIONERS)
def test_conditioners(law, conditioner):
    law(conditioner)


@pytest.mark.parametrize("law", [testing.inverse, testing.log_det, testing.derivatives, testing.cache])
@pytest.mark.parametrize("transform_name", TRANSFORMS)
def test_transforms(law, transform):
    law(*transform)


@pytest.mark.parametrize("law", [testing.shapes, testing.agreement, testing.gradients, testing.freshness])
@pytest.mark.parametrize("distribution_name", DISTRIBUTIONS)
def test_distributions(law, distribution):
    law(*distribution)
