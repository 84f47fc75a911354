"""Conditioners: causality, chunks, states, context, and the gradient of the sequential direction."""

import pytest
import torch

from pyro_genexact import heads, testing
from pyro_genexact.conditioners import MADE
from support import registry
from support.small_conditioners import RunningSum
from support.values import built


@pytest.fixture
def padded(conditioner_name):
    return "padded" in conditioner_name


def test_causality(conditioner, conditioner_name, padded):
    reads, must_read = registry.READS.get(conditioner_name), registry.MUST_READ.get(conditioner_name)
    testing.causality(conditioner, reads, must_read, padded=padded)


def test_chunks(conditioner, padded):
    testing.chunks(conditioner, padded=padded)


def test_reorder(conditioner, padded):
    testing.reorder(conditioner, padded=padded)


def test_consumption(conditioner, padded):
    testing.consumption(conditioner, padded=padded)


def test_from_inference_mode_to_grad(conditioner, conditioner_name, padded):
    """A state that was begun in inference mode, and may be extended there, goes on with gradients."""
    y, context = testing.conditioner_inputs(conditioner, padded=padded)
    read = y.shape[1] - 1
    if not read:
        return
    for first in (0, 1) if read > 1 else (0,):
        with torch.inference_mode():
            _, state = conditioner.start(context, len(y))
            if first:
                _, state = conditioner.extend(y[:, :first], state)
            state = conditioner.reorder(state, torch.arange(len(y), device=y.device))
        if "MADE" in conditioner_name or conditioner_name == "Angles":
            with pytest.raises(RuntimeError, match="Expected extend to run in the grad mode of start"):
                conditioner.extend(y[:, first:-1], state)
            continue
        phi, _ = conditioner.extend(y[:, first:-1], state)
        torch.testing.assert_close(phi, conditioner(y, context)[:, first + 1 :], rtol=1e-9, atol=1e-9)
        scale = torch.ones((), dtype=phi.dtype, device=phi.device, requires_grad=True)
        conditioner.zero_grad()
        (scale * phi).sum().backward()
        assert torch.isclose(scale.grad, phi.detach().sum())
        assert conditioner_name.startswith("Independent") or any(
            p.grad is not None and p.grad.abs().max() > 1e-9 for p in conditioner.parameters()
        )


def test_context_use(conditioner, padded):
    testing.context_use(conditioner, padded=padded)


@pytest.mark.parametrize("conditioner_name", registry.REAL_SITES)
def test_sequential_gradient(conditioner):
    head = heads.Affine(conditioner.site).to(next(conditioner.parameters()))
    testing.sequential_gradient(conditioner, head)


class ReadsItself(RunningSum):
    def forward(self, y, context=None):
        return super().forward(y, context) + y.unsqueeze(-1)


class Blind(RunningSum):
    def extend(self, y, state):
        return super().extend(torch.zeros_like(y), state)


def masked_once():
    net = built(MADE(4, 2, hidden=(8,)))
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(layer.mask)
            layer.mask.fill_(1)
    return net


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            lambda: built(ReadsItself(2)),
            r"causality broken \[as given, site 0\]: changes the parameters of site 0 by 1.7, which must be 0",
        ),
        (
            lambda: built(Blind(2)),
            r"causality broken \[as given, site 0\]: changes the parameters of site 1 by 0, which must not be 0",
        ),
        (masked_once, r"causality broken \[noise for weights, site \d\]: changes .* which must be 0"),
    ],
)
def test_causality_has_power(net, message):
    with pytest.raises(AssertionError, match=message):
        testing.causality(net())


class Restarts(RunningSum):
    def extend(self, y, state):
        return super().extend(y, state._replace(total=0 * state.total))


class NoGradient(RunningSum):
    def extend(self, y, state):
        if torch.is_grad_enabled() and y.shape[1] == 1:
            y = y.detach()
        return super().extend(y, state)


class LeansOnChunk(MADE):
    def start(self, context, batch_size):
        self.read = []
        return super().start(context, batch_size)

    def extend(self, y, state):
        self.read.append(y)
        for chunk in self.read[:-1]:
            assert torch.is_grad_enabled() or bool(chunk.any()), "chunks broken: the state leans on what it was given"
        return super().extend(y, state)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: Restarts(2), r"chunks broken \[cut \(1, 1, 1, 1\), without grad\]"),
        (lambda: NoGradient(2), r"chunks broken \[cut \(1, 1, 1, 1\), gradient of input or parameter 0\]"),
        (lambda: LeansOnChunk(4, 2, hidden=(8,)), "leans on what it was given"),
    ],
)
def test_chunks_has_power(net, message):
    with pytest.raises(AssertionError, match=message):
        testing.chunks(built(net()))


class OtherRows(RunningSum):
    def reorder(self, state, index):
        return super().reorder(state, index.flip(0))


class Endless(RunningSum):
    @staticmethod
    def advance(state, sites):
        return state._replace(position=state.position + sites)


class Broadcasts(RunningSum):
    def extend(self, y, state):
        return super().extend(y.expand(len(state.total), -1), state)


def test_states_have_power():
    with pytest.raises(AssertionError, match=r"reorder broken \[first branch after 1 sites, grad False\]"):
        testing.reorder(built(OtherRows(2)))
    with pytest.raises(
        AssertionError, match=r"consumption broken \[extend again, grad False\]: no error; expected RuntimeError"
    ):
        testing.consumption(built(Endless(2)))
    with pytest.raises(
        AssertionError, match=r"consumption broken \[1 rows after 6, grad False\]: no error; expected ValueError"
    ):
        testing.consumption(built(Broadcasts(2)))


class ContextLater(RunningSum):
    def start(self, context, batch_size):
        return super().start(torch.zeros_like(context), batch_size)[0], super().start(context, batch_size)[1]


class Linear(MADE):
    def forward(self, y, context=None):
        return super().forward(y, torch.zeros_like(context)) + context.sum(1)[:, None, None]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            lambda: ContextLater(2, context=2),
            r"context use broken \[feature 0\]: changes site 0 by 0, which must not be 0",
        ),
        (
            lambda: Linear(3, 2, context=2),
            r"context use broken \[non-linearity\]: site \d bends by .*, which must not be 0",
        ),
    ],
)
def test_context_use_has_power(net, message):
    with pytest.raises(AssertionError, match=message):
        testing.context_use(built(net()))


class WrongSweep(MADE):
    def adjoint(self, *args):
        a, of_context, pairs = super().adjoint(*args)
        return a, of_context, [(p, 1.001 * grad) for p, grad in pairs]


def test_sequential_gradient_has_power():
    with pytest.raises(AssertionError, match=r"sequential gradient broken \[of x, input or parameter \d\]"):
        testing.sequential_gradient(built(WrongSweep(4, 2, hidden=(8,))), heads.Affine().double())
