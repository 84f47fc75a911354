"""Compiled functions have the same values and gradients; ``compile_all.py`` runs the law on all of the registry."""

import pyro
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import testing
from pyro_genexact.conditioners import MADE
from support.compiled import CASES, SLOW
from support.values import built, sized

# distributions of each kind, those that compile in least time, and the first network, transform and head of each class
MODELS = [
    "distribution maf normal base",
    "distribution nsf",
    "distribution naf",
    "distribution nice",
    "distribution Autoregressive binary",
    "distribution Autoregressive entmax",
    "distribution Autoregressive levels",
    "distribution Autoregressive recurrent",
    "distribution Conditional discrete",
    "distribution HiddenMarkov ragged",
    "distribution CRF",
    "distribution Sequence transformer",
    "distribution Sequence nade",
]
CLASSES = {
    f"{kind} {name.split()[0]}": f"{kind} {name}"
    for kind in ("conditioner", "transform", "head", "distribution head")
    for name in reversed([name for case, (_, name) in CASES.items() if case == f"{kind} {name}" and case not in SLOW])
}
CHOSEN = [*MODELS, *CLASSES.values()]


@pytest.mark.parametrize("case", CHOSEN)
def test_compiled(case):
    law, name = CASES[case]
    law(name)


def test_those_left_out_are_in_the_registry():
    assert set(SLOW) <= set(CASES)


def counted(module, *batches):
    """The number of compilations of log_prob and its gradient, for batches of these sizes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    score = torch.compile(lambda y: module().log_prob(y), backend="aot_eager", fullgraph=True)
    with pyro.validation_enabled(False):
        for i, rows in enumerate(batches):
            y = module().sample((rows,))
            log_prob = score(y)
            torch.testing.assert_close(log_prob, module().log_prob(y), rtol=1e-12, atol=1e-12)
            log_prob.sum().backward()
            with torch.no_grad():
                for p in module.parameters():
                    p.sub_(0.01 * (i + 1) * p.grad)
    found = torch._dynamo.utils.counters["aot_autograd"]["ok"]
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize(
    "module",
    [
        lambda: gx.flows.maf(3, hidden=(6,), transforms=1),
        lambda: gx.Autoregressive(MADE(4, 1, hidden=(6,)), h.Bernoulli(), (4,)),
    ],
)
def test_batches_of_a_size_compile_once_and_other_sizes_once_more(module):
    module = built(module())
    assert counted(module, 5, 5) == 1
    assert counted(module, 5, 7, 5, 9) == 2


class OtherValues(nn.Module):
    def forward(self, x):
        return x * (2.0 if torch.compiler.is_compiling() else 1.0)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return x * (self.weight.detach() if torch.compiler.is_compiling() else self.weight)


@pytest.mark.parametrize(("kind", "message"), [(OtherValues, "tensor 0"), (Detached, "tensor 2")])
def test_compiled_has_power(kind, message):
    module = kind()
    with pytest.raises(AssertionError, match=rf"compiled broken \[{message}"):
        testing.compiled(module, module, sized(4, 3))
