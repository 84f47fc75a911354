"""Values, lengths and categories of every dtype."""

import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads, testing
from pyro_genexact.contexts import Source
from pyro_genexact.families.in_support import with_support
from pyro_genexact.testing import made
from pyro_genexact.testing.kinds import INTEGERS
from support import registry

MODELS = registry.DISTRIBUTIONS | registry.FILTERED


@pytest.mark.parametrize("name", MODELS)
def test_distribution(name):
    module, context = MODELS[name]()
    with torch.no_grad():
        d = made(module, context)
        testing.kinds(d, d.sample())


def test_distribution_head(distribution_head, device):
    like = next(distribution_head.parameters(), torch.empty(0, dtype=torch.float64, device=device))
    sites = distribution_head.num_sites or 3
    with torch.no_grad():
        d = distribution_head(like.new_zeros(2, sites, distribution_head.num_params))
        testing.kinds(with_support(d, distribution_head.support), d.sample())


SITES = 200  # more than an int8 holds
LENGTHS = torch.tensor([100, 3, 0])
ROWS = torch.linspace(-2, 2, 3 * SITES).reshape(3, SITES)
SOURCES = torch.linspace(-1, 1, 3 * SITES * 2).reshape(3, SITES, 2)


def series():
    torch.manual_seed(0)
    return gx.Autoregressive(conditioners.Recurrent((), 2, hidden=4), heads.Normal(), (SITES,))


def labels():
    torch.manual_seed(0)
    return torch.randn(3, SITES, SITES), torch.randn(SITES, SITES)


def attending():
    torch.manual_seed(0)
    net = conditioners.Transformer((), 2, width=8, num_heads=2, depth=1, context=Source(2))
    return gx.Autoregressive(net, heads.Normal(), (3,))


BY_LENGTHS = {
    "autoregressive": lambda n: series()(lengths=n).log_prob(ROWS),
    "flow": lambda n: gx.flows.maf(SITES, transforms=1, hidden=(8,))(lengths=n).log_prob(ROWS),
    "flow sample": lambda n: gx.flows.maf(SITES, transforms=2, hidden=(8,))(lengths=n).sample(),
    "crf": lambda n: gx.LinearChainCRF(*labels(), lengths=n).log_partition,
    "crf mode": lambda n: gx.LinearChainCRF(*labels(), lengths=n).mode,
    "hidden markov": lambda n: gx.HiddenMarkov(
        torch.zeros(2), torch.eye(2), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0), n, duration=SITES
    ).log_prob(ROWS),
    "source": lambda n: attending()(SOURCES, source_lengths=n).log_prob(ROWS[:, :3]),
    "padded source": lambda n: attending().conditioner(ROWS[:, :3], gx.PaddedSequence(SOURCES, n)),
    "prefix": lambda n: (
        gx.Sequence(conditioners.Recurrent(SITES, SITES, hidden=4), heads.Categorical(SITES), 0, SITES)()
        .conditional_on_prefix(torch.ones(3, 120, dtype=torch.long), lengths=n)
        .sample()
    ),
}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", BY_LENGTHS)
def test_lengths(name, dtype):
    found = []
    for lengths in (LENGTHS, LENGTHS.to(dtype)):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(BY_LENGTHS[name](lengths))
    assert torch.equal(*found)


NETS = {
    "MADE": lambda: conditioners.MADE(5, SITES, site=SITES, hidden=(16,)),
    "NADE": lambda: conditioners.NADE(5, SITES, site=SITES, hidden=8),
    "Recurrent": lambda: conditioners.Recurrent(SITES, SITES, hidden=8),
    "Transformer": lambda: conditioners.Transformer(SITES, SITES, width=8, num_heads=2, depth=1),
    "Markov": lambda: conditioners.Markov(SITES, SITES, order=2, hidden=(8,)),
    "mixed": lambda: conditioners.MADE(5, SITES, site=[SITES] * 5, hidden=(16,)),
}
LABELS = torch.arange(15).reshape(3, 5) * 8  # to 112


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_categories(name, dtype):
    """More categories than the dtype of some of them has numbers."""
    model = gx.Autoregressive(NETS[name](), heads.Categorical(SITES), (5,))
    phi = model.conditioner(LABELS)
    with torch.no_grad():
        assert torch.equal(model.conditioner(LABELS.to(dtype)), phi)
        assert torch.equal(model().log_prob(LABELS.to(dtype)), model().log_prob(LABELS))
        sequences = gx.Sequence(model.conditioner, model.head, eos=SITES - 1, max_len=5)()
        assert torch.equal(sequences.log_prob(LABELS.to(dtype)), sequences.log_prob(LABELS))
    crf = gx.LinearChainCRF(torch.randn(3, 5, SITES), torch.randn(SITES, SITES))
    assert torch.equal(crf.log_prob(LABELS.to(dtype)), crf.log_prob(LABELS))
    assert torch.equal(crf.score(LABELS.to(dtype)), crf.score(LABELS))


def test_columns_of_a_float32_model_stay_float32():
    head = heads.PerSite([heads.Normal(), heads.StudentT(df=torch.tensor(3.0, dtype=torch.float64)), heads.Binomial(4)])
    d = gx.Autoregressive(conditioners.MADE(3, head.num_params), head, (3,))()
    y = d.sample((2,))
    assert y.dtype == d.log_prob(y).dtype == d.log_prob_sites(y).dtype == torch.float32


class Narrow(dist.Categorical):
    """Compares values in their own dtype, as torch does."""

    def log_prob(self, value):
        if value.is_complex():
            raise TypeError("complex")
        return super().log_prob(value)


def test_kinds_has_power():
    with pytest.raises(AssertionError, match=r"kinds broken \[torch.int8, validating\]: ValueError"):
        testing.kinds(Narrow(torch.ones(200) / 200, validate_args=True), torch.tensor(3))
    with pytest.raises(AssertionError, match=r"kinds broken \[complex values, validating\]: no error"):
        testing.kinds(dist.Normal(0.0, 1.0), torch.tensor(0.5))


def test_kinds_leaves_the_distribution_as_it_is():
    d = gx.distributions.DiscretizedLogistic(torch.zeros(2), torch.ones(2), levels=3, validate_args=True)
    testing.kinds(d, torch.ones(2))
    assert d._validate_args
