"""Hidden Markov models against all state paths, Pyro's DiscreteHMM, a forward algorithm by hand."""

from __future__ import annotations

from itertools import product

import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx
from support.hidden_markov import OBSERVED, made, of_paths, parameters, spread
from support.values import sized

F64, INF, NAN = torch.float64, float("inf"), float("nan")


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("sites", [1, 2, 5])
@pytest.mark.parametrize("observed", OBSERVED)
def test_all_paths(observed, sites, zeros):
    """Every length, in one batch with NaN or nonsense in padding; steps that differ, or do not."""
    for states in (2, 3):
        for steps in (None, 1, sites - 1):
            rows = sites + 1
            given = parameters(states, sites, (rows,), steps, zeros)
            lengths = torch.arange(rows)
            d = made(observed, given, sites, lengths=lengths)
            x = made(observed, given, sites).sample()
            gone = torch.arange(sites) >= lengths[:, None]
            nothing = NAN if x.is_floating_point() else -100
            seen = x.masked_fill(gone.reshape(*gone.shape, *[1] * (x.dim() - 2)), nothing)
            posterior, log_prob, filtered = d.posterior(seen), d.log_prob(seen), d.filter(seen)
            assert torch.equal(posterior.log_partition, log_prob)
            assert (posterior.log_prob(posterior.sample((3,))) > -INF).all()
            for n in range(rows):
                row = [p[n] if p.dim() > 2 or p is given[0] else p for p in given]
                z, joint = of_paths(observed, row, x[n, :n])
                total = joint.logsumexp(0)
                assert log_prob[n] == pytest.approx(total.item(), abs=1e-10)
                if n:
                    torch.testing.assert_close(
                        posterior.marginals[n, :n], spread((joint - total).exp(), z, states), rtol=1e-10, atol=1e-10
                    )
                    assert joint[(z == posterior.mode[n, :n]).all(-1)].item() == pytest.approx(joint.max().item())
                for t in range(n):
                    z, joint = of_paths(observed, row, x[n, : t + 1])
                    last = spread(joint.softmax(0), z, states)[-1]
                    torch.testing.assert_close(filtered[n, t], last, rtol=1e-10, atol=1e-10)
                assert (filtered[n, n:] == 0).all()


def pyros(observed, given, sites):
    """Pyro's model of the same: it steps once from a first state (any) before what is observed, here by a step to ``initial``."""
    initial, transition, p = given
    states = initial.shape[-1]
    steps = transition if transition.dim() > 2 else transition.unsqueeze(0)
    batch = torch.broadcast_shapes(initial.shape[:-1], steps.shape[:-3])
    first = initial[..., None, None, :].expand(*batch, 1, states, states)
    steps = torch.cat([first, steps.expand(*batch, sites - 1, states, states)], -3)
    return dist.DiscreteHMM(torch.zeros(states, dtype=initial.dtype), steps, OBSERVED[observed](p), duration=sites)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("steps", [None, 1, 5])
@pytest.mark.parametrize("observed", ["categorical", "normal", "multivariate"])
def test_as_pyros(observed, steps, zeros):
    given = parameters(3, 6, (4,), steps, zeros)
    d, theirs = made(observed, given, 6), pyros(observed, given, 6)
    x = d.sample((2,))
    torch.testing.assert_close(d.log_prob(x), theirs.log_prob(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d.filter(x)[..., -1, :], theirs.filter(x).probs, rtol=1e-10, atol=1e-10)


def test_pyro_from_its_own_initial():
    """The distribution of the first observed state is Pyro's initial one times the transition."""
    initial, transition, p = parameters(3, 5)
    x, emitted = sized(2, 5), OBSERVED["normal"](p[0])
    first = initial.softmax(-1) @ transition.softmax(-1)
    theirs = dist.DiscreteHMM(initial, transition, emitted).log_prob(x)
    ours = gx.HiddenMarkov(first.log(), transition, emitted, duration=5).log_prob(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_thousand_sites_by_hand():
    given = parameters(4, 1000)
    d = made("normal", given, 1000)
    x = d.sample((2,))
    likelihood = OBSERVED["normal"](given[2][0]).log_prob(x.unsqueeze(-1)).exp()
    p, total = given[0].softmax(-1), torch.zeros(2, dtype=F64)
    for t in range(1000):
        p = likelihood[:, t] * (p @ given[1].softmax(-1) if t else p)
        total, p = total + p.sum(-1).log(), p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(d.log_prob(x), total, rtol=1e-12, atol=1e-12)
    single = gx.HiddenMarkov(
        given[0].float(), given[1].float(), OBSERVED["normal"](given[2].float()), duration=1000
    ).log_prob(x.float())
    torch.testing.assert_close(single.double(), total, rtol=1e-5, atol=1e-5)


def test_dtypes():
    """Results have the wider of the dtypes of the values and of the model, as Pyro's."""
    given = [p.float() for p in parameters(3, 4)]
    d, x = made("normal", given, 4), sized(2, 4, seed=7)
    wide = made("normal", [p.double() for p in given], 4)
    for value, like in ((x, wide), (x.float(), d)):
        log_prob = d.log_prob(value)
        assert log_prob.dtype == d.filter(value).dtype == d.posterior(value).marginals.dtype == value.dtype
        assert log_prob.dtype == pyros("normal", given, 4).log_prob(value).dtype
        torch.testing.assert_close(log_prob, like.log_prob(value), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide.log_prob(x.float()), wide.log_prob(x.float().double()), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"Expected observation_dist.dtype == torch.float32 .* got torch.float64"):
        gx.HiddenMarkov(*given[:2], wide.observation_dist, duration=4)


def test_supports_of_states():
    """A value that some states cannot show is scored by the others; one that none can, by none, with gradient zero."""
    low = torch.tensor([0.0, 2.0], dtype=F64, requires_grad=True)
    logits = torch.zeros(2, dtype=F64, requires_grad=True)
    d = gx.HiddenMarkov(logits, logits.expand(2, 2), dist.Uniform(low, low + 3), duration=2, validate_args=True)
    x = torch.tensor([[1.0, 4.0], [2.5, 2.5], [0.5, 0.5]], dtype=F64)
    torch.testing.assert_close(d.log_prob(x).exp(), torch.tensor([0.25, 1.0, 0.25], dtype=F64) / 9)
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.tensor([1.0, 5.5], dtype=F64))
    d = gx.HiddenMarkov(logits, logits.expand(2, 2), dist.Uniform(low, low + 3), duration=2, validate_args=False)
    wrong = torch.tensor([[1.0, 5.5], [-INF, 1.0], [1.0, 1.0]], dtype=F64)
    log_prob = d.log_prob(wrong)
    assert log_prob.tolist()[:2] == [-INF, -INF] and log_prob[2].isfinite()
    one = torch.autograd.grad(d.log_prob(wrong[2]), [low, logits], retain_graph=True)
    for grad, expected in zip(torch.autograd.grad(log_prob.sum(), [low, logits]), one, strict=True):
        torch.testing.assert_close(grad, expected)


def test_impossible_by_transitions():
    stay = torch.eye(2, dtype=F64).log().requires_grad_()
    emitted = dist.Categorical(logits=torch.eye(2, dtype=F64).log(), validate_args=False)
    d = gx.HiddenMarkov(torch.zeros(2, dtype=F64), stay, emitted, duration=3)
    x = torch.tensor([[0, 1, 1], [1, 1, 1]])
    torch.testing.assert_close(d.log_prob(x).exp(), torch.tensor([0.0, 0.5], dtype=F64))
    assert torch.autograd.grad(d.log_prob(x).exp().sum(), stay)[0].isfinite().all()
    free = gx.HiddenMarkov(d.initial, stay, emitted, duration=3, validate_args=False)
    torch.testing.assert_close(torch.func.vmap(free.log_prob)(x), d.log_prob(x))

    def total(transition):
        return gx.HiddenMarkov(d.initial, transition, emitted, duration=3, validate_args=False).log_prob(x[1])

    grad = torch.autograd.grad(total(stay), stay)[0]
    torch.testing.assert_close(torch.func.grad(total)(stay.detach()), grad)
    for query in (d.filter, lambda x: d.posterior(x).marginals):
        with pytest.raises(ValueError, match=r"got none for row \(0,\)"):
            query(x)


def test_missing_observations():
    """Those of a mask are summed out, whatever stands in their place."""
    given = parameters(3, 4)
    emitted = OBSERVED["categorical"](given[2][0])
    seen = torch.tensor([True, False, True, False])
    d = gx.HiddenMarkov(*given[:2], emitted.mask(seen.unsqueeze(-1)), duration=4)
    full = gx.HiddenMarkov(*given[:2], emitted, duration=4)
    x, every = torch.tensor([1, 0, 0, 1]), full.enumerate_support()
    alike = (every == x)[:, seen].all(-1)
    torch.testing.assert_close(d.log_prob(x), full.log_prob(every[alike]).logsumexp(0))
    weights = full.log_prob(every[alike]).softmax(0)
    smooth = (weights[:, None, None] * full.posterior(every[alike]).marginals).sum(0)
    torch.testing.assert_close(d.posterior(x).marginals, smooth)


@pytest.mark.parametrize("observed", ["categorical", "independent"])
def test_batch_shapes(observed):
    """Arguments of different batch shapes, values of more and of fewer dims, expand: each row is what it is alone."""
    initial, transition, p = sized(2, 1, 3, seed=1), sized(4, 1, 3, 3, seed=2), sized(2, 1, 5, 3, 2, seed=3)
    lengths = torch.tensor([5, 3, 1, 0])
    d = gx.HiddenMarkov(initial, transition, OBSERVED[observed](p), lengths)
    assert d.batch_shape == (2, 4) and d.event_shape == (5, *d.observation_dist.event_shape)
    x, wide = d.sample((7,)), d.expand((6, 2, 4))
    assert wide.batch_shape == (6, 2, 4) and wide.sample((3,)).shape == (3, 6, 2, 4, *d.event_shape)
    log_prob, marginals = d.log_prob(x), d.posterior(x).marginals
    assert log_prob.shape == (7, 2, 4) and marginals.shape == d.filter(x).shape == (7, 2, 4, 5, 3)
    for i, j in product(range(2), range(4)):
        one = gx.HiddenMarkov(initial[i, 0], transition[j], OBSERVED[observed](p[i, 0]), lengths[j])
        torch.testing.assert_close(log_prob[:, i, j], one.log_prob(x[:, i, j]))
        torch.testing.assert_close(marginals[:, i, j], one.posterior(x[:, i, j]).marginals)
        torch.testing.assert_close(d.filter(x)[:, i, j], one.filter(x[:, i, j]))
        if observed == "independent":
            torch.testing.assert_close(d.mean[i, j], one.mean)
    torch.testing.assert_close(wide.log_prob(x[0]), log_prob[0].expand(6, 2, 4))
    torch.testing.assert_close(d.log_prob(x[0, 0, 0]), d.log_prob(x[0, 0, 0].expand_as(x[0])))
    assert wide.filter(x[0]).shape == (6, 2, 4, 5, 3) and wide.mean.shape == (6, 2, 4, *d.event_shape)


def test_moments():
    given = parameters(3, 3, zeros=True)
    d = gx.HiddenMarkov(*given[:2], dist.Bernoulli(logits=given[2][0, :, 0]), duration=3)
    every = d.enumerate_support()
    weight = d.log_prob(every).exp().unsqueeze(-1)
    mean = (weight * every).sum(0)
    torch.testing.assert_close(d.mean, mean)
    torch.testing.assert_close(d.variance, (weight * every.square()).sum(0) - mean.square())
    d = made("independent", parameters(3, 4, (2,), 3), 4, lengths=torch.tensor([4, 2]))
    x = d.sample((40000,))
    assert ((x.mean(0) - d.mean).abs() <= 5 * (d.variance / 40000).sqrt()).all()
    torch.testing.assert_close(x.var(0), d.variance, rtol=0.06, atol=0.0)


def test_moments_of_states_without_weight():
    """Infinite or undefined ones of states that cannot be, and of padding, count for nothing."""
    initial, stay = torch.tensor([0.0, -INF, -INF], dtype=F64, requires_grad=True), torch.eye(3, dtype=F64).log()
    df = torch.tensor([5.0, 1.5, 0.5], dtype=F64)
    loc = torch.tensor([2.0, 0.0, 0.0], dtype=F64, requires_grad=True)
    d = gx.HiddenMarkov(initial, stay, dist.StudentT(df, loc, 1.0), torch.tensor([1, 2]), duration=2)
    assert d.observation_dist.variance.isfinite().tolist() == [True, False, False]
    assert d.mean.tolist() == [[2, 0], [2, 2]]
    torch.testing.assert_close(d.variance, torch.tensor([[5, 0], [5, 5]], dtype=F64) / 3)
    grads = torch.autograd.grad(d.mean.sum() + d.variance.sum(), [loc, initial])
    assert [g.tolist() for g in grads] == [[3, 0, 0], [0, 0, 0]]
    heavy = gx.HiddenMarkov(initial, stay, dist.Pareto(1.0, df), duration=2)
    assert heavy.observation_dist.mean[2] == INF and heavy.mean.tolist() == [1.25, 1.25]
    none = gx.HiddenMarkov(initial, stay, dist.Cauchy(loc.detach(), 1.0), torch.tensor(1), duration=2)
    assert none.mean.isnan().tolist() == [True, False] and none.variance.isfinite().tolist() == [False, True]


def test_each_site_has_its_own_draw():
    """Of an observation_dist without a dim of sites, and of batch rows."""
    stay = torch.eye(2, dtype=F64).log()
    d = gx.HiddenMarkov(torch.zeros(2, dtype=F64), stay, dist.Normal(torch.zeros(2, dtype=F64), 1.0), duration=50)
    x = d.expand((40,)).sample()
    assert x.unique().numel() == x.numel() == 2000
    along, across = (((x[:, 1:] * x[:, :-1]).mean()), (x[1:] * x[:-1]).mean())
    assert along.abs() < 5 / 2000**0.5 and across.abs() < 5 / 2000**0.5


@pytest.mark.parametrize("lengths", [[3, 3], [2, 2], [0, 0], 2])
def test_enumerated_rows_of_one_length(lengths):
    """All Boolean sequences of the length, padding 0, with probabilities that sum to one."""
    given = parameters(2, 3, (2,), 2)
    d = gx.HiddenMarkov(*given[:2], dist.Bernoulli(logits=given[2][..., 0]), torch.tensor(lengths), duration=3)
    assert d.has_enumerate_support
    used = d.lengths.max()
    every = d.enumerate_support(expand=False)
    assert every.shape == (2**used, 1, 3) and d.enumerate_support().shape == (2**used, 2, 3)
    expected = [[*digits, *[0] * (3 - used)] for digits in product((0, 1), repeat=int(used))]
    assert every[:, 0].tolist() == expected
    torch.testing.assert_close(d.log_prob(every).exp().sum(0), torch.ones(2, dtype=F64))
    ragged = gx.HiddenMarkov(*given[:2], d.observation_dist, torch.tensor([3, 1]))
    assert not ragged.has_enumerate_support
    with pytest.raises(
        NotImplementedError, match=r"Expected rows of equal lengths for enumeration; got lengths \[1, 3\]\."
    ):
        ragged.enumerate_support()
    assert not made("normal", given, 3, lengths=torch.tensor(2)).has_enumerate_support


def test_samples_fit():
    """Frequencies of all sequences, steps that differ and impossible ones included, within five deviations of chi-square."""
    d = made("categorical", parameters(3, 4, (2,), 3, zeros=True), 4)
    every = d.enumerate_support(expand=False).squeeze(1)
    p = d.log_prob(every.unsqueeze(1)).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(2, dtype=F64))
    x = d.sample((20000,))
    counts, expected = (x.unsqueeze(0) == every[:, None, None]).all(-1).sum(1).to(F64), 20000 * p
    assert (counts[p < 1e-12] == 0).all()
    rare = expected < 5
    for row in range(2):
        cells = [
            torch.cat([n[~rare[:, row], row], n[rare[:, row], row].sum(0, keepdim=True)]) for n in (counts, expected)
        ]
        chi = ((cells[0] - cells[1]).square() / cells[1].clamp(min=1e-300)).sum()  # 0 where nothing is rare
        assert chi < len(cells[0]) + 5 * (2 * len(cells[0])) ** 0.5


def test_states_are_sampled_from_their_posterior():
    d = made("normal", parameters(3, 4), 4)
    x = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=F64)
    z, joint = of_paths("normal", parameters(3, 4), x)
    draws = d.posterior(x).sample((20000,))
    counts = (draws == z[:, None]).all(-1).sum(-1)
    expected = 20000 * joint.softmax(0)
    kept = expected > 5
    chi = ((counts - expected).square() / expected)[kept].sum()
    assert kept.sum() > 20 and chi < kept.sum() + 5 * (2 * kept.sum()) ** 0.5


def test_prior():
    given = parameters(3, 4, (2,), 3, zeros=True)
    prior = made("normal", given, 4).prior()
    torch.testing.assert_close(prior.log_partition, torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)
    p = given[0].softmax(-1)
    for t in range(4):
        torch.testing.assert_close(prior.marginals[:, t], p)
        p = torch.einsum("bi,bij->bj", p, given[1][:, t].softmax(-1)) if t < 3 else p


def test_extremes():
    """Logits and observations far out, in float32 too: finite, as in log space."""
    given = parameters(3, 6)
    x = torch.tensor([0.0, 1e4, -1e4, 3.0, 1e6, 0.0], dtype=F64)
    for scale in (1.0, 1e3, 1e5):
        far = (given[0] * scale, given[1] * scale, given[2])
        joint = of_paths("normal", far, x)[1]
        log = made("normal", far, 6).log_prob(x)
        reference = pyros("normal", far, 6).log_prob(x)
        torch.testing.assert_close(log, reference, rtol=1e-12, atol=0)
        assert log == pytest.approx(joint.logsumexp(0).item(), rel=1e-12) or joint.logsumexp(0) == -INF
