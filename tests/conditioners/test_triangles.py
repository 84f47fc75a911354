"""Masked products in panels of rows agree with the product with the masked weight."""

import pytest
import torch
from torch.nn.functional import linear

from pyro_genexact.conditioners import MADE
from pyro_genexact.conditioners.triangles import LARGE, masked_linear, masked_weight, panels_of


def _staircase(rows: int, columns: int) -> torch.Tensor:
    """A mask as of MADE: row i reads the first columns, more of them with each row."""
    return torch.arange(columns) < torch.arange(rows).unsqueeze(1) * columns // rows


@pytest.mark.parametrize("offset", [None, (512,), (5, 512)])
@pytest.mark.parametrize("rows", [0, 5])
def test_values_and_gradients_of_all_orders(offset, rows):
    mask = _staircase(512, 520)
    panels = panels_of(mask)
    assert len(panels) > 1
    shapes = [(rows, 520), (512, 520), *([] if offset is None else [(rows, 512) if len(offset) > 1 else offset])]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, weight, added = inputs if offset else (*inputs, None)

    def gradients(y):
        first = torch.autograd.grad((y * y.detach().cos()).sum(), inputs, create_graph=True)
        once = torch.autograd.grad((y * y.detach().cos()).sum(), inputs, retain_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs[:2], retain_graph=True)
        return [y, *first, *once, *second]

    expected = linear(x, weight * mask)
    expected = expected if added is None else expected + added
    for got, want in zip(gradients(masked_linear(x, weight, mask, added, panels)), gradients(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_frozen_tensors_get_no_gradient():
    mask = _staircase(512, 520)
    x, weight = torch.randn(4, 520).double().requires_grad_(), torch.randn(512, 520).double()
    masked_linear(x, weight, mask, None, panels_of(mask)).sum().backward()
    torch.testing.assert_close(x.grad, (weight * mask).sum(0).expand(4, -1))
    weight.requires_grad_()
    masked_linear(x.detach(), weight, mask, None, panels_of(mask)).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0) * mask.double())


def test_the_masked_weight():
    mask, weight = _staircase(512, 520), torch.randn(512, 520, requires_grad=True)
    expected = weight * mask
    assert torch.equal(masked_weight(weight, mask, panels_of(mask)), expected)
    with torch.no_grad():
        assert torch.equal(masked_weight(weight, mask, panels_of(mask)), expected)


def test_entries_that_no_panel_reads_are_left_out():
    """A masked weight times an infinite input is NaN; a panel does not multiply it at all."""
    mask = _staircase(512, 520)
    x = torch.ones(1, 520)
    x[:, -1] = torch.inf
    y = masked_linear(x, torch.ones(512, 520), mask, None, panels_of(mask))
    assert y[0, : panels_of(mask)[-1].low].isfinite().all()


@pytest.mark.parametrize("mask", [_staircase(200, 200), torch.ones(512, 512, dtype=torch.bool)], ids=["small", "full"])
def test_no_panels_where_they_do_not_pay(mask):
    assert panels_of(mask) == ()


def test_networks_of_wide_layers_use_them_and_transforms_of_functions_do_not():
    net = MADE(40, 13, hidden=(520, 520)).double()
    assert [layer.mask.dtype for layer in net.layers] == [torch.float64, torch.bool, torch.bool]
    assert net.layers[1].weight.numel() >= LARGE
    x = torch.randn(3, 40, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(net)(x.unsqueeze(1)).squeeze(1), net(x))
    jacobian = torch.func.jacfwd(lambda row: net(row.unsqueeze(0)).flatten())(x[0])
    assert jacobian.view(40, 13, 40).sum(1).triu().abs().max() == 0  # site t reads no site from t on
    with torch.autocast("cpu", torch.bfloat16):
        assert net.float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("offset", [None, (512,), (5, 512)])
def test_compiled(offset):
    mask = _staircase(512, 520)
    panels = panels_of(mask)
    shapes = [(5, 520), (512, 520), *([] if offset is None else [offset])]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, weight, added = inputs if offset else (*inputs, None)

    def run():
        return masked_linear(x, weight, mask, added, panels).square().sum()

    found, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(), run()
    torch.testing.assert_close(found, expected)
    for got, want in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_derivatives_of_other_kinds():
    """Forward mode, vectorised gradients, and functions of them that are compiled, as for small layers."""
    net = MADE(40, 13, hidden=(520, 520)).double()
    x, v = torch.randn(2, 40, dtype=torch.float64), torch.randn(2, 40, dtype=torch.float64)
    expected = torch.func.jvp(net, (x,), (v,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = net(torch.autograd.forward_ad.make_dual(x, v))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)
    jacobian = torch.autograd.functional.jacobian(lambda y: net(y)[..., 0], x[:1], vectorize=True)
    torch.testing.assert_close(torch.einsum("btcs,cs->bt", jacobian, v[:1]), expected[:1, :, 0])
    pairs = torch.randn(2, *expected.shape, dtype=torch.float64)
    (rows,) = torch.autograd.grad(net(x.requires_grad_()), x, pairs, is_grads_batched=True)
    torch.testing.assert_close((rows * v).sum((1, 2)), (pairs * expected).flatten(1).sum(1))
    each = torch.compile(torch.vmap(lambda row: net(row.unsqueeze(0)).squeeze(0)), backend="aot_eager")
    torch.testing.assert_close(each(x.detach()), net(x.detach()))


def test_tangents_of_the_weight_and_the_offset():
    mask, panels = _staircase(512, 520), panels_of(_staircase(512, 520))
    x, weight, offset = (torch.randn(s, dtype=torch.float64) for s in ((3, 520), (512, 520), (512,)))
    with torch.autograd.forward_ad.dual_level():
        one, other = (torch.autograd.forward_ad.make_dual(t, t.sin()) for t in (weight, offset))
        y = torch.autograd.forward_ad.unpack_dual(masked_linear(x, one, mask, other, panels)).tangent
    torch.testing.assert_close(y, linear(x, weight.sin() * mask, offset.sin()))
