"""LinearChainCRF where potentials are extreme, against recursions in log space with 64 bits of mantissa (numpy.longdouble)."""

import numpy as np
import pytest
import torch

import pyro_genexact as gx
from pyro_genexact.chains.messages import LogMessages, MergedMessages, ScaledMessages, messages_of, select_rows
from pyro_genexact.semirings import ChainPotentials

INF = torch.inf


def lse(values, axis):
    top = values.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - top).sum(axis)) + top.squeeze(axis)


class Truth:
    """Rows (B, N, V) of steps (V, V) or (B, N - 1, V, V), in log space; all rows of full length."""

    def __init__(self, unary, transition, initial=None, final=None):
        unary = self.wide(unary).copy()
        unary[:, 0] += 0 if initial is None else self.wide(initial)
        unary[:, -1] += 0 if final is None else self.wide(final)
        batch, sites, labels = unary.shape
        self.unary, self.steps = unary, np.broadcast_to(self.wide(transition), (batch, sites - 1, labels, labels))
        forward, backward, best = [unary[:, 0]], [np.zeros_like(unary[:, 0])], unary[:, 0]
        for t in range(1, sites):
            forward.append(lse(forward[-1][..., None] + self.steps[:, t - 1], -2) + unary[:, t])
            best = (best[..., None] + self.steps[:, t - 1]).max(-2) + unary[:, t]
            later = (unary[:, sites - t] + backward[-1])[:, None]
            backward.append(lse(self.steps[:, sites - t - 1] + later, -1))
        self.forward, self.backward = np.stack(forward, 1), np.stack(backward[::-1], 1)
        self.log_z, self.best = lse(self.forward[:, -1], -1), best.max(-1)
        self.marginals = np.exp(self.forward + self.backward - self.log_z[:, None, None])
        later = (self.unary + self.backward)[:, 1:, None]
        self.pairs = np.exp(self.forward[:, :-1, :, None] + self.steps + later - self.log_z[:, None, None, None])

    @staticmethod
    def wide(values):
        return values.detach().double().numpy().astype(np.longdouble) if isinstance(values, torch.Tensor) else values

    def score(self, labels):
        """Of strings (B, N)."""
        row, site = np.ogrid[: self.unary.shape[0], : self.unary.shape[1]]
        return self.unary[row, site, labels].sum(-1) + self.steps[row, site[:, :-1], labels[:, :-1], labels[:, 1:]].sum(
            -1
        )

    def entropy(self):
        """sum_t H(y_t, y_{t+1}) - sum_t H(y_t) of the sites between: nothing large cancels."""

        def nats(p):
            with np.errstate(divide="ignore", invalid="ignore"):
                return -np.where(p > 0, p * np.log(p), 0).reshape(len(p), p.shape[1], -1).sum((1, 2))

        inner = self.marginals if self.marginals.shape[1] == 1 else -self.marginals[:, 1:-1]
        return nats(self.pairs) + np.sign(inner.sum() or 1) * nats(np.abs(inner))


def off(found, true, floor):
    """The largest error of finite numbers, relative, and of numbers below the floor relative to that."""
    found = Truth.wide(found)
    assert np.isfinite(found).all() and np.isfinite(true).all()
    return float((np.abs(found - true) / np.maximum(np.abs(true), floor)).max(initial=0))


def errors(unary, transition, initial=None, final=None):
    """The largest errors against the truth: relative of log-probabilities, absolute of probabilities, of entropies by the score's size."""
    truth = Truth(unary, transition, initial, final)
    leaves = [None if p is None else p.clone().requires_grad_() for p in (unary, transition, initial, final)]
    d = gx.LinearChainCRF(*leaves[:2], initial=leaves[2], final=leaves[3])
    scale = float(np.abs(np.where(truth.unary > -1e20, truth.unary, 0)).max() * unary.shape[1] + 1)
    floor = max(1e-8, 1e-9 * scale)  # of log-probabilities that are differences of such numbers
    draws, mode, (best, log_best) = d.sample((2,)), d.mode, d.k_best(3)

    logs = [off(d.log_partition, truth.log_z, scale)]
    for labels in (*draws, mode):  # infinite unless legal
        logs.append(off(d.log_prob(labels), truth.score(labels.numpy()) - truth.log_z, floor))
    assert np.abs(truth.score(mode.numpy()) - truth.best).max() <= 1e-15 * scale
    assert torch.equal(best[0], mode) and (log_best[:-1] >= log_best[1:]).all()
    for labels, log_prob in zip(best, log_best, strict=True):
        there = (log_prob > -INF).numpy()
        logs.append(off(log_prob[there], (truth.score(labels.numpy()) - truth.log_z)[there], floor))
    known = torch.rand(mode.shape) < 0.5
    other = (known.unsqueeze(-1) & (draws[0].unsqueeze(-1) != torch.arange(d.num_labels))).numpy()
    part = Truth(np.where(other, -np.inf, truth.unary), transition)
    logs.append(off(d.log_marginal_of(draws[0], known), part.log_z - truth.log_z, floor))
    given = d.given(draws[0], known)
    assert torch.equal(given.sample()[known], draws[0][known]) and torch.equal(given.mode[known], draws[0][known])

    with torch.no_grad():
        found = [(d.marginals, truth.marginals), (d.pair_marginals, truth.pairs), (given.marginals, part.marginals)]
    if unary.shape[1] < 100:  # by the recursion in log space, which is slow
        found += [(d.marginals, truth.marginals), (d.pair_marginals, truth.pairs)]
        assert torch.autograd.grad(d.entropy().sum(), leaves[0])[0].isfinite().all()
    assert all((p.sum(-1) - 1).abs().max() < 1e-5 for p, _ in found if p.dim() == 3)
    shared = transition.dim() == 2
    grads = torch.autograd.grad(d.log_partition.sum(), [p for p in leaves if p is not None])
    assert all(grad.isfinite().all() for grad in grads)
    found.append((grads[0], truth.marginals))
    steps = truth.pairs.shape[0] * max(truth.pairs.shape[1], 1) if shared else 1
    found.append((grads[1] / steps, truth.pairs.sum((0, 1)) / steps if shared else truth.pairs))
    with torch.no_grad():
        entropy = np.abs(Truth.wide(d.entropy()) - truth.entropy()).max() / scale
    return max(logs), max(off(p, true, 1.0) for p, true in found), float(entropy)


def uniform(*shape, high, dtype):
    return ((2 * torch.rand(shape, dtype=torch.float64) - 1) * high).to(dtype)


def bio(labels):
    """(V, V) and (V): which steps and first labels O, B-1, I-1, B-2, I-2, ... allow: I-k only after B-k or I-k."""
    label = torch.arange(labels)
    inside = (label % 2 == 0) & (label > 0)
    same = (label.unsqueeze(-1) == label) | (label.unsqueeze(-1) == label - 1)
    return ~inside | same, ~inside


def random_constraints(labels):
    allowed = torch.rand(labels, labels) < 0.5
    allowed[label := torch.arange(labels), (label + 1) % labels] = True
    return allowed, torch.arange(labels) != labels - 1


@pytest.mark.parametrize(
    ("constraints", "high", "labels"),
    [(bio, 200.0, 11), (random_constraints, 30.0, 5)],
)
def test_a_thousand_sites_in_float32(constraints, high, labels):
    allowed, first = constraints(labels)
    transition = uniform(labels, labels, high=high, dtype=torch.float32).masked_fill(~allowed, -INF)
    initial = uniform(labels, high=high, dtype=torch.float32).masked_fill(~first, -INF)
    found = errors(uniform(1 if labels > 5 else 2, 1024, labels, high=high, dtype=torch.float32), transition, initial)
    assert max(found) < 1e-6, found


@pytest.mark.parametrize(
    ("steps", "high", "dtype"),
    [
        ("shared", 1e4, torch.float32),
        ("shared", 1e5, torch.float64),
        ("each", 1e4, torch.float64),
        ("each", 1e5, torch.float32),
    ],
)
def test_tens_of_thousands(steps, high, dtype):
    transition = uniform(*[(4, 4), (3, 39, 4, 4)][steps == "each"], high=high, dtype=dtype)
    transition = transition.masked_fill(torch.rand(transition.shape) < 0.2, -INF)
    transition[..., 0, :] = 0.0
    found = errors(uniform(3, 40, 4, high=high, dtype=dtype), transition, final=uniform(3, 4, high=high, dtype=dtype))
    assert max(found) < 1e-6, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entry", [1e5, -1e5, -1e30])
def test_single_entries(entry, dtype):
    unary, transition = uniform(3, 25, 4, high=2.0, dtype=dtype), uniform(4, 4, high=2.0, dtype=dtype)
    unary[1, 12, 3] = entry  # the other rows are ordinary
    found = errors(unary, transition)
    assert max(found) < 1e-6, found
    transition[2, 1] = entry
    found = errors(unary, transition)
    assert max(found) < 1e-6, found
    plain = gx.LinearChainCRF(unary[[0, 2]], transition)
    assert torch.allclose(plain.marginals, gx.LinearChainCRF(unary, transition).marginals[[0, 2]], rtol=0, atol=1e-6)


def test_rows_of_all_kinds_at_once():
    """Each row is as if it were alone, in whatever way it is computed."""
    unary = (
        uniform(6, 30, 5, high=1.0, dtype=torch.float64)
        * torch.tensor([1.0, 1e2, 1e5, 3e2, 1e3, 1e-3]).double()[:, None, None]
    )
    transition = uniform(5, 5, high=100.0, dtype=torch.float64)
    lengths = torch.tensor([30, 29, 12, 1, 30, 0])
    chain = gx.LinearChainCRF(unary, transition, lengths=lengths).inference.potentials()
    kinds = {type(m) for m in messages_of(chain).parts} if isinstance(messages_of(chain), MergedMessages) else set()
    assert kinds, "a test of rows that are computed in several ways"
    leaf = unary.clone().requires_grad_()
    d = gx.LinearChainCRF(leaf, transition, lengths=lengths)
    grad = torch.autograd.grad(d.log_partition.sum(), leaf)[0]
    draws = d.sample((5,))
    for row in range(6):
        alone = gx.LinearChainCRF(unary[row, : lengths[row]], transition) if lengths[row] else None
        if alone is None:
            assert d.log_partition[row] == 0 and (grad[row] == 0).all() and (draws[:, row] == 0).all()
            continue
        used = slice(0, int(lengths[row]))
        assert off(d.log_partition[row], Truth.wide(alone.log_partition), 1.0) < 1e-12
        assert off(grad[row, used], Truth.wide(alone.marginals), 1.0) < 1e-9 and (grad[row, lengths[row] :] == 0).all()
        assert alone.log_prob(draws[:, row, used]).min() > -60  # all drawn strings are likely ones


def test_needle():
    """One string alone is possible, and all scores are far from 0."""
    labels, sites = 4, 50
    order = torch.arange(labels)
    transition = torch.full((labels, labels), -INF)
    transition[order, (order + 1) % labels] = -700.0
    initial = torch.tensor([-INF, 0.0, -INF, -INF])
    unary = uniform(2, sites, labels, high=900.0, dtype=torch.float32)
    assert max(errors(unary, transition, initial)[:2]) < 1e-6
    d = gx.LinearChainCRF(unary, transition, initial=initial)
    only = ((torch.arange(sites) + 1) % labels).expand(2, -1)
    assert torch.equal(d.mode, only) and torch.equal(d.sample((3,)), only.expand(3, -1, -1))
    assert torch.equal(d.marginals, torch.nn.functional.one_hot(only, labels).float())
    assert d.log_prob(only).abs().max() < 1e-4 and d.entropy().abs().max() < 1e-4
    assert (d.k_best(2)[1][1] == -INF).all() and d.log_prob((only + 1) % labels).eq(-INF).all()


def test_gradients_of_what_is_impossible():
    """-inf with gradient zero; the other rows as if alone."""
    unary = uniform(3, 4, 2, high=2.0, dtype=torch.float64).requires_grad_()
    stay = torch.zeros(2, 2, dtype=torch.float64).fill_diagonal_(1.0).log().requires_grad_()
    d = gx.LinearChainCRF(unary, stay)
    labels = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]])
    found = d.log_marginal_of(labels)
    assert found[1] == -INF and torch.allclose(found[::2], d.log_prob(labels)[::2])
    grads = torch.autograd.grad(found.sum(), [unary, stay])
    assert torch.allclose(grads[0][::2], torch.nn.functional.one_hot(labels, 2)[::2] - d.marginals[::2])
    assert torch.allclose(grads[0][1], -d.marginals[1]) and grads[1].isfinite().all()
    found = d.log_marginal_of(labels[1])
    assert (found == -INF).all() and torch.allclose(torch.autograd.grad(found.sum(), unary)[0], -d.marginals)


@pytest.mark.parametrize("gap", [50.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unary_against_transitions(gap, dtype):
    """Each site prefers by a wide gap a label that the next one's preference forbids: the winners are never ahead on the way."""
    unary = torch.zeros(1, 30, 3, dtype=dtype)
    unary[:, ::2, 0], unary[:, 1::2, 1], unary[..., 2] = gap, gap, 0.01 * gap
    transition = torch.zeros(3, 3, dtype=dtype)
    transition[0, 1] = transition[1, 0] = -INF
    assert max(errors(unary, transition)) < 1e-6
    transition = transition.masked_fill(transition == -INF, -1.9 * gap)
    assert max(errors(unary, transition)) < 1e-6
    late = torch.zeros(1, 30, 3, dtype=dtype)  # the last site alone decides, against all before it
    late[:, :-1, 0], late[:, -1, 1] = 1.0, 40 * gap
    stay = torch.full((3, 3), -INF, dtype=dtype).fill_diagonal_(0.0)
    assert max(errors(gap * late / 100, stay)) < 1e-6


def test_long_chain():
    unary, transition = uniform(1, 5000, 3, high=5.0, dtype=torch.float32), uniform(3, 3, high=5.0, dtype=torch.float32)
    d, truth = gx.LinearChainCRF(unary, transition), Truth(unary, transition)
    labels = d.sample()
    assert off(d.log_partition, truth.log_z, 1.0) < 1e-6 and off(d.marginals, truth.marginals, 1.0) < 1e-6
    assert off(d.log_prob(labels), truth.score(labels.numpy()) - truth.log_z, 1.0) < 1e-6


@pytest.mark.parametrize("high", [1.0, 1e5])
def test_one_label_and_one_site(high):
    one = {
        "unary": uniform(2, 7, 1, high=high, dtype=torch.float64),
        "transition": uniform(1, 1, high=high, dtype=torch.float64),
    }
    assert max(errors(**one)) < 1e-6
    d = gx.LinearChainCRF(**one)
    assert (
        (d.log_prob(torch.zeros(2, 7)) == 0).all()
        and (d.marginals == 1).all()
        and d.entropy().abs().max() < 1e-9 * high
    )
    unary = uniform(2, 1, 5, high=high, dtype=torch.float64)
    d = gx.LinearChainCRF(unary, uniform(5, 5, high=high, dtype=torch.float64))
    truth = torch.distributions.Categorical(logits=unary[:, 0])
    assert off(d.entropy(), Truth.wide(truth.entropy()), 1.0) < 1e-10 and torch.allclose(d.marginals[:, 0], truth.probs)
    assert torch.allclose(d.log_prob(torch.arange(5).reshape(5, 1, 1)), truth.logits.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("high", [1.0, 1e3, 1e5])
def test_lengths_zero_and_one(high):
    unary = uniform(3, 6, 4, high=high, dtype=torch.float64).requires_grad_()
    ends = uniform(2, 4, high=high, dtype=torch.float64)
    steps = uniform(4, 4, high=high, dtype=torch.float64).requires_grad_()
    d = gx.LinearChainCRF(unary, steps, initial=ends[0], final=ends[1], lengths=torch.tensor([0, 1, 0]))
    truth = torch.distributions.Categorical(logits=unary[1, 0] + ends.sum(0))
    assert (
        torch.allclose(d.log_partition[1], (unary[1, 0] + ends.sum(0)).logsumexp(0))
        and (d.log_partition[::2] == 0).all()
    )
    assert (
        torch.allclose(d.marginals[1, 0], truth.probs)
        and (d.marginals[::2] == 0).all()
        and (d.pair_marginals == 0).all()
    )
    assert torch.allclose(d.entropy()[1], truth.entropy(), atol=1e-9) and d.entropy()[::2].abs().max() == 0
    grads = torch.autograd.grad(d.log_partition.sum(), [unary, steps])
    assert torch.allclose(grads[0][1, 0], truth.probs) and (grads[0][::2] == 0).all() and (grads[1] == 0).all()
    assert (d.log_prob(torch.full((3, 6), -100.0).index_fill(1, torch.tensor(0), 2.0))[::2] == 0).all()
    assert (
        (d.sample((5,))[:, ::2] == 0).all()
        and (d.max_log_prob[::2] == 0).all()
        and (d.k_best(2)[1][1, ::2] == -INF).all()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Potentials are taken as they are; results are rounded to their dtype once."""
    unary, transition = uniform(2, 40, 5, high=20.0, dtype=dtype), uniform(5, 5, high=20.0, dtype=dtype)
    d, exact = gx.LinearChainCRF(unary, transition), gx.LinearChainCRF(unary.double(), transition.double())
    labels = exact.mode
    for query in (lambda c: c.log_partition, lambda c: c.marginals, lambda c: c.pair_marginals, lambda c: c.log_prob(labels),
                  lambda c: c.log_prob(labels.roll(1, -1)), lambda c: c.entropy(), lambda c: c.max_log_prob):  # fmt: skip
        found, true = query(d), query(exact)
        assert found.dtype == dtype and torch.allclose(
            found.double(), true.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-7
        )
    assert torch.equal(d.mode, labels)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-41), (torch.float64, 1e-310)])
def test_denormals(dtype, least):
    unary, transition = uniform(2, 9, 3, high=least, dtype=dtype), uniform(3, 3, high=least, dtype=dtype)
    assert (unary != 0).any() and max(errors(unary, transition)[:2]) < 1e-6


def wild(*shape):
    """Potentials of a range of 1 ... 1000 a row, near where exponentials underflow, with and without -inf."""
    each = (shape[0], *[1] * (len(shape) - 1))
    high = 10 ** (3 * torch.rand(each, dtype=torch.float64))
    smooth, rare = torch.randn(shape, dtype=torch.float64), torch.rand(shape) < 0.2
    values = torch.where(torch.rand(each) < 0.5, smooth, torch.where(rare, smooth.sign(), 1e-3 * smooth)) * high
    edge = -(torch.rand(shape) < 0.5).double() * (300 + 460 * torch.rand(each, dtype=torch.float64))
    values = torch.where(torch.rand(each) < 0.3, edge, values)
    return values.masked_fill(torch.rand(shape) < 0.5 * torch.rand(each) * (torch.rand(each) < 0.6), -INF)


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("kind", ["shared", "each", "row"])
def test_exact_means_exact(kind, every):
    """Where messages in exp space say that they are exact, they agree with those in log space."""
    rows = 0
    for sites, labels in ((2, 2), (7, 3), (17, 4), (33, 2), (64, 3)):
        steps = {
            "shared": (1, labels, labels),
            "each": (200, sites - 1, labels, labels),
            "row": (200, 1, labels, labels),
        }[kind]
        transition = wild(*steps) if kind != "shared" else wild(*steps)[0]
        chain = ChainPotentials(wild(200, sites, labels), transition, wild(200, labels), wild(200, labels), None)
        exact = ScaledMessages(chain, every).exact.nonzero().squeeze(-1)
        rows += len(exact)
        chain = select_rows(chain, exact)
        scaled, logs, weight = (
            ScaledMessages(chain, every),
            LogMessages(chain),
            torch.randn(len(exact), dtype=torch.float64),
        )
        assert scaled.exact.all() and (logs.log_partition > -INF).all()
        assert off(scaled.log_partition, Truth.wide(logs.log_partition), 1.0) < 1e-11
        assert off(scaled.marginals(), Truth.wide(logs.marginals()), 1.0) < 1e-10
        assert off(scaled.pair_marginals(), Truth.wide(logs.pair_marginals()), 1.0) < 1e-10
        if kind == "shared":
            assert off(scaled.expected_steps(weight), Truth.wide(logs.expected_steps(weight)), 200.0) < 1e-10
        labels_drawn = scaled.sample(3)
        likely = logs.marginals().expand(3, -1, -1, -1).take_along_dim(labels_drawn.unsqueeze(-1), -1)
        assert (likely > 1e-25).all()
    assert rows > 100


def test_exact_to_the_edge_of_underflow():
    """The winner is behind by 600 ... 760 nats on the way, where numbers first lose digits and then vanish."""
    lost = torch.linspace(600, 760, 161, dtype=torch.float64)
    unary = torch.zeros(161, 200, 2, dtype=torch.float64)
    unary[:, :100, 1], unary[:, 100:, 0] = -lost.unsqueeze(-1) / 100, -lost.unsqueeze(-1) / 50
    stay = torch.zeros(2, 2, dtype=torch.float64).fill_diagonal_(1.0).log()
    nothing = torch.zeros(161, 2, dtype=torch.float64)
    messages = ScaledMessages(ChainPotentials(unary, stay, nothing, nothing), 1)
    exact = messages.exact
    assert exact[lost < 640].all() and not exact[lost > 700].any()
    assert off(messages.log_partition[exact], Truth.wide(-lost[exact]), 1.0) < 1e-12
    assert (messages.marginals()[exact, :, 1] - 1).abs().max() < 1e-12
