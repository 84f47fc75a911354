"""Under autocast networks round to bfloat16, and nothing else does."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import Transform, constraints
from torch.utils._pytree import tree_map

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact.conditioners import MADE, Recurrent
from pyro_genexact.conditioners.site_loop import SiteLoop
from pyro_genexact.core.precision import at_least, full_precision
from pyro_genexact.inference.gaussian import CholeskyAffine
from pyro_genexact.testing import conditioner_inputs, made
from pyro_genexact.testing.helpers import close, finite, gradients_of, same, within
from pyro_genexact.transforms.base import adapted
from support import registry
from support.values import built, sized

ROUNDING = 2**-8  # of bfloat16, relative
NETWORKS = ("network", "net", "emissions")


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def single(value):
    """Modules and tensors in float32."""

    def convert(part):
        return (
            part.float()
            if isinstance(part, nn.Module) or (torch.is_tensor(part) and part.is_floating_point())
            else part
        )

    return tree_map(convert, value)


@pytest.fixture
def exact_networks(monkeypatch):
    """Makes the networks of a module run without autocast, so that what rounds still is none."""

    def patch(module):
        for name, part in module.named_modules():
            if isinstance(part, gx.Conditioner):
                for method in ("forward", "start", "extend"):
                    monkeypatch.setattr(type(part), method, full_precision(getattr(type(part), method)))
            elif name.split(".")[-1] in NETWORKS:
                part.forward = full_precision(part.forward)

    return patch


def found(run):
    """Its tensors, of the same random numbers each time."""
    torch.manual_seed(0)
    return run()


def exact(run, leaves=()):
    """Under autocast it finds the same, to the last digit; so are gradients of the first tensor, taken afterwards."""
    expected = found(run)
    with autocast():
        got = found(run)
    if leaves:
        expected, got = ((*tensors, *gradients_of(tensors[0].sum(), leaves)) for tensors in (expected, got))
    equal(got, expected)


def equal(got, expected):
    """To the last digit, in the same dtypes."""
    for i, (value, other) in enumerate(zip(got, expected, strict=True)):
        same("precision", f"dtype of {i}", value.dtype, other.dtype)
        close("precision", f"value {i}", value, other, 0.0)


def queries(subject, context, y):
    """The log-density of y, samples and their log-density."""
    d = made(subject, context)
    log_prob = d.log_prob(y)
    with torch.no_grad():
        x = d.sample((2,))
    return log_prob, x, d.log_prob(x)


def by_sites(net, y, context):
    """Each site and its parameters."""
    for t, phi in (loop := SiteLoop(net, context, len(y), y.shape[1])):
        yield t, phi
        loop.read(y[:, t : t + 1])


def test_distribution(distribution_name, exact_networks):
    """Networks round, to first order as weights do; without their rounding all is exact."""
    module, context = single(registry.DISTRIBUTIONS[distribution_name]())
    with torch.no_grad():
        y = made(module, context).sample()
    expected, wanted = found(lambda: queries(module, context, y)), [*module.parameters()]
    grads = gradients_of(expected[0].sum(), wanted)
    expected = (*expected, *grads)
    with autocast():
        d = made(module, context)
        with torch.no_grad():  # before the weights are used with gradients, in the same region
            x = d.sample()
        log_prob, of_sample = d.log_prob(y), d.log_prob(x)
    same("precision", "dtype", (log_prob.dtype, of_sample.dtype), (torch.float32,) * 2)
    finite("precision", "log_prob of a sample", of_sample)
    for got, other in zip(gradients_of(log_prob.sum(), wanted), grads, strict=True):
        finite("precision", "gradient", got)
        same("precision", "a gradient", bool(got.any()), bool(other.any()))
    # weights, what they multiply, and the products each round once
    moved = sum((p * grad).abs().sum() for p, grad in zip(wanted, grads, strict=True))
    within("precision", "log_prob", log_prob.sum(), expected[0].sum(), 3 * ROUNDING * moved.detach() + 1e-5)

    exact_networks(module)
    with autocast():
        got = found(lambda: queries(module, context, y))
    equal((*got, *gradients_of(got[0].sum(), wanted)), expected)


@pytest.mark.parametrize(
    "name", ["maf context", "nsf", "coupling_nsf", "bnaf", "glow_vector", "Sequence transformer", "Conditional"]
)
def test_double_stays_double(name):
    module, context = registry.DISTRIBUTIONS[name]()
    with torch.no_grad():
        y = made(module, context).sample()
    exact(lambda: queries(module, context, y), [*module.parameters()])


def test_transform(transform_name, exact_networks):
    subject, x, context = single(registry.TRANSFORMS[transform_name]())
    if isinstance(subject, nn.Module):
        exact_networks(subject)

    def run():
        t = made(subject, context)
        y, ladj = adapted(t).call_and_ladj(x)
        return y, ladj, *adapted(t).inverse_and_ladj(y.detach().clone())

    exact(run)


def test_conditioner(conditioner_name):
    """All at once and site by site, with buffers written in place and without."""
    net = registry.CONDITIONERS[conditioner_name]().float()
    y, context = conditioner_inputs(net)
    with torch.no_grad():
        expected = net(y, context)
    for grad in (False, True):
        with autocast(), torch.set_grad_enabled(grad):
            phi, sites = net(y, context), [site for _, site in by_sites(net, y, context)]
        for got in (phi, torch.cat(sites, 1)):
            within("precision", "phi", got.float(), expected, 16 * ROUNDING * expected.abs().max())


@pytest.mark.parametrize("name", registry.HEADS)
def test_bijection_head(name):
    head = registry.HEADS[name]().float()
    phi, x = single((0.5 * sized(3, 2, head.num_params), sized(3, 2, *head.site_shape, seed=1)))

    def run():
        y, ladj = head(phi).call_and_ladj(x)
        return y, ladj, head(phi).inv(y.clone())

    exact(run)


@pytest.mark.parametrize("name", registry.DISTRIBUTION_HEADS)
def test_distribution_head(name, exact_networks):
    head = built(registry.DISTRIBUTION_HEADS[name]()).float()
    exact_networks(head)
    phi = (0.5 * sized(2, 4, head.num_params)).float()
    with torch.no_grad():
        y = head(phi).sample()
    exact(lambda: (head(phi).log_prob(y), head(phi).sample((3,))))


def covariance(tensor):
    return dist.MultivariateNormal(torch.zeros(2), tensor @ tensor.mT + torch.eye(2))


def test_entropy_of_low_rank():
    head = h.Parametric(dist.LowRankMultivariateNormal, (4,), rank=2)
    phi = single(sized(3, 5, head.num_params))
    exact(lambda: (head(phi).entropy(),))


def test_base_of_vectors():
    module = gx.Flow(
        [gx.transforms.LULinear(2)], dist.LowRankMultivariateNormal(*single((sized(2), sized(2, 1), sized(2).exp())))
    )
    y = single(sized(3, 2))
    exact(lambda: queries(module, None, y), [*module.parameters()])


def test_emissions_of_vectors():
    emissions = covariance(single(sized(3, 2, 2)))
    d = gx.HiddenMarkov(torch.zeros(3), torch.eye(3), emissions.expand((4, 3)))
    exact(lambda: (d.log_prob(x := d.sample((2,))), x))


WEIGHTS = single(sized(5, 6))


@pytest.mark.parametrize(
    "of",
    [
        lambda code: gx.flows.maf(2, context=6, hidden=(4,))(code).log_prob(torch.zeros(2)),
        lambda code: gx.flows.iaf(2, context=6, hidden=(4,))(code).rsample(),
        lambda code: gx.Conditional(nn.Linear(6, 2), h.Normal())(code).log_prob(torch.zeros(())),
        lambda code: gx.LinearChainCRF(code.unflatten(1, (2, 3)), torch.zeros(3, 3)).log_partition,
        lambda code: gx.HiddenMarkov(code, torch.eye(6), dist.Normal(torch.zeros(6), 1.0), duration=2).log_prob(
            torch.ones(2)
        ),
        lambda code: gx.HiddenMarkov(torch.zeros(6), torch.eye(6), dist.Normal(code[:2], 1.0)).log_prob(torch.ones(2)),
        lambda code: gx.Autoregressive(Recurrent((), 2, hidden=4, context=gx.contexts.Source(6)), h.Normal(), (2,))(
            code.unsqueeze(0), source_lengths=torch.tensor([3])
        ).log_prob(torch.zeros(1, 2)),
    ],
)
def test_what_an_encoder_predicts_is_widened(of):
    encoder = nn.Linear(6, 6)
    x = WEIGHTS.requires_grad_(False)
    with autocast():
        code = encoder(x)
        value = of(code)
    assert code.dtype == torch.bfloat16
    assert value.dtype == torch.float32 and value.isfinite().all()
    value.sum().backward()
    assert encoder.weight.grad.isfinite().all()


@pytest.mark.parametrize("recipe", [gx.flows.maf, partial(gx.flows.bnaf, transforms=1)])
def test_gradients_of_samples(recipe):
    """By reverse sweeps, begun under autocast, whether its region has ended or not."""
    flow = built(recipe(3, context=2, hidden=(6,))).float()
    context, wanted = single(sized(4, 2)), [*flow.parameters()]

    def run():
        return flow(context).rsample().square()

    def with_gradients():
        return gradients_of(run().sum(), wanted)

    exact(lambda: (run(),), wanted)
    exact(with_gradients)


class Rounding(MADE):
    """Rounds as under autocast, to a tensor of the given dtype."""

    dtype = torch.float32

    def forward(self, y, context=None):
        return super().forward(y, context).bfloat16().to(self.dtype)

    def start(self, context, batch_size):
        phi, state = super().start(context, batch_size)
        return phi.bfloat16().to(self.dtype), state

    def extend(self, y, state):
        phi, state = super().extend(y, state)
        return phi.bfloat16().to(self.dtype), state


@pytest.mark.parametrize("head", [h.Affine(), h.RationalQuadraticSpline(4)])
def test_heads_compute_in_the_dtype_of_the_values(head):
    """Whatever that of their parameters, in both directions."""
    net = Rounding(3, head.num_params, hidden=(6,))
    t, x = built(gx.transforms.AutoregressiveTransform(net, head)).float(), single(sized(4, 3))
    found = []
    for net.dtype in (torch.bfloat16, torch.float32):
        with torch.no_grad():
            found.append((*t().call_and_ladj(x), *t().inverse_and_ladj(x + 0.1)))
    equal(*found)


def test_matrices_by_themselves():
    modules = gx.transforms.LULinear(3), gx.transforms.Rotation(3), gx.transforms.Householder(3)
    for module in modules:
        built(module).float()
    exact(lambda: [module.weight for module in modules])


class Doubling(Transform):
    """y = 2 x by products of matrices."""

    bijective, domain, codomain = True, constraints.real_vector, constraints.real_vector

    def _call(self, x):
        return x @ (2 * torch.eye(x.shape[-1]))

    def _inverse(self, y):
        return y @ (torch.eye(y.shape[-1]) / 2)

    def log_abs_det_jacobian(self, x, y):
        return (torch.ones_like(x) @ torch.full_like(x, 2).log().mT)[:, 0]


def test_transforms_of_others():
    t, x = adapted(Doubling()), single(sized(3, 2))
    exact(lambda: (t(x), t.inv(x), t.log_abs_det_jacobian(x, x), *t.call_and_ladj(x), *t.inverse_and_ladj(x)))
    chain = gx.transforms.Chain([Doubling(), CholeskyAffine(x[0], torch.eye(2) + x[:2].tril(-1))])
    exact(lambda: (*chain.call_and_ladj(x), *chain.inverse_and_ladj(x)))


class Turned(dist.MultivariateNormal):
    """Multiplies matrices in float32, as a user's family may."""

    def log_prob(self, value):
        return super().log_prob(value) + (value.unsqueeze(-2) @ self.covariance_matrix).sum((-2, -1))


def test_families_of_users():
    head = h.Parametric(Turned, (2,))
    phi = single(sized(3, head.num_params))
    exact(lambda: (head(phi).log_prob(phi[:, :2]),))


def test_precision_has_power():
    t, x = Doubling(), single(sized(3, 2))
    exact(lambda: (full_precision(t)(x),))
    with pytest.raises(AssertionError, match=r"precision broken \[dtype of 0\]: torch.bfloat16"):
        exact(lambda: (t(x),))
    with pytest.raises(AssertionError, match=r"precision broken \[value 0\]"):
        exact(lambda: (at_least(MADE(2, 2)(x), x),))
