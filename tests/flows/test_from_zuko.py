"""Zuko's flows as Pyro distributions: the same densities, right gradients, and all that ``ZukoToPyro`` breaks."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from torch import nn

import pyro_genexact as gx
from pyro_genexact import testing
from pyro_genexact.testing import redraw
from support.checks import close
from support.values import F64
from support.zuko_flows import FLOWS, SMALL, F, given, make

flows = pytest.mark.parametrize("name", FLOWS)
contexts = pytest.mark.parametrize("C", [0, 2])
QUICK = ("MAF", "NSF", "NAF", "BPF", "NICE")


def called(flow, c):
    return flow() if c is None else flow(c)


# Zuko's numbers


@flows
@contexts
@pytest.mark.parametrize("D", [1, 3])
def test_densities_are_zukos(name, C, D):
    module, flow = make(name, D, C)
    c, y = given(C), torch.randn(3, D, dtype=F64)
    assert flow.context == C
    d = called(flow, c)
    assert d.event_shape == (D,) and d.batch_shape == ((3,) if C else ())
    with (
        pytest.warns(UserWarning, match="does not define")
        if torch.distributions.Distribution._validate_args
        else nullcontext()
    ):
        expected = module(c).log_prob(y)
    close(d.log_prob(y), expected, 1e-12)


@flows
@contexts
def test_samples_are_exact(name, C):
    """The noise of a sample, found by the forward pass, is the noise that was drawn: to rounding, not to 1e-6."""
    _, flow = make(name, 2, C)
    d = called(flow, given(C))
    torch.manual_seed(5)
    with torch.no_grad():
        y = d.sample((20,))
        torch.manual_seed(5)
        x = d.base_dist.sample((20,))
        close(
            called(flow, d.transforms[0].parts[0].context).transforms[0].inv(y.clone()),
            x,
            1e-8 if name == "CNF" else 1e-10,
        )


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "CNF"])
@contexts
def test_gradients_of_samples(name, C):
    """Implicit, in all parameters and the context, in train and eval: those of finite differences."""
    _, flow = make(name, 2, C)
    c = given(C)
    if C:
        c = nn.Parameter(c)
    parameters = [*flow.named_parameters(), *([("context", c)] if C else [])]

    def total():
        torch.manual_seed(3)
        d = called(flow, c)
        y = d.rsample((2,))
        return y.sin().sum() + d.log_prob(y).cos().sum()

    for training in (True, False):
        flow.train(training)
        grads = torch.autograd.grad(total(), [p for _, p in parameters], allow_unused=True, materialize_grads=True)
        for (label, p), g in zip(parameters, grads, strict=True):
            step, start = torch.randn_like(p), p.detach().clone()
            with torch.no_grad():
                ends = [(p.copy_(start + h * step), total())[1] for h in (1e-6, -1e-6)]
                p.copy_(start)
            assert (g * step).sum().item() == pytest.approx(((ends[0] - ends[1]) / 2e-6).item(), rel=1e-4, abs=1e-5), (
                label
            )


@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_log_prob_in_eval(name):
    """Zuko drops those of its monotone networks there."""
    _, flow = make(name, 2)
    y, grads = torch.randn(4, 2, dtype=F64), []
    for training in (True, False):
        flow.train(training)
        grads.append(torch.autograd.grad(flow().log_prob(y).sum(), [*flow.parameters()], allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-9)
    flow.eval()
    flow()
    assert not any(part.training for part in flow.modules())  # the user's module stays as it is


@pytest.mark.parametrize("name", ["MAF", "NSF", "NAF", "BPF", "NICE", "GF"])
def test_second_derivatives_of_samples(name):
    """By the noise, against autograd's Jacobian of autograd's gradient by differences."""
    _, flow = make(name, 2)
    x = torch.randn(2, dtype=F64)
    total = lambda x: flow().transforms[0](x).sin().sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian(total, x)
    step, h = torch.randn(2, dtype=F64), 1e-5
    ends = [torch.autograd.functional.jacobian(total, x + s * step) for s in (h, -h)]
    close(hessian @ step, (ends[0] - ends[1]) / (2 * h), 1e-4)


@flows
def test_second_derivatives_of_log_prob(name):
    """Those of zuko's integrals and equations would be zero without a word."""
    _, flow = make(name, 2)
    y, leaf = torch.randn(2, dtype=F64), next(flow.parameters())
    of_parameters = torch.autograd.grad(flow().log_prob(y), leaf, create_graph=True)[0].sum()
    if name not in ("UNAF", "SOSPF", "CNF"):
        step, h = torch.randn(2, dtype=F64), 1e-5
        ends = [torch.autograd.functional.jacobian(flow().log_prob, y + s * step) for s in (h, -h)]
        hessian = torch.autograd.functional.hessian(flow().log_prob, y)
        return close(hessian @ step, (ends[0] - ends[1]) / (2 * h), 1e-5)
    text = "Second derivatives are not available for integrals and differential equations of zuko's flows."
    for f in (flow().log_prob, flow().transforms[0], flow().transforms[0].inv):
        with pytest.raises(RuntimeError, match=text):
            torch.autograd.functional.hessian(lambda v, f=f: f(v).sum(), y)
    with pytest.raises(RuntimeError, match=text):
        torch.autograd.grad(of_parameters, leaf)


# What ZukoToPyro breaks


@pytest.mark.parametrize("name", QUICK)
@contexts
def test_laws_of_distributions(name, C):
    _, flow = make(name, 2, C, 1.0)
    c = given(C)
    for law in (testing.shapes, testing.support, testing.agreement, testing.freshness):
        law(flow, c)


@pytest.mark.parametrize("name", ["MAF", "NSF", "NAF"])
def test_laws_of_transforms(name):
    _, flow = make(name, 2, 2, 1.0)
    c = given(2)
    t = flow(c).transforms[0]
    x = torch.randn(3, 2, dtype=F64)
    assert t.inv.inv is t and t.forward_shape((2,)) == (3, 2)
    y = t(x)
    assert t(x) is y and t.inv(y) is x  # remembered, by identity
    assert t(x.clone()) is not y
    close(t.inv(y.clone()), x)


def test_no_leak():
    """ZukoToPyro keeps every sample that it drew."""
    _, flow = make("MAF", 2)
    d, seen = flow(), []
    for _ in range(5):
        y = d.rsample()
        d.log_prob(y)
        seen.append(weakref.ref(y))
    del y
    gc.collect()
    assert sum(ref() is not None for ref in seen) <= 1


def test_a_transform_that_remembers_a_graph_is_freed():
    _, flow = make("MAF", 2)
    t = flow.transforms[0]()
    t(torch.zeros(3, 2, dtype=torch.float64))
    t, seen = None, weakref.ref(t)
    gc.collect()
    assert seen() is None


def test_never_stale():
    module, flow = make("MAF", 2)
    y = flow().rsample().detach()
    before = flow().log_prob(y)
    with torch.no_grad():
        for p in module.parameters():  # they are the flow's
            p.mul_(1.5)
    after = flow().log_prob(y)
    assert (before - after).abs() > 1e-4
    close(after, copy.deepcopy(flow)().log_prob(y.clone()), 1e-12)


@pytest.mark.parametrize("name", ["MAF", "NSF", "NAF", "CNF"])
def test_copies(name):
    _, flow = make(name, 2, 2)
    c, y = given(2), torch.randn(3, 2, dtype=F64)
    d = flow(c)
    expected = d.log_prob(y)
    for again in (copy.deepcopy(flow)(c), pickle.loads(pickle.dumps(flow))(c), copy.deepcopy(d)):
        close(again.log_prob(y), expected, 1e-12)
    other = gx.flows.from_zuko(FLOWS[name](2, 2).double())
    other.load_state_dict(flow.state_dict())
    close(other(c).log_prob(y), expected, 1e-12)


def test_rows_have_noise_of_their_own_and_expand():
    _, flow = make("NSF", 2, 2)
    d = flow(torch.zeros(4, 2, dtype=F64))
    assert d.rsample()[:, 0].unique().numel() == 4
    wide = d.expand([3, 4])
    assert wide.sample((5,)).shape == (5, 3, 4, 2) and wide.sample().flatten()[::2].unique().numel() == 12
    assert wide.log_prob(torch.zeros(2, dtype=F64)).shape == (3, 4) and d.batch_shape == (4,)
    assert d.support.event_dim == 1 and not d.support.check(torch.tensor([0.0, float("inf")], dtype=F64))


def test_fit_trains_zukos_parameters():
    module = F.NSF(2, 1, **SMALL)
    flow = gx.flows.from_zuko(module)
    x = torch.rand(500, 1)
    y = torch.cat([x, -x], 1) + 0.1 * torch.randn(500, 2)
    before = {name: p.clone() for name, p in module.named_parameters()}
    start = flow(x).log_prob(y).mean().item()
    gx.fit(flow, y, x, epochs=5, batch_size=50, lr=1e-2, progress=False)
    assert flow(x).log_prob(y).mean().item() > start + 1.0
    assert all((p != before[name]).any() for name, p in module.named_parameters())


def test_svi_in_a_subsampled_plate_and_predictive():
    _, flow = make("NSF", 2, 1)
    c = torch.randn(20, 1, dtype=F64)
    y = torch.cat([c, -c], 1)

    def model(y=None):
        pyro.module("flow", flow)
        with pyro.plate("data", 20, subsample_size=10) as i:
            return pyro.sample("y", flow(c[i]), obs=None if y is None else y[i])

    pyro.clear_param_store()
    svi = SVI(model, lambda y=None: None, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    first = sum(svi.step(y) for _ in range(5))
    for _ in range(50):
        svi.step(y)
    assert sum(svi.step(y) for _ in range(5)) < first
    assert Predictive(model, num_samples=3)()["y"].shape == (3, 10, 2)
    pyro.clear_param_store()


def test_nuts():
    """A zuko flow as a prior: its samples have the moments of the flow's own."""
    _, flow = make("MAF", 2)
    flow.requires_grad_(False)

    def model():
        pyro.sample("z", flow())

    mcmc = MCMC(NUTS(model, jit_compile=False), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    z, exact = mcmc.get_samples()["z"], flow().sample((3000,))
    assert ((z.mean(0) - exact.mean(0)) / exact.std(0)).abs().max() < 0.4


def test_it_is_a_flow_among_others():
    """As one side of a mixture of Pyro's, in a univariate flow, and with another base's context."""
    one = gx.flows.univariate(lambda features, context: gx.flows.from_zuko(F.NSF(features, context, **SMALL)), 2)
    d = one(torch.randn(3, 2))
    u = torch.tensor([0.1, 0.5, 0.9])
    close(d.cdf(d.icdf(u)), u, 1e-4)


# Errors


def test_errors():
    text = r"Expected module to be a zuko\.flows\.Flow \(a module with transform and base\); got {}\."
    for wrong, kind in (
        (nn.Linear(2, 2), "Linear"),
        ("MAF", "str"),
        (F.MAF(2)(), "NormalizingFlow"),
        (dist.Normal(0.0, 1.0), "Normal"),
    ):
        with pytest.raises(TypeError, match=text.format(kind)):
            gx.flows.from_zuko(wrong)
    with pytest.raises(ValueError, match=r"Expected context == 2 \(the context of zuko's layers\); got 3\."):
        gx.flows.from_zuko(F.MAF(3, 2), context=3)
    with pytest.raises(
        ValueError, match=r"Expected module\.base to be over all real vectors; got BoxUniform over Interval"
    ):
        gx.flows.from_zuko(F.NCSF(2))
    with pytest.raises(ValueError, match="Expected no context"):
        gx.flows.from_zuko(F.MAF(3))(torch.zeros(2))
    with pytest.raises(ValueError, match="Expected a context"):
        gx.flows.from_zuko(F.MAF(3, 2))()
    assert gx.flows.from_zuko(F.MAF(3, 2), context=2).context == 2


def test_random_log_densities():
    with pytest.raises(
        ValueError, match=r"Expected exact=True \(otherwise log-densities are random.*; got exact=False"
    ):
        gx.flows.from_zuko(F.CNF(2, exact=False))
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(6)):
        module = F.MAF(2, **SMALL)
        module.transform.transforms[0].hyper.insert(1, layer)
        flow = gx.flows.from_zuko(module)
        text = (
            rf"Expected deterministic layers; got {type(layer).__name__} in training mode at transform\.transforms\.0"
        )
        with pytest.raises(ValueError, match=text):
            flow()
        flow.eval()
        y = torch.randn(4, 2)
        close(flow().log_prob(y), flow().log_prob(y))


def test_mixtures():
    base = r"Expected module\.base to be over all real vectors; got Mixture, which has no support\."
    module = F.Flow([F.MaskedAutoregressiveTransform(2, 0)], F.GMM(2))
    with pytest.raises(ValueError, match=base):
        gx.flows.from_zuko(module)
    with pytest.raises(TypeError, match=r"\(a module with transform and base\); got GMM\."):
        gx.flows.from_zuko(F.GMM(2))


def test_dtypes():
    flow, wrong = gx.flows.from_zuko(F.MAF(2)), torch.zeros(2, dtype=F64)
    text = r"Expected value\.dtype == torch\.float32 \(that of the parameters\); got torch\.float64\."
    for call in (flow().log_prob, flow().transforms[0]):
        with pytest.raises(ValueError, match=text):
            call(wrong)


def test_context_of_layers_of_ones_own():
    """Whose width can't be known: given as an argument."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, c=None):
            return dist.transforms.AffineTransform(self.linear(c), 2.0, event_dim=1)

    module = nn.Module()
    module.transform, module.base = Shifted(), F.MAF(3).base
    flow = redraw(gx.flows.from_zuko(module, context=2).double())
    c, y = torch.randn(4, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
    expected = dist.Normal(0.0, 1.0).log_prob(module.transform(c)(y)).sum(-1) + 3 * torch.tensor(2.0).log()
    close(flow(c).log_prob(y), expected, 1e-6)
    with torch.no_grad():
        close(flow(c).sample((4000,)).mean(0), -module.transform.linear(c) / 2, 0.05)


@pytest.mark.parametrize("name", FLOWS)
def test_empty_batches(name):
    _, flow = make(name, 3, 2)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    for context, shape, batch in ((torch.zeros(4, 2), (0,), (0, 4)), (torch.zeros(0, 2), (5,), (5, 0))):
        d = flow(context.double())
        y = d.rsample(shape)
        lp = d.log_prob(y.detach())
        assert y.shape == (*batch, 3) and lp.shape == batch
        grads = torch.autograd.grad(lp.sum(), parameters, allow_unused=True)
        assert all(g is None or not g.any() for g in grads) and any(g is not None for g in grads)
