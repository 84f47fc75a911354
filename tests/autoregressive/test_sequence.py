"""Sequences of random length, against tables of probabilities written out by hand: masses, prefixes, dtypes, derivatives."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, vmap

import pyro_genexact as gx
from pyro_genexact import conditioners, heads, testing
from pyro_genexact.core.leaves import tensors_in
from pyro_genexact.distributions import SequenceDistribution
from support.checks import close
from support.registry import DISTRIBUTIONS, SEQUENCES
from support.registry.conditioners import small_transformer
from support.small_models import bigram
from support.values import F64, built, sized


def by_hand(table, string, eos=0):
    """log p of a list of symbols."""
    log_p, before, total = table.log_softmax(-1), -1, 0.0
    for symbol in string:
        total += log_p[before, symbol].item()
        if symbol == eos:
            break
        before = symbol
    return total


@pytest.mark.parametrize(
    ("string", "length"),
    [
        ([0, 0, 0, 0, 0, 0], 0),
        ([1, 0, 0, 0, 0, 0], 1),
        ([1, 2, 2, 1, 2, 0], 5),
        ([1, 2, 2, 1, 2, 1], 6),
    ],
)
def test_one_string(string, length):
    """None at all, one symbol, one less than the array holds, and as many: there the end is to come."""
    model = bigram()
    d, y = model(), torch.tensor(string)
    assert d.log_prob(y).item() == pytest.approx(by_hand(model.conditioner.table, string), abs=1e-12)
    assert d.lengths_of(y) == length and d.support.check(y)
    sites = d.log_prob_sites(y)
    assert (sites[length + 1 :] == 0).all() and (sites[: length + 1] < 0).all()


def test_mass_of_longer_strings():
    """What an array without an end stands for: all strings that begin with it."""
    model = bigram()
    short, long_ = model(max_len=2), model(max_len=7)
    every = long_.enumerate_support()
    for beginning in ([1, 1], [1, 2], [2, 1]):
        begins = (every[:, :2] == torch.tensor(beginning)).all(1)
        close(long_.log_prob(every[begins]).logsumexp(0), short.log_prob(torch.tensor(beginning)))


def test_module_and_distribution_agree():
    model = bigram()
    d = SequenceDistribution(model.conditioner, model.head, 0, 6)
    y = d.sample((20,))
    close(model().log_prob(y), d.log_prob(y))
    close(model.condition(None, 6).log_prob(y), d.log_prob(y))
    assert "SequenceDistribution(Bigram, Categorical, (), (6,))" in repr(d)
    assert not d.has_rsample and d.support.is_discrete and d.support.event_dim == 1


def test_lengths_are_what_rows_were_given():
    """In every distribution; a value of random length has one by ``lengths_of``."""
    d, fixed = bigram()(), gx.Autoregressive(conditioners.Recurrent(3, 3), heads.Categorical(3), (6,))
    given = torch.tensor([2, 6])
    assert torch.equal(fixed(lengths=given).lengths, given) and fixed().lengths is None
    assert not hasattr(d, "lengths") and d.lengths_of(torch.tensor([[1, 0, 0, 0, 0, 0]])).tolist() == [1]


def test_tensors_of_its_parts_are_found():
    """By what moves distributions or looks for their dtype: the context and the prefix among them."""
    net = conditioners.Recurrent(3, 3, hidden=5, context=2)
    d = built(gx.Sequence(net, heads.Categorical(3), 0, 4))(sized(2, 2)).conditional_on_prefix(torch.ones(2, 2).long())
    found = {id(t) for t in tensors_in(d)}
    assert {id(t) for t in (d.context, d.prefix, *d.conditioner.parameters())} <= found
    moved = gx.Constant(d).float()()
    assert moved.context.dtype == torch.float32 and moved.batch_shape == (2,)


def test_gradient_only_of_what_was_read():
    """Symbols that occur only as the end, or not at all, have rows of the embedding without gradient."""
    net = small_transformer(4, site=4).double()
    model = testing.redraw(gx.Sequence(net, heads.Categorical(4), 0, 6))
    y = torch.tensor([[1, 2, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]])
    model().log_prob(y).sum().backward()
    embedding = next(p for p in net.encoder.parameters() if p.shape[0] == 4)
    assert embedding.grad.abs().amax(1).gt(0).tolist() == [False, True, True, False]


def test_values_of_other_batch_dims():
    net = conditioners.Recurrent(3, 3, hidden=5, context=2)
    d = built(gx.Sequence(net, heads.Categorical(3), 0, 4))(sized(2, 2))
    y = d.sample((5,))
    assert y.shape == (5, 2, 4) and d.sample(()).shape == (2, 4) and d.sample(torch.Size((2, 3))).shape == (2, 3, 2, 4)
    every = torch.stack([torch.stack([d.log_prob(y[i, j])[j] for j in range(2)]) for i in range(5)])
    close(d.log_prob(y), every)
    close(d.log_prob(y[:, :1]), torch.stack([d.log_prob(row[0]) for row in y]))
    assert d.log_prob(y[0, 0]).shape == (2,) and d.lengths_of(y[0, 0]).shape == () and d.lengths_of(y).shape == (5, 2)
    wide = d.expand((3, 2))
    assert wide.sample().shape == (3, 2, 4) and wide.log_prob(y[0]).shape == (3, 2)
    assert wide.conditional_on_prefix(y[0, :, :1]).batch_shape == (3, 2)


def test_dtypes():
    model = bigram()
    y = model().sample((4,))
    assert y.dtype == torch.long
    for dtype in (torch.uint8, torch.int32, torch.float32, F64):
        close(model().log_prob(y.to(dtype)), model().log_prob(y))
        c = model().conditional_on_prefix(y[:, :2].to(dtype))
        assert c.sample().dtype == torch.long
        close(c.log_prob(y[:, 2:]), model().log_prob_sites(y)[:, 2:].sum(1))
    bits = built(gx.Sequence(conditioners.Markov((), 1, order=1), heads.Bernoulli(), 1, 4))()
    for dtype in (torch.bool, torch.uint8, F64):
        c = bits.conditional_on_prefix(torch.tensor([[1, 1], [0, 0], [0, 1]]).to(dtype), torch.tensor([2, 2, 0]))
        assert c.sample().dtype == F64 and (c.sample()[0] == 1).all()
    single = bigram(table=sized(4, 3).float())
    assert single().log_prob(y).dtype == torch.float32
    close(single().log_prob(y).double(), model().log_prob(y), 1e-5)


def test_no_rows():
    net = conditioners.Recurrent(3, 3, hidden=5, context=2)
    d = built(gx.Sequence(net, heads.Categorical(3), 0, 4))(sized(0, 2))
    assert d.sample((3,)).shape == (3, 0, 4) and d.sample().dtype == torch.long and d.log_prob(d.sample()).shape == (0,)
    assert bigram()().sample((0,)).shape == (0, 6)
    assert d.conditional_on_prefix(torch.zeros(0, 2).long(), torch.zeros(0).long()).sample().shape == (0, 2)


def test_prefixes_that_have_ended():
    d = bigram()().conditional_on_prefix(torch.tensor([[1, 0], [0, 0]]))
    assert not d.sample((3,)).any() and d.sample().dtype == torch.long
    assert (d.log_prob(torch.zeros(4).long()) == 0).all() and (d.lengths_of(torch.zeros(4).long()) == 0).all()
    assert not d.has_enumerate_support
    stopped = built(gx.Sequence(conditioners.Recurrent((2,), 3, hidden=4), heads.Stopped(heads.Normal()), None, 4))()
    c = stopped.conditional_on_prefix(torch.tensor([[[0.3, 1.0], [0.0, 0.0]]], dtype=F64))
    assert not c.sample((3,)).any() and (c.lengths_of(c.sample((3,))) == 0).all() and c.log_prob(c.sample()) == 0


def test_rows_whose_prefixes_are_shorter_are_full_earlier():
    """And wait for the others, whose prefixes are read in one chunk as far as all have them."""
    never = torch.tensor([[-torch.inf, 0.0, 0.0]], dtype=F64).expand(4, 3).clone()
    starts = torch.tensor([2] + [6] * 9)
    d = bigram(table=never, max_len=9)().conditional_on_prefix(torch.ones(10, 6).long(), starts)
    work = d.conditioner.work
    work.clear()
    assert (d.sample() > 0).all() and work[0] == 20 and len(work) == 1 + 6


def test_prefix_and_min_length():
    """A filter that counts sites counts those of the prefix, too."""
    model = bigram()
    filtered = model.with_head(heads.MinLength(model.head, 3, eos=0))
    assert filtered.conditioner is model.conditioner and filtered().lengths_of(filtered().sample((200,))).min() == 3
    d = filtered().conditional_on_prefix(torch.ones(3, 2).long(), torch.tensor([0, 1, 2]))
    least = d.lengths_of(d.sample((400,))).amin(0)
    assert least.tolist() == [3, 2, 1]
    first = d.log_prob(torch.zeros(4).long())
    assert (first == -torch.inf).all()


def test_more_sites_after_a_prefix():
    model = bigram()
    y = model(max_len=9).sample((50,))
    c = model().conditional_on_prefix(y[:, :3], max_len=6)
    close(c.log_prob(y[:, 3:]), model(max_len=9).log_prob_sites(y)[:, 3:].sum(1))
    assert c.event_shape == (6,)


def test_to_uniform_and_back():
    d = bigram()()
    y = d.sample((300,))
    u = d.to_uniform(y)
    gone = torch.arange(6) > d.lengths_of(y).unsqueeze(1)
    assert torch.equal(u.isnan(), gone) and torch.equal(d.from_uniform(u), y)
    p = u[~gone].sort()[0]
    assert (p - (torch.arange(len(p)) + 0.5) / len(p)).abs().max() * len(p) ** 0.5 < 2.2
    prefix, starts = torch.tensor([[1, 2], [2, -9], [0, 0], [-9, -9]]), torch.tensor([2, 1, 2, 0])
    c = d.conditional_on_prefix(prefix, starts)
    rest = c.sample((30,))
    assert torch.equal(c.from_uniform(c.to_uniform(rest)), rest)
    with pytest.raises(ValueError, match=r"Expected u between 0 and 1 up to the end of a sequence; got NaN."):
        d.from_uniform(torch.full((6,), torch.nan, dtype=F64))
    with pytest.raises(ValueError, match="Expected u between 0 and 1; got values outside"):
        d.from_uniform(torch.full((6,), 2.0, dtype=F64))


@pytest.mark.parametrize("name", ["Sequence transformer", "Sequence markov", "Sequence independent"])
def test_function_transforms(name):
    """Per-row gradients by vmap of grad."""
    model, context = DISTRIBUTIONS[name]()
    args = () if context is None else (context[0],)
    with torch.no_grad():
        y = model(*args).sample((5,))
    params = dict(model.named_parameters())

    def log_p(params, y):
        return functional_call(model, params, args).log_prob(y)

    found = vmap(grad(log_p), (None, 0))(params, y)
    for i in range(5):
        model.zero_grad()
        model(*args).log_prob(y[i]).backward()
        for key, p in params.items():
            close(found[key][i], torch.zeros_like(p) if p.grad is None else p.grad)
    close(vmap(lambda v: model(*args).log_prob(v))(y), model(*args).log_prob(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_single(dtype):
    net = testing.redraw(conditioners.Recurrent(3, 3, hidden=5)).to(dtype)
    d = gx.Sequence(net, heads.Categorical(3), 0, 6)()
    y = d.enumerate_support()
    log_prob = d.log_prob(y)
    assert log_prob.dtype == d.log_prob_sites(y).dtype == torch.float32
    close(log_prob.logsumexp(0), torch.zeros(()), 1e-3)  # a pass over more rows may round phi otherwise
    sites = net(torch.where(d.lengths_of(y).unsqueeze(1) > torch.arange(6), y, 0)).float().log_softmax(-1)
    sites = sites.gather(2, y.unsqueeze(2)).squeeze(2)
    present = torch.arange(6) <= d.lengths_of(y).unsqueeze(1)
    close(log_prob, torch.where(present, sites, 0.0).sum(1), 1e-5)
    curve = d.termination_curve(num_samples=500)
    assert curve.probability.dtype == curve.standard_error.dtype == torch.float32


def test_half_precision_tells_large_tokens_and_long_sums():
    """In bfloat16 301 is 300, and 200 + 0.4 is 200."""
    logits = torch.full((1000, 302), -20.0)
    logits[:, 301] = 0.7
    net = conditioners.Independent(1000, 302, site=302)
    with torch.no_grad():
        net.phi.copy_(logits)
    d, y = gx.Sequence(net.bfloat16(), heads.Categorical(302), 0, 1000)(), torch.full((1000,), 301)
    logits[:, 301], logits[:, 1] = net.phi[0, 301].float(), 0.0
    with torch.no_grad():
        net.phi[:, 1] = 0.0
    close(d.log_prob(y), 1000 * logits[0].log_softmax(0)[301], 1e-5)
    stopped = heads.Stopped(heads.Categorical(302))
    net = conditioners.Independent(2, 303, site=(2,))
    with torch.no_grad():
        net.phi.copy_(torch.where(torch.arange(303) == 301, 20.0, -20.0))
    d = gx.Sequence(net.bfloat16(), stopped, None, 2)()
    y = d.sample()
    assert y.tolist() == [[301, 0], [301, 0]] and d.log_prob(y) > -0.01
    c = d.conditional_on_prefix(y[:1])
    assert c.sample().tolist() == [[301, 0]] and c.log_prob(y[1:]) > -0.01


def test_numbers_of_half_precision():
    net = testing.redraw(conditioners.MADE(4, 2, hidden=(8,))).bfloat16()
    d = gx.Autoregressive(net, heads.Normal(), (4,))()
    y = d.sample((3,))
    phi = net(y.bfloat16()).float()
    assert y.dtype == d.rsample((3,)).dtype == d.log_prob(y).dtype == torch.float32
    close(d.log_prob(y), d.head(phi).log_prob(y).sum(1), 1e-6)
    close(d.log_prob(y.bfloat16()), d.head(phi).log_prob(y.bfloat16()).sum(1), 1e-6)
    with pytest.raises(ValueError, match=r"Expected value\.dtype == torch\.bfloat16"):
        d.log_prob(y.double())
    inner = gx.Autoregressive(conditioners.MADE(2, 1, context=3, hidden=(4,)), heads.Bernoulli(), (2,))
    head = heads.ConditionalHead(inner)  # whose weights are in half precision, too
    d = gx.Autoregressive(conditioners.MADE(3, 3, site=(2,), hidden=(6,)), head, (3, 2)).bfloat16()()
    assert d.log_prob(d.sample((5,))).dtype == torch.float32


def test_autocast_adds_up_in_single():
    model = built(gx.Sequence(small_transformer(3), heads.Categorical(3), 0, 6)).float()
    numbers = built(gx.Sequence(conditioners.Markov((2,), 3, order=1), heads.Stopped(heads.Normal()), None, 3)).float()
    with torch.autocast("cpu", torch.bfloat16):
        d = model()
        close(d.log_prob(d.enumerate_support()).logsumexp(0), torch.zeros(()), 1e-3)
        y = numbers().sample((4,))
        assert y.dtype == numbers().log_prob(y).dtype == torch.float32


@pytest.mark.parametrize(
    "net",
    [
        lambda **of: small_transformer(3, **of),
        lambda **of: conditioners.Recurrent(3, 3, hidden=4, **of),
        lambda **of: conditioners.Markov(3, 3, order=2, hidden=(4,), **of),
        lambda **of: conditioners.Independent(4, 3, site=3, hidden=(4,), **of),
    ],
)
def test_covariates_after_the_end_do_not_matter(net):
    model = built(gx.Sequence(net(context=gx.Covariates(2)), heads.Categorical(3), 0, 4))
    y, x = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [2, 1, 2, 0]]), sized(3, 4, 2)
    gone = torch.arange(4) > torch.tensor([[1], [0], [3]])
    found = []
    for value in (0.0, torch.nan, torch.inf, 1e30):
        model.zero_grad()
        context = x.masked_fill(gone.unsqueeze(2), value).requires_grad_()
        log_prob = model(context).log_prob(y)
        log_prob.sum().backward()
        found.append([log_prob.detach(), context.grad, *(p.grad.clone() for p in model.parameters())])
        assert (context.grad[gone] == 0).all() and (context.grad[~gone] != 0).any()
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            close(got, expected)


def test_copies_follow_their_own_weights():
    model = bigram()
    d, y = model(), torch.tensor([1, 2, 0, 0, 0, 0])
    before, other = d.log_prob(y), copy.deepcopy(model)
    with torch.no_grad():
        model.conditioner.table.mul_(2)
    close(d.log_prob(y), model().log_prob(y))  # the same parameter
    close(other().log_prob(y), before)


@pytest.mark.parametrize("name", [n for n in SEQUENCES if "source" not in n])
def test_mode(name):
    model, context = DISTRIBUTIONS[name]()
    d = testing.made(model, context)
    support = d.enumerate_support()
    best = d.log_prob(support).max(0).values
    close(d.log_prob(d.mode), best)


def test_padded_context():
    """The values and lengths of a source in one, as conditioners take them."""
    model = built(gx.Sequence(small_transformer(3, context=gx.Source(2)), heads.Categorical(3), 0, 4))
    source, lengths = sized(3, 5, 2), torch.tensor([5, 2, 0])
    y = model(source).sample()
    close(model(gx.PaddedSequence(source, lengths)).log_prob(y), model(source, source_lengths=lengths).log_prob(y))
    close(model(source[1:2, :2]).log_prob(y[1:2]), model(source, source_lengths=lengths).log_prob(y)[1:2])
    nothing = model(source[:, :0]).log_prob(y)
    close(nothing[2], model(source, source_lengths=lengths).log_prob(y)[2])
    assert model(source, source_lengths=torch.tensor([[1], [2]])).batch_shape == (2, 3)
    before = model(source, source_lengths=lengths).log_prob(y).sum().item()
    context = {"context": source, "source_lengths": lengths}
    gx.fit(model, y, context, epochs=5, batch_size=3, lr=0.01, progress=False)
    assert model(**context).log_prob(y).sum() > before


def test_fit_reaches_the_counts():
    """A Markov network of order 1 without hidden layers is a table: its optimum is that of the counts."""
    truth = bigram(V=4, max_len=8)
    y = truth().sample((200,))
    net = conditioners.Markov(4, 4, order=1, hidden=())
    model = gx.Sequence(net, heads.Categorical(4), 0, 8).double()
    gx.fit(model, y, epochs=150, batch_size=200, lr=0.2, progress=False)
    counts = torch.zeros(5, 4, dtype=F64)
    for row in y.tolist():
        before = -1
        for symbol in row:
            counts[before, symbol] += 1
            if symbol == 0:
                break
            before = symbol
    best = torch.special.xlogy(counts, counts / counts.sum(1, keepdim=True).clamp(min=1)).sum() / 200
    found = model().log_prob(y).mean().item()
    assert best - 2e-3 < found <= best + 1e-9


def test_support_names_that_of_the_head():
    head = heads.Categorical(3)
    model = gx.Sequence(conditioners.Recurrent(3, head.num_params, hidden=4), head, eos=0, max_len=4)
    assert repr(model().support) == f"EventConstraint({head.support})"
