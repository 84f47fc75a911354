"""What filters keep: ends beside them, going on, the mass that is kept, and the law that finds wrong ones."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_genexact as gx
from pyro_genexact import Head, heads, testing
from pyro_genexact.families.categorical import continuing, log_probs, normalised
from pyro_genexact.heads import Forbid, MinLength, Tempered, TopK, TopP
from support.values import sized

V, INF = 5, torch.inf


@pytest.mark.parametrize("outer", [lambda head: Forbid(head, [1]), lambda head: MinLength(head, 2, 1)])
def test_no_token_left(outer):
    phi = torch.zeros(2, 3, V).double()
    phi[..., 0] = 1.0
    phi[1, 1, 1] = 2.0
    head = outer(TopK(heads.Categorical(V), 1))
    message = r"Expected (Forbid|MinLength) to leave tokens with mass; got none at \[1, 1\] .*Apply it first"
    with pytest.raises(ValueError, match=message):
        head(phi)
    assert TopK(outer(heads.Categorical(V)), 1)(phi).sample()[1, 1] == 0
    p = torch.func.vmap(lambda phi: head(phi).probs)(phi)  # where nobody sees it
    torch.testing.assert_close(p[1, 1], torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]).double() / 4)


@pytest.mark.parametrize("outer", [lambda head: Forbid(head, [0]), lambda head: MinLength(head, 2, 0)])
def test_what_a_head_makes_is_no_matter_of_ties(outer):
    """At phi = 0 the first token alone is kept, which is forbidden; no reason to refuse the head."""
    head = TopP(outer(TopK(heads.Categorical(3), 1)), 0.9)
    phi = torch.tensor([[[0.0, 1.0, 0.0]]]).double()
    assert head.num_tokens == 3 and head(phi).probs.tolist() == [[[0.0, 1.0, 0.0]]]
    assert outer(TopK(heads.Categorical(3), 1))(0 * phi).probs.tolist() == [[[0.0, 0.5, 0.5]]]
    net = gx.conditioners.Recurrent(3, 3, hidden=4)
    for d in (gx.Autoregressive(net, head, (4,))(), gx.Sequence(net, head, eos=0, max_len=4)()):
        assert d.has_enumerate_support


def test_filters_beside_another_end():
    head = TopK(MinLength(heads.Categorical(3), 2, eos=1), 2)
    net = gx.conditioners.Recurrent(3, 3, hidden=4)
    with pytest.raises(ValueError, match=r"Expected MinLength with eos == 0 \(eos of the sequence\); got 1\."):
        gx.Sequence(net, head, eos=0, max_len=4)
    with pytest.raises(ValueError, match="Expected MinLength with eos == 0"):
        gx.Sequence(net, heads.Categorical(3), eos=0, max_len=4)().with_head(head)
    assert gx.Sequence(net, head, eos=1, max_len=4)().log_prob(torch.tensor([0, 1, 1, 1])) == -INF


def test_permuted_passes_to_the_wrapped_head():
    class Columns(heads.DiscretizedLogistic):
        def permuted(self, order):
            return heads.DiscretizedLogistic(7)

    head = Tempered(Columns(3), 0.5)
    new = head.permuted(torch.tensor([1, 0]))
    assert isinstance(new, Tempered) and new.head.levels == 7 and new.temperature == 0.5 and head.head.levels == 3


@pytest.mark.parametrize("eos", [0, 2])
def test_continuing(eos):
    phi = (2 * sized(4, 3, V)).requires_grad_()
    rest, log_p = continuing(dist.Categorical(logits=phi), eos)
    p = phi.softmax(-1)
    others = [v for v in range(V) if v != eos]
    truth = p[..., others]
    torch.testing.assert_close(log_p, truth.sum(-1).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rest.probs[..., others], truth / truth.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)
    assert (rest.probs[..., eos] == 0).all() and (rest.logits[..., eos] == -INF).all()
    weights = sized(4, 3, seed=1)
    grads = [torch.autograd.grad((weights * f).sum(), phi, retain_graph=True)[0] for f in (log_p, truth.sum(-1).log())]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    d = heads.DiscretizedLogistic(4)(phi[..., :2])
    each = d.log_prob(d.enumerate_support())
    torch.testing.assert_close(continuing(d, eos)[1], each[[v for v in range(4) if v != eos]].logsumexp(0))


@pytest.mark.parametrize("logit", [-700.0, -50.0, 50.0, 700.0, 5000.0])
def test_continuing_without_cancellation(logit):
    """log(1 - p) of a p near 0 or 1, against exact exponents."""
    _, log_p = continuing(dist.Categorical(logits=torch.tensor([0.0, logit, 0.0]).double()), 1)
    ratio = torch.tensor(logit).double() - torch.tensor(2.0).double().log()  # log odds of the end
    truth = -ratio.exp() if logit < 0 else -ratio
    torch.testing.assert_close(log_p, truth, rtol=1e-13, atol=0)


def test_continuing_where_nothing_remains():
    phi = torch.tensor([[0.0, 0.0, 0.0], [0.0, 9.0, 0.0]]).double().requires_grad_()
    d = TopK(heads.Categorical(3), 1)(phi.unsqueeze(0))  # the first token, and the second
    rest, log_p = continuing(d, 1)
    assert log_p.tolist() == [[0.0, -INF]]
    torch.testing.assert_close(rest.probs[0], torch.tensor([[1, 0, 0], [0.5, 0, 0.5]]).double())
    assert not (rest.sample((50,)) == 1).any()
    for f in (log_p[0, 0], log_p.sum(), rest.entropy().sum(), rest.logits[..., 0].sum()):
        assert torch.autograd.grad(f, phi, retain_graph=True)[0].isfinite().all()
    only, log_p = continuing(dist.Categorical(logits=torch.zeros(4, 1)), 0)
    assert (log_p == -INF).all() and (only.sample() == 0).all()


def test_divergence_is_minus_the_log_of_the_mass_kept():
    phi = sized(3, 4, V).requires_grad_()
    weights = 5 * sized(3, 4, seed=1)
    whole = heads.Categorical(V)(phi)
    found = kl_divergence(TopK(heads.Categorical(V), 2)(phi), whole)
    truth = -phi.softmax(-1).topk(2).values.sum(-1).log()
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(
        *(torch.autograd.grad((weights * f).sum(), phi, retain_graph=True)[0] for f in (found, truth))
    )
    assert (kl_divergence(whole, TopK(heads.Categorical(V), 2)(phi)) == INF).all()


def test_log_probs_and_normalised():
    phi = sized(3, V)
    torch.testing.assert_close(log_probs(dist.Categorical(logits=phi)), phi.log_softmax(-1))
    torch.testing.assert_close(log_probs(dist.Bernoulli(logits=phi))[..., 1], phi.sigmoid().log())
    torch.testing.assert_close(normalised(phi).logits, phi.log_softmax(-1))


class Broken(TopK):
    """Right, but for one thing at logits far out."""

    def __init__(self, kind):
        super().__init__(heads.Categorical(3), 2)
        self.kind = kind

    def forward(self, phi, first=0):
        d = super().forward(phi, first)
        if phi.abs().max() > 100:
            d.logits = self.kind(d.logits)
        return d


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda logits: torch.where(logits > -INF, logits, 1.0) / 0 * 0, "log_prob and gradient at phi"),
        (lambda logits: logits - 0.1, "log of the total mass at phi"),
    ],
)
def test_the_law_of_heads_that_truncate_has_power(kind, message):
    with pytest.raises(AssertionError, match=rf"head broken \[{message}"):
        testing.distribution_head(Broken(kind))


class Overflowing(Head):
    """No filter, and -inf where finite is right."""

    num_params, support = 3, heads.Categorical(3).support

    def forward(self, phi, first=0):
        logits = phi.log_softmax(-1)
        return normalised(torch.where(logits < -1000, -INF, logits))


def test_only_heads_that_truncate_may_rule_values_out():
    with pytest.raises(AssertionError, match=r"head broken \[log_prob at phi"):
        testing.distribution_head(Overflowing())


def test_per_site_refuses_what_counts_sites():
    head = heads.TopK(heads.MinLength(heads.Categorical(3), 2, eos=0), 2)
    with pytest.raises(ValueError, match=r"Expected heads that treat all sites alike; got a MinLength among them"):
        heads.PerSite([head, heads.Categorical(3)])
