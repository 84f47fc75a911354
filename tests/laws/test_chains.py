"""Chains of labels: every query is what enumeration of all label strings tells, for every length."""

from dataclasses import replace

import pytest
import torch

from pyro_genexact import LinearChainCRF, testing
from pyro_genexact.chains.inference import ChainInference
from support import registry
from support.values import sized


@pytest.mark.parametrize("distribution_name", registry.CHAINS)
def test_chain(distribution):
    testing.chain(*distribution, draws=1000)


def crf(kind=LinearChainCRF, lengths=(3, 1, 2)):
    """Three rows of three sites with two labels, a transition of its own for each step, both ends."""
    return kind(
        sized(3, 3, 2),
        2 * sized(3, 2, 2, 2, seed=5),
        initial=sized(2),
        final=sized(2, seed=1),
        lengths=torch.tensor(lengths),
    )


def without(potentials, *labels):
    return potentials.index_fill(-1, torch.tensor(labels), -torch.inf)


CASES = {
    "two sites": lambda: LinearChainCRF(sized(3, 2, 3), sized(3, 1, 3, 3), lengths=torch.tensor([2, 1, 0])),
    "one label": lambda: LinearChainCRF(sized(3, 3, 1), sized(1, 1), lengths=torch.tensor([2, 1, 0])),
    "broadcast": lambda: LinearChainCRF(
        sized(2, 1, 3, 2), sized(3, 1, 2, 2), initial=sized(2, 1, 2), lengths=torch.tensor([[0, 3, 2]])
    ),
    "expanded": lambda: LinearChainCRF(sized(1, 3, 2), sized(2, 2), lengths=torch.tensor([2])).expand((2, 3)),
    "one label at most at the ends": lambda: LinearChainCRF(
        sized(2, 3, 3), sized(3, 3), initial=without(sized(3), 1, 2), final=without(sized(3), 0)
    ),
    "large": lambda: LinearChainCRF(
        1e3 * sized(2, 3, 3), 1e3 * sized(3, 3), initial=1e3 * sized(3), lengths=torch.tensor([3, 1])
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_chain_of(case):
    testing.chain(CASES[case](), draws=1000)


def test_too_many_strings():
    with pytest.raises(ValueError, match=r"Expected at most 4096 label strings; got 3\^8 = 6561"):
        testing.chain(LinearChainCRF(sized(8, 3), sized(3, 3)))


class Broken(LinearChainCRF):
    """Whose inference is of another class."""

    broken = ChainInference

    @property
    def inference(self):
        return self.broken(**vars(super().inference))


class TurnedTransitions(Broken):
    class broken(ChainInference):
        def potentials(self, rows=None):
            chain = super().potentials(rows)
            return chain._replace(transition=chain.transition.mT)


class TurnedInScore(Broken):
    class broken(ChainInference):
        def score(self, value):
            unary, transition, *ends = self.given
            return ChainInference.score(replace(self, given=(unary, transition.mT, *ends)), value)


class TurnedPairs(LinearChainCRF):
    @property
    def pair_marginals(self):
        return super().pair_marginals.mT


class OffByLittle(Broken):
    class broken(ChainInference):
        def log_partition(self):
            return super().log_partition() + 1e-3


class WrongOfEmpty(LinearChainCRF):
    @property
    def log_partition(self):
        return super().log_partition + (0 if self.lengths is None else 1e-3 * (self.lengths == 0))


class FinalOfTheLastSite(Broken):
    """Where the padding ends, not the row."""

    class broken(ChainInference):
        def score(self, value):
            *others, final = self.given
            whole = ChainInference.score(replace(self, given=(*others, None)), value)
            return whole + final[value[..., -1] % 2]


class ReadsPadding(LinearChainCRF):
    def log_prob(self, value):
        return super().log_prob(value) + 1e-3 * (value == -100).any(-1)


class MassInPadding(LinearChainCRF):
    @property
    def marginals(self):
        return super().marginals.masked_fill(self.padding().unsqueeze(-1), 0.5)


class GradientInPadding(LinearChainCRF):
    def entropy(self):
        noughts = self.unary - self.unary.detach()
        return super().entropy() + torch.where(self.padding().unsqueeze(-1), noughts, 0).nansum((-1, -2))


class TimesZero(LinearChainCRF):
    """A mask that multiplies."""

    @property
    def log_partition(self):
        return super().log_partition + 0 * self.unary.sum((-1, -2))


class CountsPadding(LinearChainCRF):
    def entropy(self):
        return super().entropy() + self.padding().sum(-1) * 0.1


class DetachedMarginals(LinearChainCRF):
    @property
    def marginals(self):
        return super().marginals.detach()


class DetachedEntropy(LinearChainCRF):
    def entropy(self):
        return super().entropy().detach()


class DetachedTransitions(Broken):
    class broken(ChainInference):
        def potentials(self, rows=None):
            chain = super().potentials(rows)
            return chain._replace(transition=chain.transition.detach())


class HalfGradient(Broken):
    """Of the score, not of log Z."""

    class broken(ChainInference):
        def score(self, value):
            score = super().score(value)
            return 0.5 * score + 0.5 * score.detach()


class OtherWithGrad(LinearChainCRF):
    @property
    def marginals(self):
        return super().marginals * (1.001 if torch.is_grad_enabled() else 1.0)


class SiteBySite(LinearChainCRF):
    """The labels that are best each for itself."""

    @property
    def mode(self):
        return self.marginals.argmax(-1)


class LabelsInPadding(LinearChainCRF):
    @property
    def mode(self):
        return super().mode.masked_fill(self.padding(), 1)


class Unnormalised(LinearChainCRF):
    @property
    def max_log_prob(self):
        return self.score(self.mode)


class OneTwice(LinearChainCRF):
    def k_best(self, k):
        strings, log_prob = super().k_best(k)
        return strings[[0, 0, *range(2, k)]], log_prob


class WorstFirst(LinearChainCRF):
    def k_best(self, k):
        strings, log_prob = super().k_best(k)
        return strings.flip(0), log_prob.flip(0)


class OnlyTheBest(LinearChainCRF):
    """No end of strings."""

    def k_best(self, k):
        strings, log_prob = super().k_best(k)
        return strings, log_prob.where(log_prob > -torch.inf, log_prob[0])


class Tempered(LinearChainCRF):
    def sample(self, sample_shape=()):
        options = {"initial": self.initial, "final": self.final, "lengths": self.lengths}
        return (
            LinearChainCRF(0.7 * self.unary, self.transition, **options).expand(self.batch_shape).sample(sample_shape)
        )


class Uniform(LinearChainCRF):
    """Regardless of what is possible."""

    def sample(self, sample_shape=()):
        labels = torch.randint(self.num_labels, (*sample_shape, *self.batch_shape, *self.event_shape))
        return labels.masked_fill(self.padding(), 0)


class DrawsPadding(LinearChainCRF):
    def sample(self, sample_shape=()):
        return super().sample(sample_shape).masked_fill(self.padding(), 1)


class SharedNoise(LinearChainCRF):
    """Rows that expand made are one draw."""

    def sample(self, sample_shape=()):
        if self.batch_shape == self._rows:
            return super().sample(sample_shape)
        return self.expand(self._rows).sample(sample_shape).expand(*sample_shape, *self.batch_shape, -1)

    def expand(self, batch_shape, _instance=None):
        new = super().expand(self.batch_shape, _instance)
        new._batch_shape = torch.Size(batch_shape)
        return new


class ForgetsFinal(LinearChainCRF):
    def as_autoregressive(self):
        options = {"initial": self.initial, "lengths": self.lengths}
        return LinearChainCRF(self.unary, self.transition, **options).as_autoregressive()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TurnedTransitions, "log_partition"),
        (TurnedInScore, "log_prob, 0 for padding"),
        (TurnedPairs, "pair_marginals"),
        (OffByLittle, "log_partition"),
        (WrongOfEmpty, "log_partition, every length"),
        (FinalOfTheLastSite, "log_prob, 0 for padding"),
        (ReadsPadding, "log_prob, -100 for padding"),
        (MassInPadding, "marginals"),
        (GradientInPadding, "gradient of entropy in unary"),
        (TimesZero, "log_partition, -inf for padding.: nan"),
        (CountsPadding, "entropy"),
        (DetachedMarginals, "gradient of marginals in unary"),
        (DetachedEntropy, "gradient of entropy in unary"),
        (DetachedTransitions, "marginals, gradient of log_partition in transition"),
        (HalfGradient, "gradient of log_prob in unary"),
        (OtherWithGrad, "marginals, with grad"),
        (SiteBySite, "log_prob of the mode"),
        (LabelsInPadding, "padding of mode"),
        (Unnormalised, "max_log_prob"),
        (OneTwice, "strings of k_best"),
        (WorstFirst, "log_prob of k_best"),
        (OnlyTheBest, "log_prob of k_best"),
        (Tempered, r"sample\]: chi-square"),
        (DrawsPadding, r"sample\]: a value of probability 0"),
        (SharedNoise, r"sample of expand\]: chi-square"),
        (ForgetsFinal, "as_autoregressive"),
    ],
)
def test_chain_has_power(kind, message):
    with pytest.raises(AssertionError, match=f"chain broken .{message}"):
        testing.chain(crf(kind))


def test_k_best_of_equal_strings():
    """Where all are equal, only the strings themselves tell."""
    zeros = torch.zeros(2, 3, 2, dtype=torch.float64)
    testing.chain(LinearChainCRF(zeros, zeros[0, :2]))
    with pytest.raises(AssertionError, match=r"chain broken \[k_best\]: a string occurs twice"):
        testing.chain(OneTwice(zeros, zeros[0, :2]))


def test_impossible_draws():
    lengths, potentials = torch.tensor([3, 2]), sized(2, 3, 3)
    transition = sized(3, 3).fill_diagonal_(-torch.inf)
    testing.chain(LinearChainCRF(potentials, transition, lengths=lengths))
    with pytest.raises(AssertionError, match=r"chain broken \[sample\]: a value of probability 0"):
        testing.chain(Uniform(potentials, transition, lengths=lengths))
