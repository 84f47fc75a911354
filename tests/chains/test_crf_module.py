"""gx.CRF: it learns, keeps to its constraints, reads any context, and is an ordinary module."""

import copy
import io

import pyro
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import pyro_genexact as gx
from pyro_genexact.testing import redraw
from support.values import sized

V, C, N = 3, 2, 6
ALLOWED = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]]).bool()
FIRST, LAST = torch.tensor([True, True, False]), torch.tensor([False, True, True])
LENGTHS = torch.tensor([6, 1, 4, 0, 2, 6, 3])


class Reader(nn.Module):
    """A recurrent network in both directions."""

    def __init__(self):
        super().__init__()
        self.net, self.out = nn.GRU(C, 4, batch_first=True, bidirectional=True), nn.Linear(8, V)

    def forward(self, context):
        return self.out(self.net(context)[0])


CONTEXTS = {
    "width": lambda: C,
    "linear": lambda: nn.Linear(C, V),
    "sequential": lambda: nn.Sequential(nn.Linear(C, 5), nn.Tanh(), nn.Linear(5, V)),
    "recurrent": Reader,
}


def model(context="width", seed=0, **options):
    return redraw(gx.CRF(V, CONTEXTS[context](), **options).double(), seed)


def constrained(context="width"):
    return model(context, allowed=ALLOWED, allowed_initial=FIRST, allowed_final=LAST)


@pytest.fixture(params=CONTEXTS)
def kind(request):
    return request.param


def data(rows=1000):
    """Contexts, ragged lengths, and labels of a known CRF."""
    truth = constrained()
    lengths = torch.randint(0, N + 1, (rows,), generator=torch.Generator().manual_seed(1))
    context = sized(rows, N, C, seed=2)
    with torch.no_grad():
        labels = truth(context, lengths).sample()
    labels = labels.masked_fill(torch.arange(N) >= lengths.unsqueeze(-1), -100)  # as tokenisers mark padding
    return truth, {"context": context, "lengths": lengths}, labels


def best_of(module, context, labels):
    """The maximum of the likelihood, which is concave in the parameters, by L-BFGS to convergence."""
    module = copy.deepcopy(module)
    search = torch.optim.LBFGS(module.parameters(), max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        value = -module(**context).log_prob(labels).mean()
        value.backward()
        return value

    search.step(loss)
    return -loss().item()


def test_fit_reaches_the_optimum():
    truth, context, labels = data()
    learner = gx.CRF(V, C, allowed=ALLOWED, allowed_initial=FIRST, allowed_final=LAST).double()
    best = best_of(learner, context, labels)
    gx.fit(learner, labels, context, epochs=25, batch_size=100, lr=0.05, progress=False)
    with torch.no_grad():
        reached, known = (m(**context).log_prob(labels) for m in (learner, truth))
        assert best - 2e-4 < reached.mean() < best + 1e-9
        # the optimum beats the truth by about (free parameters) / 2 over all rows
        assert 0 < best - known.mean() < 30 / len(labels)
        fresh = sized(2000, N, C, seed=3)
        of_truth, found = truth(fresh), learner(fresh)
        assert torch.distributions.kl_divergence(of_truth, found).mean() < 0.03


def test_context_of_words():
    """Any module, of whatever context."""
    module = redraw(gx.CRF(V, nn.Embedding(5, V)).double())
    words = torch.tensor([[0, 4, 2], [1, 1, 1]])
    crf = module(words, torch.tensor([3, 2]))
    assert torch.equal(crf.unary, module.emissions.weight[words])
    grads = torch.autograd.grad(crf.log_prob(crf.mode).sum(), module.emissions.weight)[0]
    assert (grads[[0, 1, 2, 4]] != 0).any(-1).all() and (grads[3] == 0).all()


def test_constraints_hold(kind):
    crf = constrained(kind)(sized(len(LENGTHS), N, C), LENGTHS)
    assert_legal(crf.sample((200,)), LENGTHS)
    assert_legal(crf.mode, LENGTHS)
    strings, log_prob = crf.k_best(20)
    for rank, row in (log_prob > -torch.inf).nonzero().tolist():
        assert_legal(strings[rank, row], LENGTHS[row])
    illegal = torch.tensor([[2, 0, 1, 0, 1, 1], [1, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0]])
    whole = constrained(kind)(sized(3, N, C))
    assert (whole.log_prob(illegal) == -torch.inf).all()
    pairs = whole.pair_marginals
    assert (pairs[..., ~ALLOWED] == 0).all() and (pairs[:, 1:-1, ALLOWED] > 0).all()
    assert (whole.marginals[:, 0, ~FIRST] == 0).all() and (whole.marginals[:, -1, ~LAST] == 0).all()


def assert_legal(labels, lengths):
    site = torch.arange(N)
    inside = site < lengths.unsqueeze(-1)
    steps = ALLOWED[labels[..., :-1], labels[..., 1:]] | ~inside[..., 1:]
    assert steps.all() and (labels.masked_fill(inside, 0) == 0).all()
    assert (FIRST[labels[..., 0]] | (lengths == 0)).all()
    assert (LAST[labels] | (site != lengths.unsqueeze(-1) - 1)).all()


def test_forbidden_entries_get_no_gradient_and_stay():
    module = constrained()
    before = copy.deepcopy(module.state_dict())
    context, lengths = sized(len(LENGTHS), N, C), LENGTHS
    search = torch.optim.Adam(module.parameters(), 0.1)
    for query in (
        lambda crf: crf.log_prob(crf.sample()),
        lambda crf: crf.entropy(),
        lambda crf: crf.marginals.square().sum((-1, -2)),
        lambda crf: crf.k_best(2)[1][0],
    ):
        search.zero_grad()
        query(module(context, lengths)).sum().backward()
        for name, allowed in (("transition", ALLOWED), ("initial", FIRST), ("final", LAST)):
            found = getattr(module, name).grad
            assert found.isfinite().all() and (found[~allowed] == 0).all() and (found[allowed] != 0).any(), name
        search.step()
    for name, allowed in (("transition", ALLOWED), ("initial", FIRST), ("final", LAST)):
        now = getattr(module, name).detach()
        assert torch.equal(now[~allowed], before[name][~allowed]) and not torch.equal(now, before[name])


def test_state_dict(kind):
    module, other = constrained(kind), redraw(constrained(kind), seed=5)
    other.allowed.fill_(True)
    context, file = sized(3, N, C), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(context).log_partition, module(context).log_partition)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(context).log_partition, module(context).log_partition)


def test_copies_and_dtypes(kind):
    module, context = constrained(kind).float(), sized(3, N, C)
    single = module(context.float())
    assert single.log_partition.dtype == single.marginals.dtype == torch.float32
    double = copy.deepcopy(module).double()
    assert module.transition.dtype == torch.float32 and double.allowed.dtype == torch.bool
    crf = double(context)
    assert crf.log_partition.dtype == torch.float64
    torch.testing.assert_close(crf.log_partition.float(), single.log_partition, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for p in double.parameters():
            p.add_(1.0)
    assert torch.equal(module(context.float()).log_partition, single.log_partition)


def test_functional_call_and_torch_func(kind):
    module, context = constrained(kind), sized(4, N, C)
    crf = module(context)
    labels = crf.sample()
    weights = {name: p.detach() for name, p in module.named_parameters()}
    moved = {name: p + 0.1 * sized(*p.shape, seed=4) for name, p in weights.items()}
    other = copy.deepcopy(module)
    other.load_state_dict({**module.state_dict(), **moved})
    found = functional_call(module, moved, (context,)).log_prob(labels)
    torch.testing.assert_close(found, other(context).log_prob(labels))
    assert not torch.allclose(found, crf.log_prob(labels))

    def log_prob(weights, context, labels):
        return functional_call(module, weights, (context,)).log_prob(labels)

    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(crf.log_prob(labels).sum(), list(parameters.values()))
    found = grad(lambda w: log_prob(w, context, labels).sum())(weights)
    rows = None
    if kind != "recurrent":  # torch's has no rule for vmap
        with pyro.validation_enabled(False):  # which would look at values
            rows = vmap(grad(log_prob), (None, 0, 0))(weights, context, labels)
    for name, of_autograd in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], of_autograd)
        if rows is not None:
            torch.testing.assert_close(rows[name].sum(0), of_autograd)


QUERIES = {
    "log_partition": lambda crf: crf.log_partition,
    "log_prob": lambda crf: crf.log_prob(torch.zeros(N).long() + 1),
    "marginals": lambda crf: crf.marginals,
    "pair_marginals": lambda crf: crf.pair_marginals,
    "mode": lambda crf: crf.mode,
    "entropy": lambda crf: crf.entropy(),
    "k_best": lambda crf: crf.k_best(3)[1].movedim(0, -1),
}


@pytest.mark.parametrize("query", QUERIES)
def test_batch_is_row_by_row(query):
    module, context = model(), sized(len(LENGTHS), N, C)
    whole = QUERIES[query](module(context, LENGTHS))
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(QUERIES[query](module(context[row], LENGTHS[row])), whole[row])


def test_ragged_rows_are_shorter_rows():
    """As if the padding were not there, whatever it holds; of a module that reads each site for itself."""
    module, context = model("sequential"), sized(len(LENGTHS), N, C)
    gone = torch.arange(N) >= LENGTHS.unsqueeze(-1)
    context[gone] = torch.nan
    crf = module(context, LENGTHS)
    labels = crf.sample()
    grads = torch.autograd.grad(crf.log_prob(labels).sum(), module.transition, retain_graph=True)[0]
    summed = torch.zeros_like(grads)
    for row, n in enumerate(LENGTHS.tolist()):
        if n:
            alone = module(context[row, :n])
            torch.testing.assert_close(alone.log_prob(labels[row, :n]), crf.log_prob(labels)[row])
            torch.testing.assert_close(alone.marginals, crf.marginals[row, :n])
            summed += torch.autograd.grad(alone.log_prob(labels[row, :n]), module.transition)[0]
        assert crf.log_prob(labels.masked_fill(gone, -100))[row] == crf.log_prob(labels)[row]
    torch.testing.assert_close(grads, summed)


def test_batch_shapes_and_names():
    module, context = model(), sized(2, 4, N, C)
    crf = module.condition(context, lengths=LENGTHS[:4])
    assert crf.batch_shape == (2, 4) and crf.event_shape == (N,) and crf.num_labels == V
    assert torch.equal(module(context=context, lengths=LENGTHS[:4]).log_partition, crf.log_partition)
    assert module.context == gx.Covariates(C) and gx.CRF(V, nn.Linear(C, V)).context == 0


def test_starts_as_independent_labels():
    module = gx.CRF(V, C)
    crf, context = module(torch.ones(2, N, C)), torch.ones(2, N, C)
    torch.testing.assert_close(crf.marginals, module.emissions(context).softmax(-1))


def test_learns_a_recurrent_network():
    """Labels that tell the sign of the number before, which no network of a site alone can know."""
    context = sized(200, N, C, seed=7).float()
    labels = (context[:, :, 0].roll(1, 1) > 0).long()
    labels[:, 0] = 2
    nats = {}
    for kind in ("sequential", "recurrent"):
        torch.manual_seed(0)
        module = gx.CRF(V, CONTEXTS[kind]())
        gx.fit(module, labels, {"context": context}, epochs=20, batch_size=50, lr=0.05, progress=False)
        nats[kind] = module(context).log_prob(labels).mean().item()
    assert nats["recurrent"] > -1.0 > -3.0 > nats["sequential"] > -4.0, nats
