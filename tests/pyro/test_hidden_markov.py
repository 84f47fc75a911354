"""Hidden Markov models at sites in plates, under NUTS, and what users do wrong."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta

import pyro_genexact as gx
from support.values import sized

F64, INF, NAN = torch.float64, float("inf"), float("nan")


def data(rows=12, sites=6):
    emitted = dist.Normal(torch.tensor([-1.0, 2.0], dtype=F64), 0.5)
    truth = gx.HiddenMarkov(sized(2), 1.5 * sized(2, 2, seed=2), emitted, duration=sites)
    return truth.expand((rows,)).sample()


def learned(x, size=None):
    states = 2
    initial = pyro.param("initial", lambda: sized(states, seed=11))
    transition = pyro.param("transition", lambda: sized(states, states, seed=12))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0], dtype=F64), 2.0).to_event(1))
    d = gx.HiddenMarkov(initial, transition, dist.Normal(loc[..., None, :], 1.0), duration=x.shape[-1])
    with pyro.plate("rows", len(x), subsample_size=size) as index:
        return pyro.sample("x", d, obs=x[index])


def test_at_sites_in_plates():
    """Subsampled, with gradients to all parameters; the subsample's scale; vectorised particles; predictions."""
    pyro.clear_param_store()
    x = data()
    guide = AutoDelta(pyro.poutine.block(learned, hide=["x"]))
    elbo = Trace_ELBO()
    svi = SVI(learned, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    losses = [svi.step(x) for _ in range(60)]
    assert losses[-1] < losses[0]
    grads = {name: p.grad for name, p in pyro.get_param_store().named_parameters()}
    assert len(grads) == 3
    sub = [svi.evaluate_loss(x, 4) for _ in range(300)]
    assert sum(sub) / 300 == pytest.approx(svi.evaluate_loss(x), rel=0.05)
    many = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    assert many.loss(learned, guide, x) == pytest.approx(elbo.loss(learned, guide, x))
    drawn = Predictive(learned, {"loc": sized(3, 1, 2)}, parallel=True)(x)
    assert drawn["x"].shape[-2:] == x.shape
    masked = pyro.poutine.trace(pyro.poutine.mask(learned, mask=torch.arange(12) < 3)).get_trace(x)
    masked.compute_log_prob()
    assert masked.nodes["x"]["log_prob"].ne(0).sum() == 3


def test_nuts_on_its_parameters():
    """The posterior mean of one number, against quadrature."""
    x = torch.tensor([[0.3, 1.2, -0.4, 0.9], [0.1, -0.2, 1.5, 1.1]], dtype=F64)

    def conditioned():
        stay = pyro.sample("stay", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("x", of(stay), obs=x)

    def of(stay):
        transition = stay.unsqueeze(-1).unsqueeze(-1) * torch.eye(2, dtype=F64)
        emitted = dist.Normal(torch.tensor([0.0, 1.0], dtype=F64), 0.5)
        steps = transition.unsqueeze(-3).unsqueeze(-4) if stay.dim() else transition
        return gx.HiddenMarkov(torch.zeros(2, dtype=F64), steps, emitted, duration=4)

    grid = torch.linspace(-6, 6, 601, dtype=F64)
    log = dist.Normal(torch.zeros((), dtype=F64), 1.0).log_prob(grid) + of(grid).log_prob(x).sum(-1)
    mean = (log.softmax(0) * grid).sum()
    mcmc = MCMC(NUTS(conditioned), num_samples=120, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["stay"].mean() == pytest.approx(mean.item(), abs=0.25)


def normals(*shape):
    return dist.Normal(torch.zeros(shape), 1.0)


Z = torch.zeros


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (([0.0], Z(1, 1), normals(1)), {}, TypeError, "Expected initial to be of class Tensor; got list."),
        ((Z(2), 3, normals(2)), {}, TypeError, "Expected transition to be of class Tensor; got int."),
        ((Z(2), Z(2, 2), Z(2)), {}, TypeError, "Expected observation_dist to be of class Distribution; got Tensor."),
        ((Z(()), Z(2, 2), normals(2)), {}, ValueError, "Expected initial of shape (*batch, V), floating-point"),
        ((Z(2).long(), Z(2, 2), normals(2)), {}, ValueError, "Expected initial of shape (*batch, V), floating-point"),
        ((Z(2), Z(2, 2).double(), normals(2)), {}, ValueError, "Expected transition.dtype == torch.float32"),
        ((Z(2), Z(2, 3), normals(2)), {}, ValueError, "Expected transition.shape[-2:] == (2, 2) (states of initial)"),
        (
            (Z(2), Z(2, 2), normals(3)),
            {},
            ValueError,
            "Expected observation_dist.batch_shape[-1] == 2 (states of initial)",
        ),
        ((Z(2), Z(2, 2), normals()), {}, ValueError, "Expected observation_dist.batch_shape[-1] == 2"),
        ((Z(2), Z(2, 2), normals(2)), {}, ValueError, "Expected duration=N ("),
        ((Z(2), Z(1, 2, 2), normals(1, 2)), {}, ValueError, "Expected duration=N ("),
        ((Z(2), Z(2, 2), normals(2)), {"duration": 0}, ValueError, "Expected duration to be an integer >= 1; got 0."),
        ((Z(2), Z(2, 2), normals(3, 2)), {"duration": 4}, ValueError, "got 4 by duration, 3 by observation_dist."),
        ((Z(2), Z(3, 2, 2), normals(3, 2)), {}, ValueError, "got 3 by observation_dist, 4 by transition."),
        ((Z(3, 2), Z(2, 2), normals(4, 5, 2)), {}, ValueError, "got initial (3,), observation_dist (4,)."),
        ((Z(2), Z(2, 2), normals(5, 2), torch.tensor(6)), {}, ValueError, "Expected lengths between 0 and 5"),
        (
            (Z(2), Z(2, 2), normals(5, 2), torch.tensor(1.0)),
            {},
            TypeError,
            "Expected lengths to be a tensor of integers",
        ),
        (
            (torch.tensor([0.0, NAN]), Z(2, 2), normals(5, 2)),
            {},
            ValueError,
            "Expected initial to be finite or -inf; got nan.",
        ),
        (
            (Z(2), torch.tensor([[0, 0], [0, INF]]), normals(5, 2)),
            {},
            ValueError,
            "Expected transition to be finite or -inf; got inf.",
        ),
        (
            (Z(2), torch.tensor([[0, 0], [-INF, -INF]]), normals(5, 2)),
            {},
            ValueError,
            "Expected transition to have a finite logit in each row",
        ),
    ],
)
def test_what_users_do_wrong(arguments, options, error, text):
    with pytest.raises(error) as raised:
        gx.HiddenMarkov(*arguments, **options, validate_args=True)
    assert text in str(raised.value)


@pytest.mark.parametrize("validate", [False, True])
def test_wrong_values(validate):
    d = gx.HiddenMarkov(Z(2), Z(2, 2), normals(2), torch.tensor([2, 3]), duration=3, validate_args=validate)
    vectors = gx.HiddenMarkov(Z(2), Z(2, 2), normals(2, 4).to_event(1), duration=3, validate_args=validate)
    for name in ("log_prob", "posterior", "filter"):
        for of, value, error, text in (
            (d, Z(4), ValueError, r"Expected value.shape\[-1:\] == \(3,\); got \(4,\)"),
            (d, Z(2, 1), ValueError, r"Expected value.shape\[-1:\] == \(3,\); got \(2, 1\)"),
            (d, Z(()), ValueError, r"Expected value.shape\[-1:\] == \(3,\); got \(\)"),
            (d, Z(4, 3), ValueError, r"Expected value of a shape that broadcasts with \(2, 3\); got \(4, 3\)"),
            (vectors, Z(3, 1), ValueError, r"Expected value.shape\[-2:\] == \(3, 4\); got \(3, 1\)"),
            (vectors, Z(2, 4), ValueError, r"Expected value.shape\[-2:\] == \(3, 4\); got \(2, 4\)"),
            (d, Z(3, device="meta"), ValueError, "Expected value.device == cpu .* got meta"),
            (d, [0.0] * 3, TypeError, "Expected value to be of class Tensor; got list"),
        ):
            with pytest.raises(error, match=text):
                getattr(of, name)(value)
    assert d.log_prob(torch.tensor([0.0, 0.0, 1.0])).isfinite().all()


def test_values_outside():
    d = gx.HiddenMarkov(Z(2), Z(2, 2), normals(2), torch.tensor([2, 3]), duration=3, validate_args=True)
    for query in (d.log_prob, d.posterior, d.filter):
        with pytest.raises(ValueError, match=r"within the support \(PaddedSites\(Real\(\)\)\)"):
            query(torch.tensor([NAN, 0.0, 0.0]))


def test_other_devices():
    numbers = dist.Normal(Z(2, device="meta"), 1.0, validate_args=False)
    with pytest.raises(ValueError, match=r"Expected observation_dist.device == cpu .* got meta"):
        gx.HiddenMarkov(Z(2), Z(2, 2), numbers, duration=3)
    with pytest.raises(ValueError, match=r"Expected lengths.device == cpu \(device of initial\); got meta"):
        gx.HiddenMarkov(Z(2), Z(2, 2), normals(2), torch.tensor(2, device="meta"), duration=3)


def test_rows_of_nothing_unchecked():
    """NaN, as documented, never a number."""
    stuck = torch.tensor([[0, 0], [-INF, -INF]])
    for initial, transition in ((Z(2), stuck), (Z(2) - INF, Z(2, 2))):
        d = gx.HiddenMarkov(initial, transition, normals(2), duration=3, validate_args=False)
        assert d.log_prob(Z(3)).isnan() and d.log_prob(Z(2, 3)).isnan().all()


def test_wrong_queries():
    d = gx.HiddenMarkov(Z(2), Z(2, 2), normals(2), torch.tensor([2, 3]), duration=3, validate_args=True)
    with pytest.raises(ValueError, match=r"Expected batch_shape that \(2,\) broadcasts to; got \(3,\)"):
        d.expand((3,))
    with pytest.raises(
        NotImplementedError, match="Expected observation_dist to enumerate a finite support; got Normal"
    ):
        d.enumerate_support()
    with pytest.raises(ValueError, match=r"at most 1048576 sequences for enumeration; got 2\^30"):
        gx.HiddenMarkov(Z(2), Z(2, 2), dist.Bernoulli(Z(2)), duration=30).enumerate_support()
