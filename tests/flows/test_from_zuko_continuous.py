"""``from_zuko`` of a continuous flow: exact to the tolerance of zuko's solver, or an error."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact import testing
from pyro_genexact.testing import redraw
from support.checks import close
from support.values import F64
from support.zuko_flows import F, given


def continuous(D=2, C=0, dtype=F64, scale=0.5, **options):
    """Away from its start, with a transform of zuko's whose error is far smaller."""
    module = redraw(F.CNF(D, C, **{"hidden_features": (4,), "activation": nn.Tanh, "freqs": 1, **options}).to(dtype))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    exact = copy.deepcopy(module)
    exact.transform.atol = exact.transform.rtol = 1e-12
    return module, gx.flows.from_zuko(module), exact


@pytest.mark.parametrize("tol, error", [(None, 1e-3), (1e-7, 2e-6), (1e-10, 2e-9)])
def test_error_of_continuous_flows(tol, error):
    """That of the solver: of the map, of the log-determinant, by differences of the map, and from row to row."""
    _, flow, exact = continuous(**({} if tol is None else {"atol": tol, "rtol": tol}))
    y = torch.randn(3, 2, dtype=F64)
    d, t = flow(), flow().transforms[0]
    close(t.inv(y), exact.transform()(y), error)
    close(d.log_prob(y), exact().log_prob(y), error)
    close(d.log_prob(y), torch.stack([flow().log_prob(row) for row in y]), error)
    jacobian = torch.stack([torch.autograd.functional.jacobian(t.inv, row) for row in y])
    close(torch.linalg.slogdet(jacobian)[1], -t.log_abs_det_jacobian(t.inv(y), y), error)
    assert (t.inv(y) - y).abs().max() > 0.2 and jacobian.det().log().abs().max() > 0.1
    assert (d.log_prob(y) - exact().log_prob(y)).abs().max() > 1e-3 * error  # the bounds are no loose ones


def test_mass_of_continuous_flows():
    _, flow, _ = continuous()
    axis = torch.linspace(-8, 8, 161, dtype=F64)
    with torch.no_grad():
        mass = flow().log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("law", ["inverse", "log_det", "cache", "conventions", "as_distribution"])
def test_laws_of_continuous_transforms(law):
    _, flow, _ = continuous(2, 1, freqs=0, atol=1e-10, rtol=1e-10, scale=0.35)
    getattr(testing, law)(flow.transforms[0], torch.randn(2, 2, dtype=F64), given(1, 2))


@pytest.mark.parametrize("D, dtype", [(1, F64), (2, torch.float32)])
def test_continuous_flows_at_values_that_are_not_finite(D, dtype):
    """zuko's solver, which takes one step for all rows, looks for a smaller one forever."""
    _, flow, _ = continuous(D, dtype=dtype)
    y = torch.randn(4, D, dtype=dtype)
    expected = flow().log_prob(y[2:])
    y[0, -1], y[1, 0] = torch.inf, torch.nan
    with pyro.validation_enabled(False):
        lp = flow().log_prob(y)
        back = flow().transforms[0](y)
    assert lp[0] == -torch.inf and lp[1].isnan()
    close(lp[2:], expected, 1e-3)
    assert back[0, -1] == torch.inf and back[1, 0].isnan() and back[2:].isfinite().all()


def test_continuous_flows_that_cannot_be_integrated():
    module, flow, _ = continuous(2, 1)
    y = torch.randn(2, 2, dtype=F64)
    text = r"Expected finite slopes of the flow's differential equation; got nan at index \(1, 0\)\."
    with pytest.raises(gx.ConvergenceError, match=text) as info:
        flow(torch.tensor([[0.0], [torch.nan]], dtype=F64)).log_prob(y)
    assert info.value.index == (1, 0)
    with torch.no_grad():
        next(module.parameters()).fill_(torch.inf)
    with pytest.raises(gx.ConvergenceError, match="Expected finite slopes"):
        flow(torch.zeros(2, 1, dtype=F64)).sample()


def test_tolerances_below_rounding():
    """Are taken for that: zuko's own steps would shrink without an end."""
    module, flow, _ = continuous(2, atol=1e-12, rtol=1e-12, dtype=torch.float32)
    double = gx.flows.from_zuko(copy.deepcopy(module).double())
    y = torch.randn(5, 2)
    close(flow().log_prob(y), double().log_prob(y.double()).float(), 1e-3)
    assert (module.transform.atol, module.transform.rtol) == (1e-12, 1e-12)
