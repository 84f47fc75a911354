"""Empty batches: no samples, no rows that expand made, no rows of the context, of the lengths or of a prefix."""

import copy
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_genexact as gx
from pyro_genexact import heads as h
from pyro_genexact import testing
from pyro_genexact.conditioners import MADE, Recurrent
from pyro_genexact.core.independent import independent
from pyro_genexact.core.leaves import map_leaves
from pyro_genexact.families.in_support import with_support
from pyro_genexact.testing import conditioner_inputs, made
from pyro_genexact.testing.empty_batches import of_samples, queries
from support import registry
from support.families import HEADS
from support.registry.conditioners import small_transformer
from support.values import built, sized


def learned(module):
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("distribution_name", [*registry.DISTRIBUTIONS, *registry.FILTERED])
def test_distribution(distribution_name):
    module, context = (registry.DISTRIBUTIONS | registry.FILTERED)[distribution_name]()
    batch = made(module, context).batch_shape
    testing.empty(lambda rows: queries(made(module, context).expand((rows, *batch))), learned(module))
    testing.empty(lambda rows: of_samples(made(module, context), (rows,)), learned(module))
    testing.empty(lambda rows: of_samples(made(module, context), (2, rows)), learned(module))
    if context is not None:
        testing.empty(lambda rows: queries(made(module, context[:rows])), learned(module))
        wide = context.unsqueeze(1)
        testing.empty(lambda rows: queries(made(module, wide.expand(-1, rows, *wide.shape[2:]))), learned(module))


def test_head_of_distributions(distribution_head):
    def run(rows):
        phi = sized(rows, 4, distribution_head.num_params).requires_grad_()
        return queries(distribution_head(phi)) | {"phi": lambda: phi}

    testing.empty(run, learned(distribution_head))
    phi = sized(2, 4, distribution_head.num_params)
    testing.empty(lambda rows: of_samples(distribution_head(phi), (rows,)), learned(distribution_head))


FAMILIES = copy.deepcopy(HEADS)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    head = FAMILIES[name]
    phi = 0.5 * sized(2, 4, head.num_params)
    testing.empty(lambda rows: queries(head(phi[:rows])))
    testing.empty(lambda rows: of_samples(with_support(head(phi), head.support), (rows,)))


def directions(t, x):
    y = t(x).detach()
    return {
        "t": lambda: t(x),
        "log|dy/dx|": lambda: t.log_abs_det_jacobian(x, t(x)),
        "t.inv": lambda: t.inv(y),
        "log|dx/dy|": lambda: t.inv.log_abs_det_jacobian(y, t.inv(y)),
        "domain": lambda: t.domain.check(x),
        "codomain": lambda: t.codomain.check(y),
    }


def test_head_of_bijections(head):
    def run(rows):
        return directions(head(sized(rows, 4, head.num_params)), sized(rows, 4, *head.site_shape))

    testing.empty(run, learned(head))


def test_transform(transform):
    subject, x, context = transform
    parameters = learned(subject) if isinstance(subject, nn.Module) else []
    testing.empty(lambda rows: directions(made(subject, context), x.expand(rows, *x.shape)), parameters)
    if context is not None:
        few = context.expand(1, *context.shape)
        testing.empty(
            lambda rows: directions(made(subject, few.expand(rows, *context.shape)), x.expand(rows, *x.shape)),
            parameters,
        )


@pytest.mark.parametrize("padded", [False, True])
def test_conditioner(conditioner, padded):
    def run(rows):
        y, context = conditioner_inputs(conditioner, rows, padded=padded)
        index = torch.arange(rows).repeat(2)

        def later(branch):
            _, state = conditioner.start(context, rows)
            state = conditioner.reorder(state, index) if branch else state
            return conditioner.extend(y[index, :-1] if branch else y[:, :-1], state)[0] if y.shape[1] > 1 else None

        return {
            "forward": lambda: conditioner(y, context),
            "start": lambda: conditioner.start(context, rows)[0],
            "extend": partial(later, False),
            "reorder": partial(later, True),
        }

    testing.empty(run, learned(conditioner))


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


MODEL = built(gx.Sequence(small_transformer(3, context=gx.Source(2)), h.Categorical(3), 0, 4))
RAGGED = {
    "LinearChainCRF": lambda rows: gx.LinearChainCRF(
        sized(rows, 4, 3),
        sized(rows, 3, 3, 3),
        initial=sized(rows, 3),
        final=sized(rows, 3),
        lengths=4 * ones(rows),
    ),
    "LinearChainCRF, two dims": lambda rows: gx.LinearChainCRF(
        sized(2, rows, 3, 3), sized(3, 3), lengths=3 * ones(rows)
    ),
    "HiddenMarkov": lambda rows: gx.HiddenMarkov(
        sized(rows, 2), sized(rows, 3, 2, 2), dist.Normal(sized(rows, 4, 2), 1.0), lengths=2 * ones(rows)
    ),
    "HiddenMarkov of categories": lambda rows: gx.HiddenMarkov(
        sized(rows, 2), sized(2, 2), dist.Categorical(logits=sized(2, 3)), duration=3
    ),
    "Autoregressive": lambda rows: gx.distributions.AutoregressiveDistribution(
        built(Recurrent((), 2, hidden=4, context=gx.Covariates(2))),
        h.Normal(),
        (3,),
        sized(rows, 3, 2),
        lengths=2 * ones(rows),
    ),
    "Autoregressive, prefix": lambda rows: gx.distributions.AutoregressiveDistribution(
        built(MADE(4, 2, hidden=(8,))), h.Normal(), (4,)
    ).conditional_on_prefix(sized(rows, 2)),
    "Sequence": lambda rows: MODEL(sized(rows, 3, 2), source_lengths=2 * ones(rows)),
    "Sequence, prefix": lambda rows: MODEL(sized(rows, 3, 2)).conditional_on_prefix(ones(rows, 2), ones(rows)),
    "Sequence, prefix of a new batch": lambda rows: MODEL(sized(3, 2)).conditional_on_prefix(ones(rows, 2), ones(rows)),
    "Flow": lambda rows: built(gx.flows.maf(3, context=2, transforms=1))(sized(rows, 2), lengths=2 * ones(rows)),
    "CRF": lambda rows: built(gx.CRF(3, 2))(sized(rows, 4, 2), lengths=4 * ones(rows)),
    "PerSite": lambda rows: gx.heads.PerSite([h.Bernoulli(), h.Normal(), h.Gamma()])(sized(rows, 3, 5)),
}


@pytest.mark.parametrize("case", RAGGED)
def test_ragged(case):
    torch.manual_seed(0)
    testing.empty(lambda rows: queries(RAGGED[case](rows)))


def test_a_check_follows_its_bounds():
    """Of constraints that a module moves or casts."""
    bound = torch.tensor(0.0)
    moved = map_leaves(lambda t: t + 1, independent(constraints.greater_than(bound), 1))
    assert independent(constraints.greater_than(bound), 1).check(torch.tensor([0.5])) and not moved.check(
        torch.tensor([0.5])
    )


class Wrong(dist.Normal):
    """Right, until a subclass breaks something."""

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class OneRowAtLeast(Wrong):
    def sample(self, sample_shape=()):
        return super().sample(sample_shape) if self.loc.numel() else torch.zeros(1)


class OtherDtype(Wrong):
    @property
    def mean(self):
        return self.loc if self.loc.numel() else self.loc.float()


class Detached(Wrong):
    def log_prob(self, value):
        return super().log_prob(value) if self.loc.numel() else value + 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loc: dist.Normal(loc, 1.0).to_event(1), r"\[entropy\]: RuntimeError: cannot reshape"),
        (lambda loc: OneRowAtLeast(loc, 1.0), r"\[sample, shape\]: \(1,\), not \(0, 2\)"),
        (lambda loc: OtherDtype(loc, 1.0), r"\[mean, dtype\]: torch.float32, not torch.float64"),
        (lambda loc: Detached(loc, 1.0), r"\[log_prob of values, requires_grad\]: False, not True"),
    ],
)
def test_empty_has_power(make, message):
    loc = sized(1, 2).requires_grad_()
    with pytest.raises(AssertionError, match=f"empty broken .*{message}"):
        testing.empty(lambda rows: queries(make(loc.expand(rows, 2))), [loc])


class NaNOfNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        return x.expand(rows, 2).clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mean(0), None


def test_gradients_of_no_rows_have_power():
    x = sized(2).requires_grad_()
    testing.empty(lambda rows: {"x": lambda: x.expand(rows, 2)}, [x])
    with pytest.raises(AssertionError, match=r"empty broken \[x, gradient of leaf 0\]: nan, not 0"):
        testing.empty(lambda rows: {"x": lambda: NaNOfNone.apply(x, rows)}, [x])
    unused = sized(2).requires_grad_()
    with pytest.raises(AssertionError, match=r"empty broken \[x, whether leaf 1 has a gradient\]: True, not False"):
        testing.empty(lambda rows: {"x": lambda: x.expand(rows, 2) + (unused * x if rows else x)}, [x, unused])
