"""Derivatives of roots, also of modules, by torch.func and on other devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacrev, vmap
from torch.func import grad as func_grad
from torch.nn.utils import parametrize

from pyro_genexact.numerics import implicit, integrate, root
from support.functions import cubic
from support.values import double as t

pytestmark = pytest.mark.usefixtures("double_by_default")

INPUTS = [(5.0, -2.0), (0.7, 1.9), (0.4, -0.3)]


@pytest.mark.parametrize("alone", [False, True])
def test_derivatives(alone):
    y, a, w = (t(*values).requires_grad_() for values in INPUTS)

    def f(x, a, w):
        value, log_slope = cubic(x, a)
        value, slope = value + x * w.square().sum(), log_slope.exp() + w.square().sum()
        return value if alone else (value, slope.log())

    def solve(y, a, w):
        return root(f, y, a, shared=[w])

    assert gradcheck(solve, (y, a, w)) and gradgradcheck(solve, (y, a, w))
    assert gradgradcheck(lambda a, w: root(f, y.detach(), a[:1], shared=[w]), (a, w))  # a broadcasts
    x = root(lambda x: (x**3, (3 * x * x).log()), t(8.0).requires_grad_())
    y = t(8.0).requires_grad_()
    x = root((lambda x: x**3) if alone else (lambda x: (x**3, (3 * x * x).log())), y)
    for expected in (1 / 12, -1 / 144, 5 / 3456, -5 / 10368):  # of y^(1/3) at 8
        (x,) = grad(x.sum(), y, create_graph=True)
        assert torch.allclose(x, t(expected), rtol=1e-12)


def test_derivatives_of_rows():
    w = torch.eye(3) * 2 + 0.2 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))

    def f(x, w):
        return (x @ w.mT) + 0.1 * (x @ w.mT) ** 3

    def solve(y, w):
        inner = root(lambda z: z + 0.1 * z**3, y.detach())
        return implicit(f, torch.linalg.solve(w.detach(), inner.mT).mT, y, w, event_dim=1)

    inputs = (t([0.3, -1.0, 2.0], [1.0, 0.0, 0.5]).requires_grad_(), w.requires_grad_())
    assert torch.allclose(f(solve(*inputs), w), inputs[0]) and gradcheck(solve, inputs) and gradgradcheck(solve, inputs)
    first, second = (
        jacrev(solve, 1)(*(v.detach() for v in inputs)),
        torch.autograd.functional.jacobian(solve, inputs)[1],
    )
    assert torch.allclose(first, second)


def test_parameters_that_changed_are_noticed():
    a = t(1.0).requires_grad_()
    kept = a * 2
    x = root(cubic, t(5.0), kept)
    kept.data.add_(0)
    kept.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_transforms_of_torch_func():
    y, a = t(5.0, -2.0, 12.0), t(4.0, 1.0, 0.5)

    def solve(y, a):
        return root(cubic, y, a)

    plain = root(cubic, y, a)
    assert torch.allclose(vmap(solve)(y, a), plain, rtol=1e-13)
    assert torch.allclose(vmap(solve, (None, 0))(torch.tensor(5.0), a), root(cubic, torch.full_like(a, 5.0), a))
    assert vmap(lambda y: root(torch.tanh, y))(t(2.0, 0.5)).isnan().tolist() == [True, False]
    ya = y.clone().requires_grad_(), a.clone().requires_grad_()
    (by_a,) = grad(solve(*ya).sum(), ya[1], create_graph=True)
    second, *_ = grad(by_a.sum(), ya[1], create_graph=True)
    third, *_ = grad(second.sum(), ya[1])
    each = func_grad(solve, 1)
    assert torch.allclose(vmap(each)(y, a), by_a) and torch.allclose(vmap(func_grad(each, 1))(y, a), second)
    assert torch.allclose(vmap(func_grad(func_grad(each, 1), 1))(y, a), third)
    assert torch.allclose(torch.stack([hessian(solve, 1)(*row) for row in zip(y, a, strict=True)]), second)
    assert torch.allclose(
        jacrev(lambda a: root(lambda x: x**3 + x, a))(y).diagonal(), 1 / (3 * root(lambda x: x**3 + x, y) ** 2 + 1)
    )


def test_inference_mode_and_other_devices():
    with torch.inference_mode():
        y, a = t(5.0, 12.0), t(4.0, 4.0)
        expected = root(cubic, y, a)
        assert torch.allclose(root(lambda x, a: x**3 + a * x, y, a), expected)
    assert torch.allclose(root(lambda x, a: x**3 + a * x, y.clone(), a), expected)
    with torch.device("meta"):
        y, a = torch.tensor([5.0, 1e9], device="cpu"), torch.tensor([4.0, 1.0], device="cpu")
        assert root(cubic, y, a).device == y.device == root(lambda x, a: cubic(x, a)[0], y, a).device
        assert integrate(torch.exp, 0 * a, a)[0].device == y.device
        assert root(cubic, y.to("meta"), a.to("meta")).is_meta
        assert integrate(torch.exp, y.to("meta"), a.to("meta"))[0].is_meta


class Tower(nn.Module):
    """With tied weights, a parametrised one and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.first.weight = nn.Parameter(t([0.8]))
        self.second.weight = self.first.weight
        self.free = nn.Linear(1, 1)
        self.free.weight = nn.Parameter(t([0.2]))
        parametrize.register_parametrization(self.free, "weight", nn.Softplus())
        self.register_buffer("slope", t(0.5))

    def forward(self, x, shift):
        x = x[..., None]
        return (self.second(self.first(x)) * self.slope + self.free(x).sinh() + shift * x)[..., 0]


def test_modules():
    tower, y, shift = Tower(), t(1.0, -2.0), t(0.3).requires_grad_()
    weights = dict(tower.named_parameters())
    assert len(weights) == 3
    x = root(tower, y, shared=[shift])
    assert torch.allclose(tower(x, shift), y, rtol=1e-13)
    names, values = zip(*weights.items(), strict=True)

    def solve(*values):
        def f(x, *v):
            return functional_call(tower, dict(zip(names, v, strict=True)), (x, shift.detach()))

        return root(f, y, shared=values)

    expected = torch.autograd.functional.jacobian(lambda *v: solve(*v).sum(), values)
    found = grad(x.sum(), values, create_graph=True)
    assert all(torch.allclose(a, b) and a.abs().min() > 0 for a, b in zip(found, expected, strict=True))
    second = grad(sum(g.sum() for g in found), [*values, shift])

    def first_sum(*v):
        return sum(
            g.sum() for g in torch.autograd.functional.jacobian(lambda *w: solve(*w).sum(), v, create_graph=True)
        )

    assert all(
        torch.allclose(a, b)
        for a, b in zip(second, torch.autograd.functional.jacobian(first_sum, values), strict=False)
    )
    by_shift = []
    for step in (1e-5, -1e-5):
        moved = root(tower, y, shared=[shift.detach() + step])
        by_shift.append(sum(g.sum() for g in grad(moved.sum(), values)))
    torch.testing.assert_close(second[-1].squeeze(), (by_shift[0] - by_shift[1]).squeeze() / 2e-5, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        assert not root(tower, y, shared=[shift]).requires_grad
