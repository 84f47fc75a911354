"""Flows over sequences of varying length: laws, copies, vmap, plates, guides, fits."""

from __future__ import annotations

import copy
import pickle
from math import nan

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import conditioners, flows, heads, testing, transforms
from support.checks import close
from support.flows_of_lengths import LENGTHS, MASK, context_of, markov, recurrent
from support.registry.transforms import OfPrefixes
from support.values import F64, built, sized

T = 5
# Laws


SUBJECTS = {
    "alone": lambda net: [net.inv],
    "maf": lambda net: [net.inv, transforms.Reverse(), gx.Constant(transforms.ToSupport(constraints.positive, 3))],
    "iaf": lambda net: [transforms.Reverse(), net, transforms.Standardize.from_data(sized(9, 3, seed=2))],
}
NETS = {
    "MADE": lambda: conditioners.MADE(3, 2, hidden=(8,), context=2, activation=torch.tanh),
    "Markov": lambda: conditioners.Markov((), 2, order=2, hidden=(6,), context=gx.Covariates(2), activation=torch.tanh),
    "Recurrent": lambda: conditioners.Recurrent((), 2, hidden=4, context=2),
}


@pytest.mark.parametrize("parts", SUBJECTS)
@pytest.mark.parametrize("net", NETS)
def test_transforms_of_prefixes_are_lawful(parts, net):
    lengths = torch.tensor([2, 3, 1])
    module = transforms.AutoregressiveTransform(NETS[net](), heads.Affine())
    subject = built(OfPrefixes(SUBJECTS[parts](module), lengths))
    x = torch.where(torch.arange(3) < lengths.unsqueeze(1), sized(3, 3), 0.0)
    context = sized(3, 3, 2, seed=1) if isinstance(module.context, gx.Covariates) else sized(3, 2, seed=1)
    testing.inverse(subject, x, context)
    testing.cache(subject, x, context)
    testing.derivatives(subject, x, context)
    testing.conventions(subject, x, context)
    testing.copies(subject, lambda t: t(context)(x))
    t = subject(context)
    with torch.no_grad():
        t(x)
        lengths.sub_(1)
        assert torch.equal(t(x), OfPrefixes(list(subject.parts), lengths)(context)(x))  # nothing stale


def test_lengths_are_those_of_the_call():
    flow = built(flows.maf(T, conditioner=markov))
    lengths, y = LENGTHS.clone(), sized(len(LENGTHS), T)
    d = flow(lengths=lengths)
    expected = flow(lengths=LENGTHS).log_prob(y)
    lengths.fill_(T)
    close(d.log_prob(y), expected, 0.0)


def test_copies_of_flow_and_distribution():
    flow = built(flows.iaf(T, conditioner=recurrent, support=constraints.positive))
    y = sized(len(LENGTHS), T).exp()
    testing.copies(flow, lambda flow: flow(lengths=LENGTHS).log_prob(y))
    with torch.no_grad():
        d = flow(lengths=LENGTHS)
        expected = d.log_prob(y)
        for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            close(other.log_prob(y), expected, 0.0)
            assert other.support.check(torch.where(MASK, y, nan)).all()


def test_vmap_over_lengths():
    flow = built(flows.maf(T, conditioner=markov, support=constraints.positive))
    y = sized(len(LENGTHS), T).exp()

    def score(y, n):
        return flow(lengths=n).log_prob(y)

    previous = torch.distributions.Distribution._validate_args
    with pyro.validation_enabled(False):
        got = torch.func.vmap(torch.func.grad(score))(y, LENGTHS)
    assert torch.distributions.Distribution._validate_args == previous
    y.requires_grad_()
    (expected,) = torch.autograd.grad(flow(lengths=LENGTHS).log_prob(y).sum(), y)
    close(got, expected)


def test_single_precision_stays():
    flow = flows.maf(T, conditioner=markov, support=constraints.positive, standardize=sized(9, T).exp().float())
    d = flow(lengths=LENGTHS)
    y = d.sample()
    assert y.dtype == d.log_prob(y.clone()).dtype == torch.float32


# Pyro and fit


@pytest.mark.parametrize("context", [0, 2])
def test_in_a_plate_with_subsampling(context):
    flow = built(flows.maf(T, context=context, conditioner=recurrent))
    y, c = torch.where(MASK, sized(len(LENGTHS), T), nan), context_of(flow)

    def model(y=None):
        with pyro.plate("data", len(LENGTHS), subsample=torch.tensor([4, 1, 2])) as rows:
            args = () if c is None else (c[rows],)
            return pyro.sample("y", flow(*args, lengths=LENGTHS[rows]), obs=None if y is None else y[rows])

    trace = pyro.poutine.trace(model).get_trace(y)
    expected = flow(c, lengths=LENGTHS).log_prob(y)[[4, 1, 2]].sum() * 2
    close(trace.log_prob_sum(), expected)
    assert (model()[~MASK[[4, 1, 2]]] == 0).all()


def test_as_a_guide():
    """ELBO of an IAF guide over rows of several lengths: that of the present sites alone."""
    q = built(flows.iaf(T, conditioner=markov))

    def model():
        with pyro.plate("rows", len(LENGTHS)):
            sites = dist.Normal(torch.zeros(T, dtype=F64), 1.0).expand([len(LENGTHS), T])
            pyro.sample("z", sites.mask(MASK).to_event(1))

    def guide():
        with pyro.plate("rows", len(LENGTHS)):
            pyro.sample("z", q(lengths=LENGTHS))

    torch.manual_seed(0)
    loss = pyro.infer.Trace_ELBO().loss(model, guide)
    torch.manual_seed(0)
    d = q(lengths=LENGTHS)
    z = d.rsample()
    expected = (d.log_prob(z) - torch.where(MASK, dist.Normal(0.0, 1.0).log_prob(z), 0.0).sum(1)).sum()
    assert loss == pytest.approx(float(expected.detach()))


@pytest.mark.parametrize("context", [0, 1])
def test_fit_finds_the_optimum(context):
    """A random walk of random length: the nats of the true process, which has one step of memory."""
    torch.manual_seed(0)
    lengths, c = torch.randint(0, 4, (600,)), torch.randn(600, 1)
    y = (0.5 * torch.randn(600, 3) + (c if context else 0.0)).cumsum(1)
    y = torch.where(torch.arange(3) < lengths.unsqueeze(1), y, 0.0)
    flow = flows.maf(
        3, context, transforms=1, conditioner=lambda P, C: conditioners.Markov((), P, order=1, hidden=(), context=C)
    )
    given = {"lengths": lengths, **({"context": c} if context else {})}
    gx.fit(flow, y, given, epochs=60, lr=0.03, batch_size=100, progress=False)
    steps = y.diff(dim=1, prepend=torch.zeros(600, 1)) - (c if context else 0.0)
    truth = (
        torch.where(torch.arange(3) < lengths.unsqueeze(1), dist.Normal(0.0, 0.5).log_prob(steps), 0.0).sum(1).mean()
    )
    with torch.no_grad():
        assert abs(flow(**given).log_prob(y).mean() - truth) < 0.02
