"""Sequences of random length: every query is what the chain rule tells, string by string."""

import copy
import pickle
from dataclasses import fields, replace

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads, testing
from pyro_genexact.autoregressive.chain_rule import ChainRule
from pyro_genexact.autoregressive.layout import SequenceLayout
from pyro_genexact.distributions import AutoregressiveDistribution, SequenceDistribution
from support import registry
from support.registry import SEQUENCES
from support.registry.conditioners import small_transformer
from support.values import built, sized

sequence_name = pytest.mark.parametrize("distribution_name", SEQUENCES)


@sequence_name
def test_sequence(distribution):
    testing.sequence(*distribution)


def padded():
    """Sources of several lengths, one of them empty, with NaN for padding."""
    source, lengths = sized(3, 3, 2, seed=1), torch.tensor([3, 0, 1])
    gone = torch.arange(3) >= lengths.unsqueeze(1)
    return gx.PaddedSequence(source.masked_fill(gone.unsqueeze(2), torch.nan), lengths)


def stopped(head, **options):
    net = conditioners.Recurrent(head.site_shape, head.num_params, hidden=5, **options)
    return built(gx.Sequence(net, head, None, 4))


MORE = {  # whose contexts are no tensors, or whose supports are infinite
    "source padded": lambda: (
        built(gx.Sequence(small_transformer(3, context=gx.Source(2)), heads.Categorical(3), 0, 5)),
        padded(),
    ),
    "recurrent source padded": lambda: (
        built(
            gx.Sequence(
                conditioners.Recurrent(3, 3, hidden=5, context=gx.Source(2)), heads.Categorical(3), eos=1, max_len=4
            )
        ),
        padded(),
    ),
    "stopped numbers": lambda: (stopped(heads.Stopped(heads.Normal())), None),
    "stopped positive": lambda: (stopped(heads.Stopped(heads.LogNormal())), None),
    "stopped vectors": lambda: (stopped(heads.Stopped(heads.MultivariateNormal(2)), context=2), sized(2, 2)),
    "stopped angles": lambda: (stopped(heads.Stopped(heads.VonMises())), None),
    "counts": lambda: (built(gx.Sequence(conditioners.Markov((), 1, order=2), heads.Geometric(), 0, 4)), None),
    "one site": lambda: (built(gx.Sequence(conditioners.Independent(1, 3, site=3), heads.Categorical(3), 0, 1)), None),
    "only ends": lambda: (built(gx.Sequence(conditioners.Recurrent(1, 1), heads.Categorical(1), 0, 3)), None),
}


@pytest.mark.parametrize("case", [name for name in MORE if name != "counts"])
def test_sequence_of(case):
    testing.sequence(*MORE[case]())


@pytest.mark.parametrize("name", registry.FILTERED)
def test_sequence_under_every_filter(name):
    testing.sequence(*registry.FILTERED[name]())


def test_every_filter_is_in_the_registry():
    filters = {kind for kind in vars(heads).values() if isinstance(kind, type) and issubclass(kind, heads.Filter)}
    used = {type(factory()[0].head) for factory in registry.FILTERED.values()}
    assert used == filters - {heads.Filter}


@pytest.mark.parametrize("case", ["stopped numbers", "stopped vectors", "counts"])
def test_laws_of_distributions(case):
    """Those that do not need all values, or coordinates of them."""
    module, context = MORE[case]()
    testing.gradients(module, context)
    testing.persistence(module, context)
    testing.freshness(module, context)
    y = testing.made(module, context).sample()
    testing.device(lambda: (testing.made(module, context).log_prob(y), testing.made(module, context).sample((2,))))
    there = None if context is None else context.to("meta")
    testing.meta(module, lambda m: testing.made(m, there).log_prob(y.to("meta")))
    testing.meta(module, lambda m: testing.made(m, there).sample((2,)))


def test_too_many_arrays_and_a_prefix():
    model = gx.Sequence(conditioners.Recurrent(3, 3, hidden=4), heads.Categorical(3), 0, 8)
    with pytest.raises(ValueError, match=r"Expected at most 4096 arrays; got 3\^8 = 6561"):
        testing.sequence(model)
    with pytest.raises(ValueError, match=r"Expected a distribution without a prefix; got one with."):
        testing.sequence(model().conditional_on_prefix(torch.tensor([1])))


@sequence_name
def test_copies_of_conditionals(distribution):
    """Deep copies and pickles, also of what follows a prefix."""
    module, context = distribution
    d = testing.made(module, context)
    y = d.sample((4,))
    dim = y.dim() - len(d.event_shape)
    first, rest = y.split([2, d.max_len - 2], dim)
    c = d.conditional_on_prefix(first, torch.arange(4).reshape(-1, *[1] * (dim - 1)) % 3)
    rest = c.sample()
    expected = c.log_prob(rest)
    for other in (
        copy.deepcopy(c),
        pickle.loads(pickle.dumps(c)),
        c.expand((2, *c.batch_shape)).expand([2, *c.batch_shape]),
    ):
        torch.testing.assert_close(other.log_prob(rest), expected.expand(other.batch_shape), rtol=1e-12, atol=1e-12)


def as_kind(kind, part):
    """A chain rule or a layout as one of a subclass."""
    return kind(**{field.name: getattr(part, field.name) for field in fields(part)})


def rows_of(d, value):
    """Rows, which sites are present, and the batch shape, of a distribution without a prefix."""
    shape = torch.broadcast_shapes(value.shape[: value.dim() - len(d.event_shape)], d.batch_shape)
    return *d.layout.rows(value, shape), shape


class ScoresPadding(SequenceDistribution):
    def _factors(self, value):
        factors, shape = super()._factors(value)
        y = self.layout.flat(value, shape)
        return factors - 0.1 * self.layout.gone(y), shape


class ReadsPadding(SequenceDistribution):
    """What stands after the end has a weight of its own, but not in the value."""

    def log_prob(self, value):
        y, _, shape = rows_of(self, value)
        phi = self.conditioner(y, self.chain.contexts(shape))
        return super().log_prob(value) + (phi - phi.detach())[:, -1].sum(-1).reshape(shape)


class LeaksMass(SequenceDistribution):
    def log_prob(self, value):
        return super().log_prob(value) - 1e-6


class EndsInTime(SequenceDistribution):
    """As if no sequence were longer: a mass of 1 all the same."""

    def _factors(self, value):
        factors, shape = super()._factors(value)
        ends = self.layout.ends(self.layout.flat(value, shape))
        open_ = ~ends[:, :-1].any(1)
        last = torch.where(ends[:, -1], 0.0, -torch.inf)
        return torch.cat([factors[:, :-1], torch.where(open_, last, factors[:, -1]).unsqueeze(1)], 1), shape


class OneStringTwice(SequenceDistribution):
    def enumerate_support(self, expand=True):
        support = super().enumerate_support(expand)
        return support[[1, *range(1, len(support))]]


class AnyArray(SequenceDistribution):
    @property
    def support(self):
        return AutoregressiveDistribution(self.conditioner, self.head, (self.max_len,), self.context).support


class ScoresAnyArray(SequenceDistribution):
    def log_prob(self, value):
        return super().log_prob(value).clamp(min=-50.0)


class NeverComplains(SequenceDistribution):
    class Layout(SequenceLayout):
        def check(self, y, inside, name="value"):
            pass

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.layout = as_kind(self.Layout, self.layout)


class CountsTheEnd(SequenceDistribution):
    def lengths_of(self, value):
        return (super().lengths_of(value) + 1).clamp(max=self.max_len)


class GoesOn(SequenceDistribution):
    """After the end."""

    def sample(self, sample_shape=()):
        fixed = AutoregressiveDistribution(self.conditioner, self.head, (self.max_len,), self.context)
        return fixed.expand(self.batch_shape).sample(sample_shape)


class OtherHistory(SequenceDistribution):
    """Draws from the conditionals of an all-zero history."""

    class Chain(ChainRule):
        def read(self, y):
            return y if torch.is_grad_enabled() else torch.ones_like(y)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.chain = as_kind(self.Chain, self.chain)


class SharedNoise(SequenceDistribution):
    """Rows that expand made are one draw."""

    def sample(self, sample_shape=()):
        if len(self.batch_shape) < 2:
            return super().sample(sample_shape)
        rows = super().sample(sample_shape)
        first = rows[..., :1, :, :] if len(self.batch_shape) == 2 else rows
        return first.expand(rows.shape).clone()


class ForgetsPrefix(SequenceDistribution):
    def conditional_on_prefix(self, prefix, lengths=None, max_len=None):
        return super().conditional_on_prefix(prefix.roll(1, 0), lengths, max_len)


class ForgetsLengths(SequenceDistribution):
    """Of prefixes."""

    def conditional_on_prefix(self, prefix, lengths=None, max_len=None):
        new = super().conditional_on_prefix(prefix, lengths, max_len)
        new._validate_args, new.layout = False, replace(new.layout, prefix_lengths=None)
        return new


class ForgetsFirstPart(SequenceDistribution):
    def conditional_on_prefix(self, prefix, lengths=None, max_len=None):
        new = super().conditional_on_prefix(prefix, lengths, max_len)
        if self.prefix is not None and lengths is None:
            new.layout = replace(new.layout, prefix=new.prefix.index_fill(-1, torch.tensor([0]), 1))
        return new


class KeepsItsHead(SequenceDistribution):
    def with_head(self, head):
        return self


class ChangesItself(SequenceDistribution):
    def with_head(self, head):
        self.chain = replace(self.chain, head=head)
        return self


class KnowsItsSize(SequenceDistribution):
    def log_prob(self, value):
        if self.prefix is not None:
            return super().log_prob(value)
        y, _, shape = rows_of(self, value)
        return super().log_prob(value) - 0.01 * (self.max_len - 4) * self.layout.ends(y)[:, 0].reshape(shape)


class CurveOfLater(SequenceDistribution):
    def termination_curve(self, max_len=None, num_samples=1000):
        curve = super().termination_curve(max_len, num_samples)
        return curve._replace(probability=curve.probability.roll(1, -1))


class CurveForgetsTheEnd(SequenceDistribution):
    """Of prefixes."""

    class Layout(SequenceLayout):
        def over(self, shape):
            return None

    def termination_curve(self, max_len=None, num_samples=1000):
        other = copy.copy(self)
        other.layout = as_kind(self.Layout, self.layout)
        return SequenceDistribution.termination_curve(other, max_len, num_samples)


class CurveWithoutPrefix(SequenceDistribution):
    def termination_curve(self, max_len=None, num_samples=1000):
        if self.prefix is None:
            return super().termination_curve(max_len, num_samples)
        curve = self._like_this(prefix=None, prefix_lengths=None).termination_curve(max_len, num_samples)
        over = self.layout.over(self.batch_shape).reshape(*self.batch_shape, 1)
        return curve._replace(probability=torch.where(over, 1.0, curve.probability))


class ReadsCovariates(SequenceDistribution):
    """After the end."""

    class Chain(ChainRule):
        def contexts(self, shape, present=None):
            return super().contexts(shape)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.chain = as_kind(self.Chain, self.chain)


class TooSure(SequenceDistribution):
    def termination_curve(self, max_len=None, num_samples=1000):
        curve = super().termination_curve(max_len, num_samples)
        return curve._replace(standard_error=0 * curve.standard_error)


class WrongAfterPrefix(SequenceDistribution):
    def sample(self, sample_shape=()):
        y = super().sample(sample_shape)
        return y if self.prefix is None else torch.full_like(y, self.eos)


class WrongEntropy(SequenceDistribution):
    def entropy(self):
        return super().entropy() + 1e-3


def double(kind):
    """Two rows, one of them new by its context."""
    torch.manual_seed(0)
    net = built(conditioners.Recurrent(3, 3, hidden=5, context=2))
    return kind(net, heads.Categorical(3), 0, 4, sized(2, 2, seed=1))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LeaksMass, "mass of all strings"),
        (ScoresPadding, "mass of all strings"),
        (EndsInTime, "entropy"),
        (ReadsPadding, "gradient of the parameters after the end|log_prob, whatever is read"),
        (OneStringTwice, "enumerate_support"),
        (WrongEntropy, "entropy"),
        (AnyArray, r"support\]: .* is inside"),
        (ScoresAnyArray, "log_prob of what is no sequence"),
        (NeverComplains, r"log_prob of \[0, 0, 0, 1\], validated"),
        (CountsTheEnd, "lengths"),
        (GoesOn, r"sample\]: a value outside the support"),
        (SharedNoise, r"sample of expand\]: chi-square"),
        (ForgetsPrefix, "log_prob after 1 sites"),
        (ForgetsLengths, "log_prob after up to"),
        (ForgetsFirstPart, "log_prob after 1 and"),
        (KeepsItsHead, "log_prob with another head"),
        (ChangesItself, "log_prob after with_head"),
        (KnowsItsSize, "log_prob, max_len=|log_prob, two more sites"),
        (CurveOfLater, "termination_curve"),
        (TooSure, "termination_curve"),
        (CurveForgetsTheEnd, "termination_curve after a prefix, ended"),
        (CurveWithoutPrefix, r"termination_curve after a prefix\]: off by"),
        (WrongAfterPrefix, r"sample after a prefix\]"),
        (OtherHistory, r"sample\]: chi-square|termination_curve"),
    ],
)
def test_sequence_has_power(kind, message):
    with pytest.raises(AssertionError, match=f"sequence broken .({message})"):
        testing.sequence(double(kind))


def test_covariates_have_power():
    net = built(conditioners.Markov(3, 3, order=1, hidden=(5,), context=gx.Covariates(2)))
    with pytest.raises(AssertionError, match=r"sequence broken .(gradient of covariates|log_prob, covariates NaN)"):
        testing.sequence(ReadsCovariates(net, heads.Categorical(3), 0, 4, sized(2, 4, 2, seed=1)))


def test_the_double_is_lawful():
    testing.sequence(double(SequenceDistribution))
