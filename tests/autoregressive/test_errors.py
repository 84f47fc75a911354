"""Wrong inputs of the chain rule, by the text of their errors."""

import pytest
import torch

import pyro_genexact as gx
from pyro_genexact import conditioners, heads
from pyro_genexact.distributions import AutoregressiveDistribution
from support.checks import fails
from support.values import built, double, sized


def model(head, site=(), sites=4, event_shape=None, **options):
    net = conditioners.MADE(sites, head.num_params, site=site, hidden=(12,), **options)
    return built(gx.Autoregressive(net, head, event_shape or (sites, *head.site_shape)))


@pytest.mark.parametrize(
    ("head", "site", "value", "text"),
    [
        (
            heads.Bernoulli,
            (),
            double(0, 1, 2, 0),
            "Expected value within the support of the head, Boolean(); got 2.0 at site 2",
        ),
        (heads.Poisson, (), double(0, 1, 0.5, 0), "got 0.5 at site 2"),
        (heads.Gamma, (), double(1, -1, 1, 1), "got -1.0 at site 1"),
        (heads.Normal, (), double(1, float("inf"), 1, 1), "got inf at site 1"),
        (heads.Normal, (), double(1, float("nan"), 1, 1), "got nan at site 1"),
        (
            lambda: heads.Categorical(3),
            3,
            torch.tensor([0, 3, 1, 2]),
            "IntegerInterval(lower_bound=0, upper_bound=2); got 3 at site 1",
        ),
        (lambda: heads.Categorical(3), 3, torch.tensor([0, 2, -1, 2]), "got -1 at site 2"),
        (lambda: heads.Categorical(3), 3, double(0, 2, 1.5, 2), "got 1.5 at site 2"),
        (lambda: heads.DiscretizedLogistic(4), (), double(0, 3, 4, 2), "got 4.0 at site 2"),
        (lambda: heads.Binomial(5), (), double(0, 5, 6, 2), "got 6.0 at site 2"),
    ],
)
def test_value_outside_the_support(head, site, value, text):
    d = model(head(), site)()
    fails(ValueError, text, lambda: d.log_prob(value))
    fails(ValueError, text, lambda: d.log_prob_sites(value))
    d._validate_args = False
    assert d.log_prob(value) == -torch.inf


def test_value_of_another_shape():
    d = model(heads.Bernoulli())()
    fails(ValueError, "Expected value.shape[-1:] == (4,) (event_shape); got (2, 5).", lambda: d.log_prob(sized(2, 5)))
    fails(ValueError, "Expected value.shape[-1:] == (4,) (event_shape); got ().", lambda: d.log_prob(sized()))


@pytest.mark.parametrize("wrong", [5, -1])
def test_lengths(wrong):
    made = model(heads.Normal())
    fails(
        ValueError,
        f"Expected lengths between 0 and 4 (sites of the event); got {wrong}.",
        lambda: made(lengths=torch.tensor([1, wrong])),
    )
    fails(
        TypeError,
        "Expected lengths to be a tensor of integers; got torch.float32.",
        lambda: made(lengths=torch.ones(2)),
    )


def test_prefix():
    d = model(heads.Bernoulli())()
    for k in (4, 5):
        fails(
            ValueError,
            f"Expected a prefix of 1 to 3 of 4 sites; got {k} sites.",
            lambda k=k: d.conditional_on_prefix(torch.ones(k, dtype=torch.float64)),
        )
    fails(
        ValueError,
        "Expected prefix within the support of the head, Boolean(); got 0.5 at site 0",
        lambda: d.conditional_on_prefix(torch.full((2,), 0.5, dtype=torch.float64)),
    )
    vectors = model(heads.Normal(shape=(2,)), (2,))()
    fails(ValueError, "Expected prefix.shape == (*batch, k, 2)", lambda: vectors.conditional_on_prefix(sized(3)))


def test_parts_that_do_not_fit():
    head, net = heads.Bernoulli(), conditioners.MADE(4, 1)
    fails(
        ValueError,
        "Expected event_shape of 4 sites (conditioner.num_sites); got (5,), which has 5.",
        lambda: gx.Autoregressive(net, head, (5,)),
    )
    fails(
        ValueError,
        "Expected conditioner.num_params == 2 (num_params of the head); got 1.",
        lambda: gx.Autoregressive(net, heads.Normal(), (4,)),
    )
    fails(
        ValueError,
        "Expected conditioner.site == (2,) (the site shape of the head); got ().",
        lambda: gx.Autoregressive(conditioners.MADE(4, 4), heads.Normal(shape=(2,)), (4, 2)),
    )
    fails(
        ValueError,
        "Expected event_shape == (*sites, 2) (the site shape of the head last); got (4, 3).",
        lambda: gx.Autoregressive(conditioners.MADE(4, 4, site=(2,)), heads.Normal(shape=(2,)), (4, 3)),
    )
    fails(
        ValueError,
        "Expected a head of categories 0 ... 2 (conditioner.site == 3); got support",
        lambda: gx.Autoregressive(conditioners.MADE(4, 5, site=3), heads.Categorical(5), (4,)),
    )
    fails(
        ValueError,
        "Expected a head of categories 0 ... 2 (conditioner.site == 3); got support",
        lambda: gx.Autoregressive(conditioners.MADE(4, 2, site=3), heads.Normal(), (4,)),
    )
    fails(
        ValueError, "Expected event_shape to be a sequence of integers >= 1", lambda: gx.Autoregressive(net, head, (0,))
    )


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0]])
def test_order(order):
    net = conditioners.MADE(4, 1)
    fails(
        ValueError,
        "Expected order to be a permutation of 0 ... 3 (the sites); got",
        lambda: gx.Autoregressive(net, heads.Bernoulli(), (4,), order=order),
    )
    fails(
        ValueError,
        "Expected order to be a permutation of 0 ... 3 (the sites); got",
        lambda: AutoregressiveDistribution(net, heads.Bernoulli(), (4,), order=torch.tensor(order)),
    )


def test_per_site_of_the_wrong_length():
    head = heads.PerSite([heads.Bernoulli()] * 3)
    fails(
        ValueError,
        "Expected a head of 4 sites (sites of the event); got one of 3 sites.",
        lambda: gx.Autoregressive(conditioners.MADE(4, head.num_params), head, (4,)),
    )


def test_context():
    made = model(heads.Bernoulli(), context=3)
    fails(ValueError, "Expected a context (*batch, 3) (MADE built with context=3); got none.", made)
    fails(ValueError, "Expected context.shape[-1] == 3", lambda: made(sized(5, 2)))
    net = conditioners.Recurrent((), 1, context=gx.Covariates(3), hidden=4).double()
    steps = gx.Autoregressive(net, heads.Bernoulli(), (4,))
    fails(
        ValueError, "Expected a context (*batch, T, 3) (Recurrent built with context=Covariates(3)); got none.", steps
    )
    fails(ValueError, "Expected context.shape[-1] == 3", lambda: steps(sized(3)))
    fails(ValueError, "context", lambda: steps(sized(2, 3, 3)).sample())
    fails(ValueError, "context", lambda: steps(sized(2, 3, 3)).log_prob(torch.ones(4, dtype=torch.float64)))


def test_expand_to_a_shape_that_does_not_broadcast():
    d = model(heads.Bernoulli(), context=3)(sized(5, 3))
    fails(ValueError, "Expected batch_shape that (5,) broadcasts to; got (4,).", lambda: d.expand((4,)))


@pytest.mark.parametrize("family", ["Normal", "StudentT", "Laplace", "Poisson", "Gamma", "LogNormal"])
def test_extreme_values_are_finite(family):
    made = model(getattr(heads, family)())
    for far in (1e4, -1e4, 1e8, -1e8):
        y = torch.full((4,), far, dtype=torch.float64)
        d = made()
        if bool(d.support.check(y)):
            lp = d.log_prob(y)
            grads = torch.autograd.grad(lp, list(made.parameters()))
            assert lp.isfinite() and all(g.isfinite().all() for g in grads)


def test_heads_that_do_not_fit():
    fails(
        TypeError,
        "Expected a head of distributions; got Affine, which returns Affine.",
        lambda: gx.Autoregressive(conditioners.MADE(2, 2), heads.Affine(), (2,)),
    )
    fails(
        TypeError,
        "Expected a head of distributions; got Affine, which returns Affine.",
        lambda: gx.Conditional(torch.nn.Linear(3, 2), heads.Affine()),
    )
    columns = heads.PerSite([heads.Categorical(3), heads.Normal()])
    fails(
        ValueError,
        "Expected a head of one site; got PerSite of 2 sites.",
        lambda: gx.Conditional(torch.nn.Linear(3, 3), columns),
    )
    fails(ValueError, "Expected head to treat all sites alike; got a PerSite", lambda: heads.Mixture(columns, 2))
    fails(
        ValueError,
        "Expected a head of categories 0 ... 1 (conditioner.site == [2, ()]); got support",
        lambda: gx.Autoregressive(conditioners.MADE(2, columns.num_params, site=[2, ()]), columns, (2,)),
    )
    fails(
        TypeError,
        "Expected event_shape to be a sequence of integers; got 2.",
        lambda: gx.Autoregressive(conditioners.MADE(2, 1), heads.Bernoulli(), 2),
    )


def test_uniforms():
    d = model(heads.Normal())()
    fails(
        ValueError,
        "Expected u.shape[-1:] == (4,) (event_shape); got (3,).",
        lambda: d.from_uniform(torch.rand(3).double()),
    )
    fails(
        ValueError,
        "Expected u between 0 and 1; got values outside [0, 1].",
        lambda: d.from_uniform(double(0.1, 1.5, 0.2, 0.3)),
    )
    fails(
        ValueError,
        "Expected u with finite quantiles; got values equal or close to 0 or 1 at site 1",
        lambda: d.from_uniform(double(0.5, 1, 0.5, 0.5)),
    )


def test_prefix_of_another_dtype_or_without_sites():
    d = model(heads.Normal())()
    fails(ValueError, "Expected prefix.dtype == torch.float64", lambda: d.conditional_on_prefix(torch.zeros(2)))
    fails(ValueError, "Expected a prefix of at least one site", lambda: d.conditional_on_prefix(sized(0)))


def test_impossible_prefix_without_validation():
    d = model(heads.Categorical(3), 3)()
    d._validate_args = False
    rest = d.conditional_on_prefix(double(1.5))
    assert rest.log_prob(double(0, 1, 2)) == -torch.inf == d.log_prob(double(1.5, 0, 1, 2))


def test_arguments_of_another_class():
    made = model(heads.Bernoulli())
    linear = torch.nn.Linear(2, 2)
    fails(
        TypeError,
        "Expected conditioner to be of class Conditioner; got Linear.",
        lambda: gx.Autoregressive(linear, heads.Normal(), (5,)),
    )
    fails(
        TypeError,
        "Expected autoregressive to be of class Autoregressive; got Linear.",
        lambda: gx.OrderEnsemble(linear, 3),
    )
    fails(TypeError, "Expected value to be of class Tensor; got list.", lambda: made().log_prob([1.0, 0.0, 1.0, 1.0]))
    fails(TypeError, "Expected prefix to be of class Tensor; got list.", lambda: made().conditional_on_prefix([1.0]))
    fails(
        TypeError,
        "Expected order to be a tensor or a list of integers; got 'raster'.",
        lambda: gx.Autoregressive(conditioners.MADE(4, 1), heads.Bernoulli(), (4,), order="raster"),
    )
