"""Flows against truths that need no flow: exact optima, bases, dtypes, memory."""

from __future__ import annotations

import gc
import io
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from support.checks import close
from support.recipes import maf_and_iaf
from support.values import F64, normal_log_prob, normal_weights

# Exact optima


@maf_and_iaf
def test_first_site_is_a_non_linear_function_of_the_context(recipe):
    """One feature, y ~ N(sin 3 c_1 + c_2 c_3, exp(c_1)^2 / 4): near the true entropy, far below what a linear net can do."""
    c = 2 * torch.rand(2500, 3) - 1

    def truth(c):
        return dist.Normal(torch.sin(3 * c[:, 0]) + c[:, 1] * c[:, 2], 0.5 * c[:, 0].exp())

    y = truth(c).sample()[:, None]
    test = 2 * torch.rand(4000, 3) - 1
    y_test = truth(test).sample()
    best = truth(test).log_prob(y_test).mean().item()

    scores = {}
    for hidden in ((32, 32), ()):
        torch.manual_seed(1)
        flow = recipe(1, context=3, transforms=1, hidden=hidden, activation=torch.tanh)
        gx.fit(flow, y, c, epochs=30, batch_size=125, lr=1e-2, progress=False)
        with torch.no_grad():
            scores[hidden] = flow(test).log_prob(y_test[:, None]).mean().item()
    assert best - 0.06 < scores[32, 32] < best + 0.02
    assert scores[()] < best - 0.15


def test_full_covariance_gaussian_is_found():
    """Without hidden layers one transform is any Gaussian: fit reaches the maximum-likelihood one exactly."""
    size = 4
    mix = torch.randn(size, size, dtype=F64) + 4 * torch.eye(size, dtype=F64)
    rows = torch.randn(400, size, dtype=F64) @ mix.T + torch.arange(1.0, 1.0 + size, dtype=F64)
    mean, cov = rows.mean(0), torch.cov(rows.T, correction=0)
    best = dist.MultivariateNormal(mean, cov).log_prob(rows).mean().item()
    assert best == pytest.approx(-0.5 * (size * (1 + math.log(2 * math.pi)) + torch.logdet(cov).item()))

    flow = gx.flows.maf(size, hidden=(), transforms=1, standardize=rows).double()
    with torch.no_grad():  # log-scales that do not depend on the sites: the Gaussian family itself
        (net,) = (m for m in flow.modules() if isinstance(m, gx.conditioners.MADE))
        net.layers[0].weight[1::2] = 0
    net.layers[0].weight.register_hook(lambda g: torch.cat([g.new_ones(1, 1), g.new_zeros(1, 1)]).repeat(size, 1) * g)
    gx.fit(flow, rows, epochs=600, batch_size=400, lr=0.05, progress=False)
    assert flow().log_prob(rows).mean().item() == pytest.approx(best, abs=1e-6)
    with torch.no_grad():
        # noise = A y + b, so A^T A is the precision
        jacobian = torch.autograd.functional.jacobian(flow().transforms[0].inv, mean)
        close(torch.linalg.inv(jacobian.T @ jacobian), cov, 2e-3)
        close(flow().transforms[0].inv(mean), torch.zeros(size, dtype=F64), 2e-3)
    draws = flow().sample((20000,))
    sd = cov.diagonal().sqrt()
    assert ((draws.mean(0) - mean) / sd).abs().max() < 5 / 20000**0.5
    assert ((torch.cov(draws.T) - cov) / sd / sd[:, None]).abs().max() < 7 / 20000**0.5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("options", [{"hidden": (16, 16)}, {"hidden": ()}, {"hidden": (4,), "direct": True}], ids=str)
def test_a_band_is_a_markov_model(order, options):
    size = 6
    band = torch.ones(size, size).tril(-1).triu(-order).bool()
    net = gx.conditioners.MADE(size, 2, adjacency=band, activation=torch.tanh, **options)
    module = normal_weights(gx.transforms.AutoregressiveTransform(net, gx.heads.Affine()), 1.0)
    flow = gx.Flow([module.inv], dist.Normal(torch.zeros(size, dtype=F64), 1.0).to_event(1))
    y = torch.randn(size, dtype=F64)

    def conditional_scores(y):  # log p(y_t | y_<t), one a site
        t = module()
        x = t(y)
        head = gx.heads.Affine().double()(net(y[None]))
        return -0.5 * x**2 + head.log_abs_det_jacobian(y[None], x[None])[0]

    reads = torch.autograd.functional.jacobian(conditional_scores, y)
    allowed = band | torch.eye(size).bool()
    assert (reads[~allowed] == 0).all() and (reads[allowed] != 0).all()
    close(conditional_scores(y).sum() - size / 2 * math.log(2 * math.pi), flow().log_prob(y))
    # the Hessian of log p couples sites within ``order`` steps alone: a Markov random field
    hessian = torch.autograd.functional.hessian(lambda y: flow().log_prob(y), y)
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    assert hessian[distance > order].abs().max() < 1e-12 < hessian[distance <= order].abs().min()


@maf_and_iaf
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_both_directions_agree_at_784_sites(recipe, dtype, tol):
    flow = recipe(784, transforms=1, hidden=(64, 64)).to(dtype)
    with torch.no_grad():  # log-scales of about 0.5: far from the identity, and stable over 784 sites
        (net,) = (m for m in flow.modules() if isinstance(m, gx.conditioners.MADE))
        net.layers[-1].weight.mul_(10)
        net.layers[-1].bias.normal_(0.0, 0.3)
        x = torch.randn(4, 784, dtype=dtype)
        chain = flow().transforms[0]
        y = chain(x)
        ladj = chain.log_abs_det_jacobian(x, y)
        fresh = flow().transforms[0]  # remembers nothing
        back = fresh.inv(y)
        ladj_back = fresh.log_abs_det_jacobian(back, y)
    scale = 1.0 if dtype is torch.float64 else max(1.0, x.abs().max().item())
    assert (y - x).abs().max() > 0.5
    assert (back - x).abs().max() < tol * scale
    assert (ladj_back - ladj).abs().max() < tol * (1.0 if dtype is torch.float64 else ladj.abs().max().item())


# Bases


@maf_and_iaf
def test_base_distribution(recipe):
    torch.manual_seed(2)
    flow = normal_weights(recipe(3, hidden=(8,), base=dist.Laplace(torch.zeros(3, dtype=F64), 2.0).to_event(1)))
    torch.manual_seed(2)
    normal = normal_weights(recipe(3, hidden=(8,)))
    y = torch.randn(20, 3, dtype=F64)
    x = normal().transforms[0].inv(y)
    ladj = normal().log_prob(y) - normal_log_prob(x)
    close(flow().log_prob(y), -(x.abs() / 2).sum(-1) - 3 * math.log(4.0) + ladj)


class Base(gx.DistributionModule):
    """x ~ N(W c, exp(s)): what the base is depends on the context."""

    context = 2

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(3))

    def forward(self, context=None):
        return dist.Normal(self.linear(context), self.log_scale.exp()).to_event(1)


@maf_and_iaf
@pytest.mark.parametrize("context", [0, 2])
def test_base_module_with_context(recipe, context):
    """Transforms may ignore the context that the base reads."""
    flow = normal_weights(recipe(3, context=context, hidden=(8,), base=Base()))
    assert flow.context == 2
    c, y = torch.randn(20, 2, dtype=F64), torch.randn(20, 3, dtype=F64)
    d = flow(c)
    assert d.batch_shape == (20,) and d.event_shape == (3,)
    x = d.transforms[0].inv(y)
    ladj = torch.stack([torch.autograd.functional.jacobian(flow(row).transforms[0].inv, value).det().abs().log()
                        for row, value in zip(c, y, strict=True)])  # fmt: skip
    s = flow.base.log_scale
    expected = normal_log_prob((x - c @ flow.base.linear.weight.T) / s.exp()) - s.sum() + ladj
    close(d.log_prob(y), expected)
    d.log_prob(y).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.base.parameters())
    draw = flow(c).rsample()
    assert draw.shape == (20, 3)
    (g,) = torch.autograd.grad((draw**2).sum(), flow.base.log_scale)
    assert (g != 0).all()


@maf_and_iaf
def test_the_default_base_follows_the_module(recipe):
    flow = recipe(3, hidden=(8,))
    assert flow().sample().dtype is torch.float32
    for move in (lambda: flow.double(), lambda: flow.to(torch.float32), lambda: flow.to("cpu", torch.float64)):
        moved = move()
        kind = next(moved.parameters()).dtype
        assert moved().sample((2,)).dtype is kind and moved().log_prob(torch.zeros(3, dtype=kind)).dtype is kind
    flow.to("meta")
    assert flow().base_dist.base_dist.loc.device.type == "meta"
    assert flow.to_empty(device="cpu")().base_dist.base_dist.loc.device.type == "cpu"


@maf_and_iaf
def test_double_precision_is_double_precision(recipe):
    """A flow moved to float64 computes what one built in float64 with the same weights does."""
    flow = normal_weights(recipe(3, hidden=(8,), transforms=1), 0.5)
    default = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        other = recipe(3, hidden=(8,), transforms=1)
    finally:
        torch.set_default_dtype(default)
    other.load_state_dict(flow.state_dict())
    y = torch.randn(20, 3, dtype=F64)
    close(flow().log_prob(y), other().log_prob(y), 1e-12)


def test_an_affine_head_is_as_documented_in_float64():
    phi = torch.randn(5, 3, 2, dtype=F64) * 4
    for bound in (7.0, 0.3):
        t = gx.heads.Affine(bound=bound).double()(phi)
        close(t.log_scale, bound * torch.tanh(phi[..., 1] / bound), 1e-14)
        close(t(torch.ones(5, 3, dtype=F64)), t.log_scale.exp() + phi[..., 0], 1e-12)


# Saving


@maf_and_iaf
@pytest.mark.parametrize(
    "support", [None, constraints.simplex, [constraints.positive, constraints.real, constraints.unit_interval]]
)
def test_state_dict_round_trip(recipe, support):
    rows = torch.distributions.Dirichlet(torch.ones(3)).sample((50,))
    options = {"context": 2, "hidden": (8,), "support": support, "standardize": rows}
    flow = recipe(3, **options)
    with torch.no_grad():
        for p in flow.parameters():
            p.normal_()
    flow(torch.zeros(2)).rsample()  # used before
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = recipe(3, **{**options, "standardize": rows.roll(1, 1) ** 0.5 / (rows**0.5).sum(1, keepdim=True)})
    y, c = rows[:10], torch.randn(10, 2)
    before = other(c).log_prob(y)
    other.load_state_dict(torch.load(file, weights_only=True))
    close(other(c).log_prob(y), flow(c).log_prob(y), 0.0)
    assert (before - other(c).log_prob(y)).abs().max() > 1e-3


# Memory


def saved_bytes(size, way):
    flow = gx.flows.maf(size, hidden=(32,), transforms=1)
    seen, total = set(), 0

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        kept.append(storage)  # so that no address is used twice
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = getattr(flow(), way)((64,)) if way == "rsample" else flow().log_prob(torch.randn(64, size))
    out.sum().backward()
    return total


def nodes(size):
    flow = gx.flows.maf(size, hidden=(32,), transforms=1)
    out = flow().rsample((2,))  # kept: nodes die with it
    stack, seen = [out.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
    return len(seen)


def test_memory_of_rsample_is_linear_in_the_sites():
    """A graph of T steps would keep the hidden units of each: here no node is added, and each site costs the same."""
    assert nodes(8) == nodes(64) == nodes(128) < 60
    sizes = [64, 128, 256, 512]
    used = [saved_bytes(size, "rsample") for size in sizes]
    slopes = [(b - a) / (t - s) for a, b, s, t in zip(used, used[1:], sizes, sizes[1:], strict=False)]
    assert max(slopes) < 1.05 * min(slopes)
    # a site: 64 rows of about ten float32 numbers and the weights of its 32 hidden units, 3 matrices each with its mask
    assert min(slopes) > 64 * 4 and max(slopes) < 64 * 4 * 10 + 32 * 4 * 3 * 3


def test_state_kept_for_the_sweep_is_linear_in_the_sites():
    """What the sweep keeps beside autograd's own list: buffers of inputs, hidden units and outputs."""

    def kept(size):
        y = gx.flows.maf(size, hidden=(32,), transforms=1)().rsample((64,))
        node, stack, found = None, [y.grad_fn], []
        while stack:
            node = stack.pop()
            if node is None:
                continue
            found += [node.state] if hasattr(node, "state") else []
            stack += [n for n, _ in node.next_functions]
        (state,) = {id(s): s for s in found}.values()
        tensors = [t for field in (state.weights, state.offsets, state.units) for t in field]
        return sum(s.nbytes() for s in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values())

    small, middle, large = (kept(size) for size in (64, 128, 256))
    assert (large - middle) == pytest.approx(2 * (middle - small), rel=0.05)


@pytest.mark.parametrize("recipe", [gx.flows.maf, gx.flows.iaf, gx.flows.bnaf, gx.flows.coupling_nsf])
def test_a_training_step_leaves_nothing_to_the_garbage_collector(recipe):
    """Graphs are as large as a batch: they are freed when the step ends, not some steps later."""
    flow = recipe(3)
    gc.disable()
    try:
        d = flow()
        d.log_prob(d.rsample((4,))).sum().backward()
        d.log_prob(torch.zeros(4, 3)).sum().backward()
        parts = [part for part in d.transforms[0].parts if not isinstance(part, nn.Module)]
        alive = [weakref.ref(part) for part in (d, *d.transforms, *parts)]
        del d, parts
        assert len(alive) > 4 and not any(part() for part in alive[:-1])
    finally:
        gc.enable()


def test_chain_has_the_sign_of_its_parts():
    falling = dist.transforms.AffineTransform(1.0, -2.0)
    chain = gx.transforms.Chain([gx.transforms.Affine(torch.tensor(1.0), torch.tensor(0.5)), falling])
    assert chain.sign == chain.inv.sign == -1
    d = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [chain])
    expected = dist.Normal(-1.0, 2 * math.exp(0.5)).cdf(torch.tensor(0.3))
    torch.testing.assert_close(d.cdf(torch.tensor(0.3)), expected)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "vmap", "grad"])
def test_a_score_runs_one_direction(mode, monkeypatch):
    """Also where tensors count no versions, or have no storage."""
    flow, calls, kind = gx.flows.maf(3, hidden=(8,)), [], gx.transforms.Chain
    for name in ("_call_and_ladj", "_inverse_and_ladj"):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, v, m=method, n=name: calls.append(n) or m(self, v))
    x = torch.randn(4, 3)
    expected = flow().log_prob(x)
    calls.clear()
    if mode == "vmap":
        with pyro.validation_enabled(False):  # which looks at values in older versions of torch
            got = torch.func.vmap(lambda row: flow().log_prob(row))(x)
    elif mode == "grad":
        got = torch.func.grad_and_value(lambda x: flow().log_prob(x).sum())(x)[1]
        expected = expected.sum()
    else:
        with getattr(torch, mode)():
            got = flow().log_prob(x)
    assert calls == ["_inverse_and_ladj"]
    torch.testing.assert_close(got, expected)


def test_values_edited_in_inference_mode_are_seen():
    flow = gx.flows.maf(3, hidden=(8,))
    with torch.inference_mode():
        d = flow()
        x = d.sample((4,))
        torch.testing.assert_close(d.log_prob(x), flow().log_prob(x.clone()))
        x.mul_(2)
        torch.testing.assert_close(d.log_prob(x), flow().log_prob(x.clone()))


def test_each_score_of_a_value_has_a_graph_of_its_own():
    flow, y = gx.flows.maf(3, hidden=(8,)), torch.randn(4, 3)
    d = flow()
    grads = [torch.autograd.grad(d.log_prob(y).sum(), list(flow.parameters())) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_all_real_vectors_need_no_work():
    t, y = gx.transforms.ToSupport(dist.constraints.real, 3), torch.randn(4, 3)
    x, ladj = t.inv.call_and_ladj(y)
    assert x is y and torch.equal(ladj, torch.zeros(4))
    y[1, 0], y[2, 1] = torch.inf, torch.nan
    x, ladj = t.inv.call_and_ladj(y)
    assert ladj[1] == -torch.inf and ladj[2].isnan() and torch.equal(ladj[[0, 3]], torch.zeros(2))
    assert (x[1:3] == 0).all() and torch.equal(x[[0, 3]], y[[0, 3]])
