"""Flows over sequences of varying length: parts and lengths that do not go together."""

from __future__ import annotations

import math
from math import nan

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, TanhTransform, constraints

import pyro_genexact as gx
from pyro_genexact import conditioners, flows, heads, transforms
from pyro_genexact.transforms.prefixes import Prefixes
from support.checks import fails
from support.flows_of_lengths import markov

N = torch.tensor([2, 3])
MIXING = {
    "Permute": lambda: transforms.Permute(torch.tensor([2, 0, 1])),
    "LULinear": lambda: transforms.LULinear(3),
    "Rotation": lambda: transforms.Rotation(3),
    "Householder": lambda: transforms.Householder(3),
    "ConditionedCoupling": lambda: transforms.Coupling(3, heads.Affine()),
    "ConditionedBlockAutoregressive": lambda: transforms.BlockAutoregressive(3).inv,
    "ConditionedResidual": lambda: transforms.Planar(3),
    "Simplex": lambda: transforms.ToSupport(constraints.simplex, 4),
    "SoftmaxTransform": dist.transforms.SoftmaxTransform,
    "PowerTransform": lambda: dist.transforms.PowerTransform(torch.tensor(0.5)),
}


@pytest.mark.parametrize("name", MIXING)
def test_transforms_that_mix_all_sites(name):
    flow = gx.Flow([transforms.Reverse(), MIXING[name]()], dist.Normal(torch.zeros(3), 1.0).to_event(1))
    text = "Expected autoregressive or elementwise transforms, Reverse, or ToSupport of scalars (lengths require it)"
    fails(ValueError, text, lambda: flow(lengths=N))
    fails(ValueError, f"got {name}.", lambda: flow(lengths=N))


class Mixed(nn.Module):
    def forward(self):
        return dist.MultivariateNormal(torch.zeros(3), torch.eye(3))


def studentised():
    return gx.Autoregressive(conditioners.Independent(3, 3), heads.StudentT(), (3,))


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (Mixed, "MultivariateNormal of event_shape (3,) over"),
        (studentised, "AutoregressiveDistribution of event_shape (3,)"),
        (lambda: dist.Uniform(torch.zeros(3), 1.0).to_event(1), "Uniform of event_shape (3,) over"),
        (lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), "Normal of event_shape (2, 3) over"),
    ],
)
def test_bases_that_are_not_elementwise(base, name):
    flow = gx.Flow([transforms.Reverse()], base())
    fails(
        ValueError,
        f"Expected base to have independent real elements (lengths require it); got {name}",
        lambda: flow(lengths=N),
    )


def test_wrong_lengths():
    flow = flows.maf(3, conditioner=markov)
    fails(ValueError, "Expected lengths between 0 and 3 (sites of the event); got 4", lambda: flow(lengths=N + 1))
    fails(ValueError, "Expected lengths between 0 and 3 (sites of the event); got -1", lambda: flow(lengths=N - 3))
    fails(TypeError, "Expected lengths to be a tensor of integers; got torch.float32", lambda: flow(lengths=N.float()))
    fails(TypeError, "Expected lengths to be a tensor of integers; got list.", lambda: flow(lengths=[2, 3]))
    text = "Expected lengths between 0 and 3 (sites of the event); got 4"
    for t in (Prefixes([transforms.Reverse()], N + 1), Prefixes([transforms.Reverse()], N + 1).inv):
        fails(ValueError, text, lambda t=t: t(torch.zeros(3)))
    fails(RuntimeError, "shape", lambda: flows.maf(3, 2, conditioner=markov)(torch.zeros(5, 2), lengths=N))


def test_other_conditioned_calls():
    flow = flows.maf(3, conditioner=markov)
    y = torch.zeros(2, 3)
    assert torch.equal(flow.condition(None, N).log_prob(y), flow(lengths=N).log_prob(y))
    assert type(flow().transforms[0]) is transforms.Chain


class Doubling(TanhTransform):
    """One's own, that says how."""

    def on_prefixes(self, lengths):
        return Prefixes([AffineTransform(0.0, 2.0)], lengths)


def test_a_transform_of_ones_own():
    t = Prefixes([Doubling(), transforms.Reverse()], torch.tensor(2))
    x = torch.tensor([1.0, 3.0, nan])
    assert t(x).tolist() == [6.0, 2.0, 0.0]
    assert t.log_abs_det_jacobian(x, t(x)) == pytest.approx(2 * math.log(2))
