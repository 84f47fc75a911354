"""The native step: one site of MADE for every head, in states that are extended, reordered and reversed."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.nn.functional import silu

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import native
from pyro_genexact.conditioners import MADE, made
from support.values import DTYPES, built, sized

NETWORKS = {
    "relu": (20, {"activation": torch.relu, "hidden": (40, 50)}),
    "tanh, context": (35, {"activation": torch.tanh, "context": 3}),
    "sigmoid, no direct link": (35, {"activation": torch.sigmoid, "hidden": (33, 70), "direct": False}),
    "silu, band": (20, {"activation": silu, "adjacency": torch.ones(20, 20, dtype=torch.bool).tril(-1).triu(-3)}),
    "mixed sites": (4, {"site": [(), 3, (), 2]}),
    "one site": (1, {}),
}


def unpickled(state):
    return pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize(("dtype", "tol"), DTYPES)
@pytest.mark.parametrize("rows", [1, 16, 70, 128])
@pytest.mark.parametrize("name", NETWORKS)
def test_chunks(name, rows, dtype, tol):
    """Chunks across panels, a reordered state, and a change to Python and back."""
    sites, options = NETWORKS[name]
    net = built(MADE(sites, 3, **options)).to(dtype)
    context = sized(rows, net.context, seed=1).to(dtype) if net.context else None
    y = torch.randint(2, (rows, sites)).to(dtype) if "mixed" in name else sized(rows, sites).to(dtype)
    with torch.no_grad():
        expected = net(y, context)
        phi, state = net.start(context, rows)
        assert state.native
        found, t, order = [phi.unsqueeze(1)], 0, torch.randperm(rows)
        for size in (1, 2, 1, 13, 4, 1, 30):
            chunk = y[:, t : min(t + size, sites - 1)]
            if not chunk.shape[1]:
                break
            if t == 3:
                state, y, expected = net.reorder(state, order), y[order], expected[order]
                found, chunk = [part[order] for part in found], chunk[order]
            with native.enabled(t not in (1, 4, 21)):  # these are left to Python
                phi, state = net.extend(chunk, state)
            found.append(phi)
            t += size
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=10 * tol, atol=10 * tol)


@pytest.mark.parametrize("change", [lambda s: s._replace(units=tuple(u.clone() for u in s.units)), unpickled])
def test_copied_states(change):
    net, y = built(MADE(20, 3)), sized(3, 20)
    with torch.no_grad():
        _, state = net.start(None, 3)
        _, state = net.extend(y[:, :5], state)
        phi, _ = net.extend(y[:, 5:19], change(state))
        torch.testing.assert_close(phi, net(y)[:, 6:], rtol=1e-9, atol=1e-9)


def test_a_state_needs_no_library(monkeypatch):
    net, y = built(MADE(20, 3)), sized(3, 20)
    with torch.no_grad():
        _, state = net.start(None, 3)
        monkeypatch.setattr(made, "step", None)
        monkeypatch.setattr(made, "available", lambda: False)
        torch.testing.assert_close(net.extend(y[:, :19], state)[0], net(y)[:, 1:], rtol=1e-9, atol=1e-9)


def test_the_operator_checks_sizes():
    net, y = built(MADE(20, 3)), sized(3, 1)
    with torch.no_grad():
        _, state = net.start(None, 3)

        def call(inputs=y, units=state.units, low=1, high=2):
            weights, ends = state.weights, net._sweeps.ends
            return torch.ops.pyro_genexact.step(inputs, units, weights, ends, True, 0, low, high)

        call()
        for options in [
            {"inputs": sized(2, 1)},
            {"inputs": sized(3, 2)},
            {"units": state.units[1:]},
            {"units": [u[1:] for u in state.units]},
            {"units": [u.clone() for u in state.units]},
            {"units": [u.new_zeros(len(u), 1).expand(-1, 3) for u in state.units]},
            {"high": 21},
            {"low": -1},
        ]:
            with pytest.raises(RuntimeError, match="Expected"):
                call(**options)


def test_samples_and_gradients_of_other_heads():
    net = built(MADE(20, 2, context=2, activation=torch.tanh))
    model, context = gx.Autoregressive(net, h.Normal(), (20,)), sized(7, 2, seed=1)

    def sample(on):
        torch.manual_seed(2)
        with native.enabled(on):
            y = model(context).rsample()
            return y.detach(), *torch.autograd.grad(y.sin().sum(), [*net.parameters()])

    for a, b in zip(sample(True), sample(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_dropout_is_left_to_python():
    net = built(MADE(5, 2, dropout=0.5)).train()
    with torch.no_grad():
        first = torch.stack([net.start(None, 1)[0] for _ in range(20)])
        _, state = net.start(None, 3)
        phi, _ = net.extend(sized(3, 4), state)
    assert phi.shape == (3, 4, 2)
    assert len(first.unique(dim=0)) == 1  # nothing to drop before the first site
    assert phi.isfinite().all()


def test_fake_tensors():
    units = [torch.zeros(5, 16, dtype=torch.float64)[:, :3], torch.zeros(10, 16, dtype=torch.float64)[:, :3]]
    ends = torch.tensor([[0, 0, 1, 2, 3, 4], [0, 2, 4, 6, 8, 10]])
    arguments = (sized(3, 1), units, [sized(10, 5)], ends, False, 0, 1, 2)
    checks = (
        "test_schema",
        "test_faketensor",
    )  # copies that compilers make lack the padding
    torch.library.opcheck(torch.ops.pyro_genexact.step.default, arguments, test_utils=checks)
