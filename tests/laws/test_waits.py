"""No value is read, for which code would wait for a device, except where the table below says why."""

import pyro
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import testing
from pyro_genexact.conditioners import MADE
from pyro_genexact.core.functional import as_on_a_device
from pyro_genexact.testing import conditioner_inputs, made
from pyro_genexact.testing.waits import count_waits
from support import registry
from support.checks import fails, goodness
from support.values import built, sized

ROOT = 12  # per root
INTEGRAL = 2  # per integral: its error, and the number of its panels
ALLOWED = {  # log_prob, training step, sample
    "naf": (0, 0, 4 * ROOT),
    "naf inverse one feature": (2 * ROOT, 2 * ROOT, 0),
    "umnn one feature": (INTEGRAL, INTEGRAL, ROOT + 10 * INTEGRAL),
    "umnn inverse one feature": (ROOT + 10 * INTEGRAL, ROOT + 20 * INTEGRAL, INTEGRAL),
    "sospf": (0, 0, 4 * ROOT),
    "sospf inverse one feature": (2 * ROOT, 2 * ROOT, 0),
    "bpf": (0, 0, 4 * ROOT),
    "bpf inverse one feature": (2 * ROOT, 2 * ROOT, 0),
    "bnaf": (0, 0, 4 * ROOT),
    "bnaf inverse": (2 * ROOT, 2 * ROOT, 0),
    "univariate naf": (0, 0, 2 * ROOT),
    **{
        name: (1, 1, 1) for name in registry.DISTRIBUTIONS if "CRF" in name or "HiddenMarkov" in name
    },  # rows in log space
    **dict.fromkeys(registry.SEQUENCES, (0, 0, 6)),  # whether all have ended, and their rows
}
OF_HEADS = {
    "StudentT": 1,  # torch's constructor copies a number
    "Stable": 1,  # the error of an integral
    "VonMises": 10,  # rejections
    "Stopped angles": 10,
    "EntmaxCategorical searched": 4 * ROOT,  # a root by bisection
}
REASONS = "numerics/", "heads/networks.py", "chains/messages.py", "autoregressive/sequence.py"


@pytest.fixture(autouse=True)
def unvalidated():
    with pyro.validation_enabled(False):
        yield


def package(found):
    """Waits of the package, without those of the registry's own code."""
    return {place: number for place, number in found.items() if "registry/" not in place}


def alike(run):
    """Counts the waits of a run, and checks that the result is the same without values at hand."""
    kept = []
    with testing.helpers.seeded(0):
        expected = run()
    with testing.helpers.seeded(0):
        found = package(count_waits(lambda: kept.append(run())))
    for got, value in zip(testing.helpers.tensors_of(kept[0]), testing.helpers.tensors_of(expected), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-11, equal_nan=True)
    return found


def check(found, allowed):
    assert sum(found.values()) <= allowed, found
    assert all(place.split(" in ")[1].startswith(REASONS) for place in found), found


def test_distribution(distribution_name, distribution):
    if distribution_name in registry.SOLVED_BY_ZUKO:
        pytest.skip("zuko chooses the steps of its solver by values")
    module, context = distribution
    allowed = ALLOWED.get(distribution_name, (0, 0, 0))
    with torch.no_grad():
        y = made(module, context).sample()
        check(alike(lambda: made(module, context).log_prob(y)), allowed[0])
        check(alike(lambda: made(module, context).sample()), allowed[2])

    def step():
        module.zero_grad()
        made(module, context).log_prob(y).sum().backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    check(alike(step), allowed[1])
    if made(module, context).has_rsample:

        def draw():
            module.zero_grad()
            made(module, context).rsample().sum().backward()
            return [p.grad for p in module.parameters() if p.grad is not None]

        check(alike(draw), 2 * allowed[2])


@pytest.mark.parametrize("name", registry.DISTRIBUTION_HEADS)
def test_distribution_head(name, device):
    head = registry.move(built(registry.DISTRIBUTION_HEADS[name]()), device)
    phi = (0.5 * sized(2, 4, head.num_params)).to(device).requires_grad_()
    y = head(phi).sample()

    def step():
        (log_prob := head(phi).log_prob(y)).sum().backward()
        gradient, phi.grad = phi.grad, None
        return log_prob, gradient

    allowed = OF_HEADS.get(name, 0)
    assert sum(alike(step).values()) <= allowed
    assert sum(alike(lambda: head(phi).sample()).values()) <= allowed


def test_transform(transform):
    subject, x, context = transform

    def run():
        t = made(subject, context)
        y = t(x)
        back = t.inv(z := y.clone())
        return y, t.log_abs_det_jacobian(x, y), back, t.inv.log_abs_det_jacobian(z, back)

    check(alike(run), 6 * ROOT)


def test_conditioner(conditioner):
    y, context = conditioner_inputs(conditioner)

    def run():
        phi = conditioner(y, context)
        gradients = torch.autograd.grad(phi.sum(), [*conditioner.parameters()], allow_unused=True)
        with torch.no_grad():
            first, state = conditioner.start(context, len(y))
            rest = [] if y.shape[1] == 1 else [conditioner.extend(y[:, :1], state)[0]]
        return phi, [g for g in gradients if g is not None], first, rest

    check(alike(run), 0)


X = sized(3, 3).requires_grad_()
MASK = X > 0
READS = {
    "item": lambda: X.sum().item(),
    "bool": lambda: bool(MASK.all()),
    "int": lambda: int(X[0, 0]),
    "tolist": X.tolist,
    "cpu": X.cpu,
    "to the host": lambda: X.to("cpu"),
    "numpy": X.detach().numpy,
    "Boolean index": lambda: X[MASK],
    "assignment": lambda: X.detach().clone().__setitem__(MASK, X.detach()[0, 0].repeat(int(MASK.sum()))),
    "nonzero": MASK.nonzero,
    "equal": lambda: torch.equal(X, X),
    "unique": X.unique,
    "repeat_interleave": lambda: X.repeat_interleave(torch.arange(3), 0),
    "from the host": lambda: X.new_tensor(1.0),
    "number of the host": lambda: torch.tensor(1.0, device=X.device),
    "solve": lambda: torch.linalg.solve(X + 3 * torch.eye(3), X),
    "multinomial": lambda: X.exp().multinomial(1),
    "within an operation": lambda: Reads.apply(X),
    "backward": lambda: Reads.apply(X, False).sum().backward(),
}
FREE = {
    "where": lambda: torch.where(MASK, X, 0.0).sum(),
    "filled": lambda: X.detach().clone().__setitem__(MASK, 0.0),
    "on the CPU by design": lambda: torch.randint(3, (), device="cpu").item(),
    "one-hot": lambda: torch.nn.functional.one_hot(torch.arange(3), 3),
    "known length": lambda: X.repeat_interleave(2, 0),
    "backward": lambda: (X**2).sum().backward(),
}


class Reads(torch.autograd.Function):
    """Reads a value in the forward or in the backward pass."""

    @staticmethod
    def forward(ctx, x, now=True):
        return x * bool((x < 100).all()) if now else 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.amax().item(), None


@pytest.mark.parametrize("name", READS)
def test_law_has_power(name):
    with pytest.raises(
        AssertionError, match=r"waits broken \[values are not read\]: \d waits, not 0: .* in .*test_waits.py"
    ):
        testing.waits(READS[name])


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait(name):
    testing.waits(FREE[name])


def test_allowed_number():
    testing.waits(READS["item"], allowed=1)
    assert sum(testing.count_waits(lambda: (READS["item"](), READS["solve"]())).values()) == 2


def flow():
    return built(gx.flows.maf(2, hidden=(8,), transforms=2))


@pytest.mark.parametrize("weight", [torch.nan, torch.inf, 1.0])
def test_overflow_and_weights_that_are_not_finite(weight):
    """Density 0 where a value overflows, and NaN if it does so for the weights."""
    d, y = flow(), torch.tensor([[1e308, -1e308], [torch.nan, 0.0], [0.1, 0.2]], dtype=torch.float64)
    with torch.no_grad():
        for p in d.parameters():
            p.mul_(10)
        next(d.parameters()).view(-1)[0] *= weight
    expected = d().log_prob(y)
    with as_on_a_device():
        got = d().log_prob(y)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_half_lines_and_lists_outside():
    """Values outside a support have density 0 on a device, too."""
    for name, values in registry.OUTSIDE.items():
        module, context = registry.DISTRIBUTIONS[name]()
        y = torch.tensor(values, dtype=torch.float64)
        d = made(module, context)
        if y.dim() < len(d.batch_shape) + len(d.event_shape) or d.batch_shape:
            y = y.unsqueeze(1) if d.batch_shape else y
        expected = d.log_prob(y)
        with as_on_a_device():
            torch.testing.assert_close(made(module, context).log_prob(y), expected, equal_nan=True)


def test_samples_of_parameters_that_are_nan():
    """Discrete samples cannot be NaN: an assertion fails on the device."""
    for head in (h.Bernoulli(), h.Categorical(3)):
        model = built(gx.Autoregressive(MADE(3, head.num_params, hidden=(8,)), head, (3,)))
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)
        fails(ValueError, "not NaN", model().sample)
        with as_on_a_device():
            fails(RuntimeError, "not NaN", model().sample)


def test_filters_that_leave_no_token():
    head, phi = h.Forbid(h.Categorical(2), [0]), torch.tensor([[0.0, -torch.inf]])
    fails(ValueError, "leave tokens with mass", head, phi)
    with as_on_a_device():
        fails(RuntimeError, "leave tokens with mass", head, phi)
        assert head(torch.zeros(1, 2)).probs.tolist() == [[0.0, 1.0]]
        with pyro.validation_enabled(True):
            fails(ValueError, "leave tokens with mass", head, phi)


def test_checks_remain_with_validation():
    """With validation, errors that need a look at values are raised on a device, too."""
    net = built(MADE(3, 2, site=4, hidden=(8,)))
    y = torch.tensor([[0, 4, 1]])
    fails(ValueError, "integers 0 ... 3", net, y)
    with as_on_a_device():
        net(y)
        with pyro.validation_enabled(True):
            fails(ValueError, "integers 0 ... 3", net, y)
            fails(ValueError, "permutation", gx.core.checks.permutation, torch.tensor([0, 0]), 2)


def test_lengths_of_strings_on_a_device():
    """A loop that looks rarely whether all strings have ended draws from the same distribution."""
    model = built(gx.Sequence(gx.conditioners.Independent(40, 1), h.Bernoulli(), 1, 40))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-1.0)
    d = model()
    with as_on_a_device():
        y = d.sample((4000,))
    assert d.support.check(y).all()
    end = torch.tensor(-1.0).sigmoid().double()
    probs = end * (1 - end) ** torch.arange(40)
    assert (
        goodness((y.cumsum(-1) == 0).sum(-1).clamp(max=39), torch.cat([probs[:39], 1 - probs[:39].sum(0, True)])) > 1e-3
    )
    assert sum(count_waits(lambda: d.sample((4000,))).values()) < 20


def test_fit_waits_once_per_step():
    def waits(epochs):
        found = count_waits(lambda: gx.fit(flow(), sized(64, 2), epochs=epochs, batch_size=16, progress=False))
        return sum(found.values())

    assert waits(4) - waits(2) <= 2 * (4 + 2)  # per epoch: 4 steps, the order of the rows and the mean


NEVER = [n for n in registry.DISTRIBUTIONS if n not in ALLOWED and n not in registry.SOLVED_BY_ZUKO]


@pytest.mark.parametrize("name", NEVER if torch.cuda.is_available() else [])
def test_on_a_gpu(name):
    """CUDA raises an error if a call waits."""
    module, context = registry.move(registry.DISTRIBUTIONS[name](), "cuda")
    y = made(module, context).sample()
    try:
        torch.cuda.set_sync_debug_mode("error")
        made(module, context).log_prob(y).sum().backward()
        made(module, context).sample()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_of_a_gpu():
    """torch.compile captures log_prob and its gradients in a CUDA graph."""
    module = flow().to("cuda")
    y = sized(16, 2).to("cuda")

    def step(y):
        module.zero_grad()
        (log_prob := score(y)).sum().backward()
        return log_prob.clone(), *(p.grad.clone() for p in module.parameters())

    def plain(y):
        return module().log_prob(y)

    score = plain
    expected = step(y)
    score = torch.compile(plain, mode="reduce-overhead")
    for _ in range(3):  # warms up, captures, replays
        got = step(y)
    torch.testing.assert_close(got, expected)
