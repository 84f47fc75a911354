"""Wrong inputs of sequences of random length, by the text of their errors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.distributions import SequenceDistribution
from support.checks import fails
from support.registry.conditioners import small_transformer
from support.values import F64, built, sized


def tokens(*values):
    return torch.tensor(values)


def model(eos=0, max_len=4, head=None, net=None, **options):
    head = head or heads.Categorical(3)
    net = net or conditioners.Recurrent(3, head.num_params, hidden=5, **options)
    return built(gx.Sequence(net, head, eos, max_len))


def stopped():
    return model(None, head=heads.Stopped(heads.Normal()), net=conditioners.Recurrent((2,), 3, hidden=5))


@pytest.mark.parametrize(
    ("eos", "value", "text"),
    [
        (
            0,
            tokens(1, 3, 0, 0),
            "within the support of the head, IntegerInterval(lower_bound=0, upper_bound=2); got 3 at",
        ),
        (0, tokens(1, -1, 0, 0), "got -1 at site 1"),
        (0, torch.tensor([1, 2, 1.5, 0]), "got 1.5 at site 2"),
        (0, torch.tensor([1, torch.nan, 0, 0]), "got nan at site 1"),
        (0, tokens(1, 0, 2, 0), "Expected value to be 0 after the first eos (0); got 2 at site 2."),
        (0, tokens(0, 0, 0, 1), "Expected value to be 0 after the first eos (0); got 1 at site 3."),
        (2, tokens(1, 2, 0, 0), "Expected value to be 2 after the first eos (2); got 0 at site 2."),
        (0, tokens(1, 0, -100, -100), "Expected value to be 0 after the first eos (0); got -100 at site 2."),
        (0, tokens(1, 0, 0), "Expected value.shape[-1:] == (4,) (event_shape); got (3,)."),
        (0, tokens(1, 0, 0, 0, 0), "Expected value.shape[-1:] == (4,) (event_shape); got (5,)."),
        (0, torch.tensor(1), "Expected value.shape[-1:] == (4,) (event_shape); got ()."),
    ],
)
def test_values(eos, value, text):
    d = model(eos)()
    for query in (d.log_prob, d.log_prob_sites):
        fails(ValueError, text, query, value)
    if "shape" not in text:
        assert not d.support.check(value)
        d._validate_args = False
        assert d.log_prob(value) == -torch.inf and (d.log_prob_sites(value) == -torch.inf).any()
        d.log_prob(value.to(F64).requires_grad_()).backward()


def test_values_of_another_kind():
    fails(TypeError, "Expected value to be of class Tensor; got list.", model()().log_prob, [1, 0, 0, 0])
    d = stopped()()
    fails(
        ValueError,
        "Expected value.dtype == torch.float64 (that of the parameters); got torch.float32.",
        d.log_prob,
        torch.zeros(4, 2),
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            [[1, 0], [1, 1], [0, 0], [0, 1]],
            "Expected value to be [0.0, 0.0] after the first end; got [0.0, 1.0] at site 3.",
        ),
        (
            [[1, 0], [1, 1], [2, 0], [0, 0]],
            "Expected value to be [0.0, 0.0] after the first end; got [2.0, 0.0] at site 2.",
        ),
        (
            [[1, 0], [1, 0.5], [2, 0], [0, 0]],
            "Expected value within the support of the head, StoppedConstraint(Real()); got [1.0, 0.5] at",
        ),
        ([[1, 1], [torch.nan, 0], [0, 0], [0, 0]], "after the first end; got [nan, 0.0] at site 1."),
        ([[torch.inf, 1], [0, 0], [0, 0], [0, 0]], "got [inf, 1.0] at site 0"),
    ],
)
def test_values_of_stopped_sites(value, text):
    d, value = stopped()(), torch.tensor(value, dtype=F64)
    fails(ValueError, text, d.log_prob, value)
    d._validate_args = False
    value.requires_grad_()
    log_prob = d.log_prob(value)
    assert log_prob == -torch.inf and torch.autograd.grad(log_prob, value)[0].isfinite().all()


@pytest.mark.parametrize(
    ("eos", "head", "kind", "text"),
    [
        (
            None,
            heads.Categorical(3),
            TypeError,
            "Expected eos to be an integer (Categorical does not model the end); got None.",
        ),
        (None, heads.Tempered(heads.Categorical(3), 0.5), TypeError, "(Tempered does not model the end); got None."),
        (
            1.0,
            heads.Categorical(3),
            TypeError,
            "Expected eos to be an integer (Categorical does not model the end); got 1.0.",
        ),
        (True, heads.Categorical(3), TypeError, "got True."),
        (
            3,
            heads.Categorical(3),
            ValueError,
            "Expected eos within the support of the head, IntegerInterval(lower_bound=0, upper_bound=2); got 3.",
        ),
        (-1, heads.Categorical(3), ValueError, "got -1."),
        (0, heads.Normal(), ValueError, "Expected eos within the support of the head, Real(); got 0."),
        (0, heads.OneHotCategorical(3), ValueError, "Expected eos within the support of the head, OneHot(); got 0."),
        (0, heads.Stopped(heads.Normal()), ValueError, "Expected eos=None (Stopped models the end itself); got 0."),
        (
            0,
            heads.PerSite([heads.Bernoulli()] * 4),
            ValueError,
            "Expected a head that is the same at all sites; got PerSite.",
        ),
        (0, heads.Affine(), TypeError, "Expected a head of distributions; got Affine"),
    ],
)
def test_ends(eos, head, kind, text):
    site = 3 if head.num_params == 3 and not head.site_shape else head.site_shape
    net = conditioners.Recurrent(site, head.num_params, hidden=4)
    fails(kind, text, gx.Sequence, net, head, eos, 4)
    if "head of distributions" not in text:
        fails(kind, text, SequenceDistribution, net, head, eos, 4)


def test_eos_must_be_given():
    fails(TypeError, "eos", gx.Sequence, conditioners.Recurrent(3, 3), heads.Categorical(3), max_len=4)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_max_len(wrong):
    text = f"Expected max_len to be an integer >= 1; got {wrong}."
    net, head = conditioners.Recurrent(3, 3), heads.Categorical(3)
    fails(ValueError, text, gx.Sequence, net, head, 0, wrong)
    fails(ValueError, text, model(), max_len=wrong)
    fails(ValueError, text, model()().conditional_on_prefix, tokens(1), max_len=wrong)
    fails(ValueError, text, model()().termination_curve, max_len=wrong)


def test_more_sites_than_the_conditioner_takes():
    made = model(net=conditioners.MADE(4, 3, site=3))
    text = "Expected event_shape of 4 sites (conditioner.num_sites); got (5,), which has 5."
    fails(ValueError, text, made, max_len=5)
    fails(ValueError, text, made().termination_curve, max_len=5)
    fails(ValueError, "Expected event_shape of 4 sites", made().conditional_on_prefix, tokens(1), max_len=4)
    limited = model(net=small_transformer(3, max_len=6))
    text = "Expected at most 6 sites (conditioner.max_len); got 7."
    fails(ValueError, text, limited, max_len=7)
    fails(ValueError, text, limited().conditional_on_prefix, tokens(1, 2), max_len=5)
    assert limited().conditional_on_prefix(tokens(1, 2), max_len=4).sample().shape == (4,)
    steps = model(context=gx.Covariates(2))
    fails(
        ValueError,
        "Expected context.shape[-2] == 5 (covariates of all sites); got (4, 2).",
        steps,
        sized(4, 2),
        max_len=5,
    )


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        (tokens(1, 2, 1, 2), "Expected a prefix of 1 to 3 of 4 sites; got 4 sites."),
        (tokens(1, 2, 1, 2, 1), "Expected a prefix of 1 to 3 of 4 sites; got 5 sites."),
        (torch.zeros(2, 0).long(), "Expected a prefix of at least one site; got prefix.shape == (2, 0)."),
        (torch.tensor(1), "Expected prefix.shape == (*batch, k) (k sites of the head); got ()."),
        (
            tokens(1, 3),
            "Expected prefix within the support of the head, IntegerInterval(lower_bound=0, upper_bound=2); got 3 at site 1",
        ),
        (tokens(0, 1), "Expected prefix to be 0 after the first eos (0); got 1 at site 1."),
    ],
)
def test_prefixes(prefix, text):
    fails(ValueError, text, model()().conditional_on_prefix, prefix)


def test_prefix_lengths():
    d = model()()
    prefix = tokens([1, 2, 1], [2, 1, 2])
    for wrong in (4, -1):
        text = f"between 0 and 3 (sites of the prefix); got {wrong}."
        fails(ValueError, f"Expected lengths {text}", d.conditional_on_prefix, prefix, tokens(1, wrong))
        fails(
            ValueError, f"Expected prefix_lengths {text}", SequenceDistribution, d.conditioner, d.head, 0, 4,
            prefix=prefix, prefix_lengths=tokens(1, wrong),
        )  # fmt: skip
    ragged = d.conditional_on_prefix(prefix[:, :2], tokens(0, 1))
    fails(
        ValueError,
        "Expected lengths between 0 and 1 (sites of the prefix); got 2.",
        ragged.conditional_on_prefix,
        prefix[:, :1],
        tokens(0, 2),
    )
    fails(
        TypeError,
        "Expected lengths to be a tensor of integers; got torch.float32.",
        d.conditional_on_prefix,
        prefix,
        torch.ones(2),
    )
    mask = torch.tensor([True, False])
    text = "Expected lengths to be a tensor of integers; got torch.bool. Use mask.sum(-1) to convert a mask of prefixes to lengths."
    fails(TypeError, text, d.conditional_on_prefix, prefix, mask)
    fails(
        ValueError,
        "Expected prefix_lengths=None without a prefix; got prefix_lengths.",
        SequenceDistribution,
        d.conditioner,
        d.head,
        0,
        4,
        prefix_lengths=tokens(1),
    )
    fails(TypeError, "Expected prefix to be of class Tensor; got list.", d.conditional_on_prefix, [1])


def test_batches_that_do_not_fit():
    d = model(context=2)(sized(2, 2))
    text = "Expected batch shapes that broadcast; got distribution (2,), prefix (2,), lengths (3,)."
    fails(ValueError, text, d.conditional_on_prefix, tokens([1, 2], [1, 1]), tokens(0, 1, 2))
    text = "Expected batch shapes that broadcast; got distribution (2,), prefix (3,)."
    fails(ValueError, text, d.conditional_on_prefix, tokens([1, 2], [1, 1], [1, 1]))
    text = "Expected batch shapes that broadcast; got prefix (2,), prefix_lengths (3,)."
    fails(
        ValueError, text, SequenceDistribution, d.conditioner, d.head, 0, 4, d.context,
        prefix=tokens([1, 2], [1, 1]), prefix_lengths=tokens(0, 1, 2),
    )  # fmt: skip
    source = model(net=small_transformer(3, context=gx.Source(2)))
    text = "Expected batch shapes that broadcast; got context (3,), lengths (), source_lengths (4,), prefix ()."
    fails(ValueError, text, source, gx.PaddedSequence(sized(3, 5, 2), tokens(1, 2, 3, 4)))
    fails(ValueError, text, source, sized(3, 5, 2), source_lengths=tokens(1, 2, 3, 4))
    made = built(gx.Autoregressive(conditioners.MADE(4, 3, site=3, context=2), heads.Categorical(3), (4,)))(sized(2, 2))
    text = "Expected batch shapes that broadcast; got context (2,), lengths (), source_lengths (), prefix (3,)."
    fails(ValueError, text, made.conditional_on_prefix, tokens([1], [1], [1]))
    text = "Expected batch shapes that broadcast; got distribution (2,), prefix (3,)."
    two = made.conditional_on_prefix(tokens([1], [2]))
    fails(ValueError, text, two.conditional_on_prefix, tokens([1], [1], [1]))


class LargestTensor(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max(self.most, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_the_limit_comes_before_the_arrays():
    d = SequenceDistribution(conditioners.Markov(50, 50, order=1, hidden=()), heads.Categorical(50), 0, 3, limit=100)
    with LargestTensor() as largest:
        fails(ValueError, "Expected a support of at most 100 values (limit); got 2451 or more.", d.enumerate_support)
    assert 50 <= largest.most <= 200


def test_sources():
    source = model(net=small_transformer(3, context=gx.Source(2)))
    x = sized(3, 5, 2)
    for wrong in (6, -1):
        text = f"Expected source_lengths between 0 and 5 (steps of the source); got {wrong}."
        fails(ValueError, text, source, x, source_lengths=tokens(0, 5, wrong))
    fails(
        TypeError,
        "Expected source_lengths to be a tensor of integers; got torch.float32.",
        source,
        x,
        source_lengths=torch.ones(3),
    )
    # a mask, of a prefix or not, is no way to tell lengths
    text = "Expected source_lengths to be a tensor of integers; got torch.bool. Use mask.sum(-1) to convert a mask of prefixes to lengths."
    fails(TypeError, text, source, x, source_lengths=torch.rand(3, 5) < 0.5)
    text = "Expected no source_lengths (Recurrent built with context=0); got lengths of shape (1,)."
    fails(ValueError, text, model(), source_lengths=tokens(1))
    text = "Expected a context (*batch, S, 2) (Transformer built with context=Source(2)); got none."
    fails(ValueError, text, source)
    fails(ValueError, text, source, source_lengths=tokens(1))
    fails(
        ValueError,
        "Expected context.shape[-1] == 2 (Transformer built with context=Source(2)); got (3, 5, 3).",
        source,
        sized(3, 5, 3),
    )
    padded = gx.PaddedSequence(x, tokens(1, 2, 3))
    fails(
        ValueError,
        "Expected no source_lengths with a PaddedSequence context",
        source,
        padded,
        source_lengths=tokens(1, 2, 3),
    )
    fails(ValueError, "Expected source_lengths between 0 and 5", source, gx.PaddedSequence(x, tokens(1, 2, 6)))
    fails(ValueError, "(Recurrent built with context=0)", model(), padded)
    assert source(x, source_lengths=tokens(0, 0, 0)).sample().shape == (3, 4)


def test_parts_that_do_not_fit():
    fails(
        ValueError,
        "Expected conditioner.num_params == 3 (num_params of the head); got 2.",
        gx.Sequence,
        conditioners.Recurrent(3, 2),
        heads.Categorical(3),
        0,
        4,
    )
    fails(
        ValueError,
        "Expected a head of categories 0 ... 1 (conditioner.site == 2)",
        gx.Sequence,
        conditioners.Recurrent(2, 3),
        heads.Categorical(3),
        0,
        4,
    )
    fails(
        ValueError,
        "Expected conditioner.num_params == 2 (num_params of the head); got 3.",
        model()().with_head,
        heads.Categorical(2),
    )
    fails(
        ValueError,
        "Expected conditioner.num_params == 2 (num_params of the head); got 3.",
        model().with_head,
        heads.Categorical(2),
    )
    fails(
        ValueError,
        "Expected eos within the support of the head, Boolean(); got 2.",
        model(2)().with_head,
        heads.Bernoulli(),
    )
    fails(
        TypeError,
        "Expected conditioner to be of class Conditioner; got Linear.",
        gx.Sequence,
        torch.nn.Linear(1, 1),
        heads.Bernoulli(),
        0,
        4,
    )


def test_what_cannot_be_told():
    d = model()()
    fails(NotImplementedError, "Expected a head whose family is reparameterised; got Categorical.", d.rsample)
    long_ = model(max_len=40)()
    fails(
        ValueError, "Expected a support of at most 65536 values (limit); got 131071 or more.", long_.enumerate_support
    )
    small = gx.Sequence(conditioners.Recurrent(3, 3), heads.Categorical(3), 0, 4, limit=30)
    fails(ValueError, "Expected a support of at most 30 values (limit); got 31 or more.", small().enumerate_support)
    counts = model(head=heads.Geometric(), net=conditioners.Markov((), 1, order=1))()
    text = "Expected a head that enumerates a finite support, and prefixes that have not ended; got"
    fails(NotImplementedError, f"{text} Geometric.", counts.enumerate_support)
    fails(NotImplementedError, f"{text} a prefix that has ended.", d.conditional_on_prefix(tokens(0)).enumerate_support)
    fails(
        NotImplementedError,
        "Expected a head that enumerates a finite support; got Geometric.",
        counts.termination_curve,
    )
    for wrong in (1, 2.5):
        text = f"Expected num_samples to be an integer >= 2; got {wrong}."
        fails(ValueError, text, d.termination_curve, num_samples=wrong)
    fails(
        NotImplementedError, "Expected a family with a cdf; got Stopped.", stopped()().to_uniform, stopped()().sample()
    )
