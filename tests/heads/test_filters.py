"""Filters against their definitions, by enumeration of tokens and of sets of them."""

from itertools import combinations

import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import heads, testing
from pyro_genexact.families.mixture import same_constraint
from pyro_genexact.heads import Forbid, MinLength, MinP, Tempered, TopK, TopP
from support.checks import goodness
from support.values import sized

V, INF = 5, torch.inf


def renormalised(p, kept):
    total = sum(float(p[v]) for v in kept)
    return [float(p[v]) / total if v in kept else 0.0 for v in range(len(p))]


def tempered(p, temperature):
    powers = [float(x) ** (1 / temperature) for x in p]
    return [x / sum(powers) for x in powers]


def top_k(p, k):
    return renormalised(p, sorted(range(len(p)), key=lambda v: (-float(p[v]), v))[:k])


def top_p(p, least):
    """Of the smallest sets with enough mass, the one with most mass, and the first of those."""
    for size in range(1, len(p) + 1):
        enough = [s for s in combinations(range(len(p)), size) if sum(float(p[v]) for v in s) >= least]
        if enough:
            return renormalised(p, max(enough, key=lambda s: sum(float(p[v]) for v in s)))
    return list(p)


def min_p(p, share):
    return renormalised(p, [v for v in range(len(p)) if float(p[v]) >= share * float(max(p))])


def forbid(p, tokens):
    return renormalised(p, [v for v in range(len(p)) if v not in tokens])


FILTERS = {
    "Tempered cold": (lambda head: Tempered(head, 0.4), lambda p: tempered(p, 0.4)),
    "Tempered hot": (lambda head: Tempered(head, 3), lambda p: tempered(p, 3)),
    "TopK 1": (lambda head: TopK(head, 1), lambda p: top_k(p, 1)),
    "TopK 3": (lambda head: TopK(head, 3), lambda p: top_k(p, 3)),
    "TopK all": (lambda head: TopK(head, 9), lambda p: top_k(p, 9)),
    "TopP small": (lambda head: TopP(head, 1e-20), lambda p: top_p(p, 1e-20)),
    "TopP half": (lambda head: TopP(head, 0.5), lambda p: top_p(p, 0.5)),
    "TopP most": (lambda head: TopP(head, 0.9), lambda p: top_p(p, 0.9)),
    "TopP all": (lambda head: TopP(head, 1), lambda p: renormalised(p, range(V))),
    "MinP": (lambda head: MinP(head, 0.3), lambda p: min_p(p, 0.3)),
    "MinP best": (lambda head: MinP(head, 1.0), lambda p: min_p(p, 1.0)),
    "Forbid": (lambda head: Forbid(head, [0, 3]), lambda p: forbid(p, [0, 3])),
    "Forbid none": (lambda head: Forbid(head, []), lambda p: forbid(p, [])),
    "MinLength": (lambda head: MinLength(head, 9, eos=2), lambda p: forbid(p, [2])),
}
TRUNCATED = ("TopK 3", "TopP half", "TopP most", "MinP", "Forbid", "MinLength")


@pytest.fixture(params=FILTERS)
def name(request):
    return request.param


def expected(rule, phi):
    rows = [rule(p) for p in phi.double().softmax(-1).reshape(-1, phi.shape[-1])]
    return torch.tensor(rows, dtype=torch.float64).reshape(phi.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_by_definition(name, dtype):
    make, rule = FILTERS[name]
    phi = 1.5 * sized(10, 3, 4, V).to(dtype)
    head = make(heads.Categorical(V))
    d, p = head(phi), expected(rule, phi)
    assert isinstance(d, dist.Categorical) and d.logits.dtype == dtype
    assert d.batch_shape == (10, 3, 4) and d.event_shape == () and head.num_params == V
    values = d.enumerate_support()
    lp = d.log_prob(values).movedim(0, -1)
    tol = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(lp.exp().double(), p, rtol=tol, atol=tol)
    assert torch.equal(lp == -INF, p == 0) and torch.equal(d.probs == 0, p == 0)
    torch.testing.assert_close(d.entropy().double(), torch.special.entr(p).sum(-1), rtol=tol, atol=tol)
    assert head.support.check(values).all() and not head.support.check(torch.tensor([-1, V])).any()


def test_samples(name):
    make, rule = FILTERS[name]
    phi = sized(1, 1, V, seed=3)
    y = make(heads.Categorical(V))(phi).sample((3000,)).flatten()
    p = expected(rule, phi).flatten()
    assert set(y.tolist()) <= set(p.nonzero().flatten().tolist())
    assert p.max() == 1 or goodness(y, p) > 1e-4


GONE = {"Forbid": [0, 3], "MinLength": [2]}


@pytest.mark.parametrize("outer", ["Tempered cold", *TRUNCATED])
@pytest.mark.parametrize("inner", TRUNCATED)
def test_the_innermost_comes_first(outer, inner):
    (make, rule), (first, first_rule) = FILTERS[outer], FILTERS[inner]
    phi = 1.5 * sized(6, 2, V, seed=1)
    left = expected(first_rule, phi).index_fill(-1, torch.tensor(GONE.get(outer, []), dtype=torch.long), 0).sum(-1)
    phi = phi[(left > 0).all(-1)]
    assert len(phi)
    truth = expected(lambda p: rule(first_rule(p)), phi)
    torch.testing.assert_close(make(first(heads.Categorical(V)))(phi).probs, truth, rtol=1e-12, atol=1e-12)


def test_order_matters():
    phi = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    one, other = (
        f(phi).probs
        for f in (TopP(Tempered(heads.Categorical(3), 3), 0.75), Tempered(TopP(heads.Categorical(3), 0.75), 3))
    )
    assert (one > 0).all() and torch.equal(other > 0, torch.tensor([[True, True, False]]))


def test_gradients_are_those_of_the_explicit_formula(name):
    make, rule = FILTERS[name]
    phi, weights = (1.5 * sized(4, 3, V, seed=2)).requires_grad_(), sized(4, 3, V, seed=5)
    kept = expected(rule, phi.detach()) > 0
    power = {"Tempered cold": 0.4, "Tempered hot": 3}.get(name, 1)
    mass = torch.where(kept, (phi / power).exp(), 0)
    p = mass / mass.sum(-1, keepdim=True)
    by_hand = torch.where(kept, p, 1).log()
    d = make(heads.Categorical(V))(phi)
    lp = d.log_prob(d.enumerate_support()).movedim(0, -1)
    for got, truth in (
        (torch.where(kept, weights * lp, 0).sum(), (weights * by_hand).sum()),
        ((weights[..., 0] * d.entropy()).sum(), -(weights[..., 0] * (p * by_hand).sum(-1)).sum()),
        ((weights * d.probs).sum(), (weights * p).sum()),
    ):
        grads = [torch.autograd.grad(f, phi, retain_graph=True)[0] for f in (got, truth)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert lp[~kept].numel() == 0 or not torch.autograd.grad(lp[~kept].sum(), phi)[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("far", [1e4, 1e8])
def test_extreme_logits(name, dtype, far):
    phi = (far * sized(6, 2, V, seed=4).sign().to(dtype)).requires_grad_()
    d = FILTERS[name][0](heads.Categorical(V))(phi)
    lp = d.log_prob(d.enumerate_support())
    assert not lp.isnan().any() and (lp <= 0).all()
    torch.testing.assert_close(lp.logsumexp(0), torch.zeros(6, 2, dtype=dtype), rtol=0, atol=1e-6)
    for f in (lp[lp.isfinite()].sum(), lp.sum(), d.entropy().sum(), d.probs.square().sum()):
        assert torch.autograd.grad(f, phi, retain_graph=True)[0].isfinite().all()


def test_what_is_left_of_a_token_with_all_mass():
    phi = torch.tensor([[1e4, 0.3, -0.5]]).double()
    rest = torch.tensor([0.3, -0.5]).double().softmax(-1)
    torch.testing.assert_close(Forbid(heads.Categorical(3), [0])(phi).probs[0, 1:], rest, rtol=1e-11, atol=0)


def kept(head, logits):
    return (head(torch.tensor([logits], dtype=torch.float64)).probs[0] > 0).nonzero().flatten().tolist()


def test_of_equal_tokens_the_first():
    tie = [1.0, 3.0, 2.0, 2.0, 2.0]
    assert kept(TopK(heads.Categorical(V), 1), tie) == [1] and kept(TopK(heads.Categorical(V), 3), tie) == [1, 2, 3]
    assert kept(TopK(heads.Categorical(V), 2), [0.0] * V) == [0, 1]
    assert kept(TopP(heads.Categorical(4), 0.45), [0.0] * 4) == [0, 1] and kept(
        TopP(heads.Categorical(4), 0.55), [0.0] * 4
    ) == [
        0,
        1,
        2,
    ]
    assert kept(TopP(heads.Categorical(V), 0.75), tie) == [1, 2, 3]  # 0.498 + 2 * 0.183
    assert kept(MinP(heads.Categorical(V), 1.0), [0.0] * V) == list(range(V))
    assert kept(MinP(heads.Categorical(V), 0.36), tie) == [1, 2, 3, 4]  # exp(-1) = 0.368


def test_top_p_1_keeps_what_underflows():
    phi = torch.tensor([[0.0, -2000.0]]).double()
    assert TopP(heads.Categorical(2), 1.0)(phi).log_prob(torch.tensor([1])) == -2000
    assert TopP(heads.Categorical(2), 1 - 1e-12)(phi).log_prob(torch.tensor([1])) == -INF


def test_temperature_near_0_is_greedy():
    phi = sized(7, V).float()
    d = Tempered(heads.Categorical(V), 1e-30)(phi)
    assert torch.equal(d.probs, torch.nn.functional.one_hot(phi.argmax(-1), V).float()) and (d.entropy() == 0).all()


@pytest.mark.parametrize("temperature", [1e-46, 1e-300])
def test_temperatures_that_underflow(temperature):
    phi = sized(7, V).float().requires_grad_()
    d = Tempered(heads.Categorical(V), temperature)(phi)
    assert torch.equal(d.probs, torch.nn.functional.one_hot(phi.argmax(-1), V).float())
    for f in (d.entropy(), d.log_prob(phi.argmax(-1))):
        assert (f == 0).all() and not torch.autograd.grad(f.sum(), phi, retain_graph=True)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_filtered_in_single(dtype):
    phi = torch.tensor([0.0, 0.25, 1.0]).to(dtype).expand(4, 3)
    for head, truth in (
        (Tempered(heads.Categorical(3), 1e-3), [0.0, 0.0, 1.0]),
        (Tempered(heads.Categorical(3), 100), tempered(phi[0].double().softmax(-1), 100)),
        (TopK(heads.Categorical(3), 2), top_k(phi[0].double().softmax(-1), 2)),
    ):
        d = head(phi)
        assert d.logits.dtype == torch.float32
        torch.testing.assert_close(d.probs[0], torch.tensor(truth), rtol=0, atol=4e-3)


def test_min_length_by_site():
    head = MinLength(heads.Categorical(3), 2, eos=1)
    phi = sized(2, 4, 3)
    p = head(phi).probs
    assert torch.equal(p[..., 1] == 0, torch.tensor([True, True, False, False]).expand(2, 4))
    torch.testing.assert_close(p[:, 2:], phi[:, 2:].softmax(-1))
    for t in range(4):
        assert torch.equal(head(phi[:, t : t + 1], t).probs, p[:, t : t + 1])
    assert (head(phi, 1).probs[:, :, 1] == 0).tolist() == [[True, False, False, False]] * 2
    assert (TopK(MinLength(heads.Categorical(3), 1, 0), 2)(phi, 0).probs[:, 0, 0] == 0).all()  # first is passed on


@pytest.mark.parametrize(
    "head",
    [
        heads.Bernoulli(),
        heads.Binomial(3),
        heads.DiscretizedLogistic(4, 2),
        heads.Mixture(heads.Categorical(3), 2),
        heads.Mixture([TopK(heads.Categorical(3), 2), heads.Categorical(3)]),
        heads.Parametric(dist.BetaBinomial, total_count=4),
    ],
    ids=["Bernoulli", "Binomial", "DiscretizedLogistic", "Mixture", "Mixture of filters", "BetaBinomial"],
)
def test_any_head_of_tokens(head):
    phi = sized(3, 4, head.num_params)
    d = head(phi)
    p = d.log_prob(d.enumerate_support()).movedim(0, -1).exp().double()
    top = TopK(head, 2)
    assert same_constraint(top.support, head.support) and top.num_params == head.num_params
    truth = torch.stack([torch.tensor(top_k(row, 2)) for row in p.reshape(12, -1)]).reshape(p.shape).to(p)
    torch.testing.assert_close(top(phi).probs.double(), truth, rtol=1e-6, atol=1e-6)


def test_filters_under_vmap_and_on_meta(name):
    head, phi = FILTERS[name][0](heads.Categorical(V)), sized(3, 2, V)
    y = torch.tensor([1, 4])
    torch.testing.assert_close(torch.func.vmap(lambda phi: head(phi).log_prob(y))(phi), head(phi).log_prob(y))
    run = lambda h: (h(phi.to("meta")).log_prob(y.to("meta")), h(phi.to("meta")).entropy())  # noqa: E731
    testing.meta(head, run)
    testing.device(lambda: (head(phi).log_prob(y), head(phi).entropy(), head(phi).sample()))


@pytest.mark.parametrize("make", [pair[0] for pair in FILTERS.values()], ids=list(FILTERS))
def test_strings_have_mass_1(make):
    """Of a filtered chain, whose draws have its own probabilities."""
    net = testing.redraw(gx.conditioners.Recurrent(V, V, hidden=4).double())
    d = gx.Autoregressive(net, make(heads.Categorical(V)), (3,))()
    strings = d.enumerate_support()
    lp = d.log_prob(strings)
    assert len(strings) == V**3 and abs(lp.logsumexp(0).item()) < 1e-10
    y = d.sample((2000,))
    p = lp.exp().detach()
    assert p.max() > 1 - 1e-9 or goodness((y * torch.tensor([V * V, V, 1])).sum(-1), p) > 1e-4
    grads = torch.autograd.grad(lp[lp > -INF].sum(), list(net.parameters()), allow_unused=True)
    assert all(g.isfinite().all() for g in grads if g is not None)


SHORT = {
    "Tempered": lambda head: Tempered(head, 0.5),
    "TopK": lambda head: TopK(head, 2),
    "TopP": lambda head: TopP(head, 0.7),
    "MinP": lambda head: MinP(head, 0.6),
    "Forbid": lambda head: Forbid(head, [1]),
    "MinLength": lambda head: MinLength(head, 2, eos=0),
    "all": lambda head: Forbid(MinP(TopP(MinLength(Tempered(head, 2.0), 1, eos=0), 0.9), 0.2), []),
}


@pytest.mark.parametrize("name", SHORT)
def test_sequences_have_mass_1(name):
    """Of three tokens and random length, whose draws have their own probabilities."""
    net = testing.redraw(gx.conditioners.Recurrent(3, 3, hidden=4).double())
    d = gx.Sequence(net, heads.Categorical(3), eos=0, max_len=6)().with_head(SHORT[name](heads.Categorical(3)))
    strings, place = d.enumerate_support(), 3 ** torch.arange(6)
    p = torch.zeros(3**6).double().index_put(((strings * place).sum(-1),), d.log_prob(strings).exp().detach())
    assert len(strings) == 127 and abs(p.sum().item() - 1) < 1e-10 and ((p > 0).sum() == 127) == (name == "Tempered")
    assert p.max() < 0.8 and goodness((d.sample((3000,)) * place).sum(-1), p) > 1e-4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TopK(heads.Normal(), 2),
            TypeError,
            "Expected a head over integers 0 ... V - 1; got a head of Normal.",
        ),
        (lambda: TopK(heads.Poisson(), 2), TypeError, "got a head of Poisson."),
        (lambda: TopK(heads.Bernoulli((2,)), 2), TypeError, "got a head of Independent."),
        (lambda: TopK(heads.OneHotCategorical(3), 2), TypeError, "got a head of OneHotCategorical."),
        (
            lambda: TopK(heads.Affine(), 2),
            TypeError,
            "Expected a head of distributions; got Affine, which returns Affine.",
        ),
        (lambda: TopK(3, 2), TypeError, "Expected head to be of class Head; got int."),
        (
            lambda: TopK(heads.PerSite([heads.Categorical(V)] * 2), 2),
            ValueError,
            r"got a PerSite \(use PerSite\(\[TopK",
        ),
        (
            lambda: MinLength(heads.PerSite([heads.Categorical(V)] * 2), 2, 0),
            ValueError,
            r"treat all sites alike; got a PerSite\.$",
        ),
        (lambda: TopK(heads.Categorical(V), 0), ValueError, "Expected k to be an integer >= 1; got 0."),
        (lambda: TopK(heads.Categorical(V), 1.5), ValueError, "Expected k to be an integer >= 1; got 1.5."),
        (lambda: TopP(heads.Categorical(V), 0.0), ValueError, "Expected 0 < p <= 1; got 0.0."),
        (lambda: TopP(heads.Categorical(V), 1.1), ValueError, "Expected 0 < p <= 1; got 1.1."),
        (lambda: MinP(heads.Categorical(V), -0.1), ValueError, "Expected 0 < p <= 1; got -0.1."),
        (lambda: MinP(heads.Categorical(V), "a"), TypeError, "Expected p to be a number; got 'a'."),
        (lambda: Tempered(heads.Categorical(V), 0), ValueError, "Expected 0 < temperature < inf; got 0."),
        (lambda: Tempered(heads.Categorical(V), INF), ValueError, "Expected 0 < temperature < inf; got inf."),
        (lambda: Tempered(heads.Categorical(V), torch.nan), ValueError, "Expected 0 < temperature < inf; got nan."),
        (
            lambda: Forbid(heads.Categorical(V), [5]),
            ValueError,
            "Expected tokens among 0 ... 4 .the tokens of the head.; got 5.",
        ),
        (
            lambda: Forbid(heads.Categorical(V), torch.tensor([-1])),
            ValueError,
            "Expected tokens to be a sequence of integers >= 0; got .-1..",
        ),
        (
            lambda: Forbid(heads.Categorical(V), [[1, 2]]),
            ValueError,
            "Expected tokens to be a sequence of integers >= 0; got ..1, 2...",
        ),
        (lambda: Forbid(heads.Categorical(V), 1), TypeError, "Expected tokens to be a collection of integers; got 1."),
        (
            lambda: Forbid(heads.Categorical(V), torch.tensor(1)),
            TypeError,
            "Expected tokens to be a collection of integers; got 1.",
        ),
        (lambda: Forbid(heads.Categorical(V), range(5)), ValueError, "Expected tokens to leave at least one of 5; got"),
        (lambda: MinLength(heads.Categorical(V), -1, 0), ValueError, "Expected n to be an integer >= 0; got -1."),
        (
            lambda: MinLength(heads.Categorical(V), 2, 5),
            ValueError,
            "Expected eos among 0 ... 4 .the tokens of the head.; got 5.",
        ),
        (
            lambda: MinLength(heads.Categorical(1), 2, 0),
            ValueError,
            "Expected a head of at least two tokens; got eos only.",
        ),
        (lambda: TopK(MinLength(heads.Categorical(V), 2, 0), 2).permuted(torch.arange(3)), ValueError, "of sequences"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
