"""Wrong inputs of gx.CRF, by the text of their errors."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_genexact as gx
from support.checks import fails
from support.values import ints


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "text"),
    [
        ((0, 4), {}, ValueError, "Expected num_labels to be an integer >= 1; got 0."),
        ((2.0, 4), {}, TypeError, "Expected num_labels to be of class int; got float."),
        (((3,), 4), {}, TypeError, "Expected num_labels to be of class int; got tuple."),
        ((3, 0), {}, ValueError, "Expected context to be an integer >= 1; got 0."),
        ((3, True), {}, ValueError, "Expected context to be an integer >= 1; got True."),
        ((3, None), {}, TypeError, "Expected context to be an integer or a module; got None."),
        ((3, 2.0), {}, TypeError, "Expected context to be an integer or a module; got 2.0."),
        ((3, (4,)), {}, TypeError, "Expected context to be an integer or a module; got (4,)."),
        ((3, nn.Linear), {}, TypeError, "Expected context to be an integer or a module; got <class"),
        (
            (3, 4),
            {"allowed": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            "Expected allowed.shape == (3, 3) (labels); got (2, 4).",
        ),
        (
            (3, 4),
            {"allowed": torch.ones(2, 4, dtype=torch.bool)[0, :3]},
            ValueError,
            "Expected allowed.shape == (3, 3) (labels); got (3,).",
        ),
        (
            (3, 4),
            {"allowed_initial": torch.ones(2, 4, dtype=torch.bool)[0]},
            ValueError,
            "Expected allowed_initial.shape == (3,) (labels); got (4,).",
        ),
        (
            (3, 4),
            {"allowed_final": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            "Expected allowed_final.shape == (3,) (labels); got (2, 4).",
        ),
        (
            (3, 4),
            {"allowed": torch.ones(3, 3)},
            TypeError,
            "Expected allowed to be a Boolean tensor; got torch.float32.",
        ),
        ((3, 4), {"allowed_final": [True] * 3}, TypeError, "Expected allowed_final to be a Boolean tensor; got [True"),
    ],
)
def test_learnable_crf(arguments, options, kind, text):
    fails(kind, text, gx.CRF, *arguments, **options)


@pytest.mark.parametrize(
    ("context", "lengths", "kind", "text"),
    [
        (None, None, ValueError, "Expected a context (*batch, T, 4) (CRF built with context=Covariates(4)); got none."),
        (torch.zeros(2, 5, 3), None, ValueError, "Expected context.shape[-1] == 4 (CRF built with context=Covariates(4)); got (2, 5, 3)."),
        (torch.zeros(4), None, ValueError, "Expected context.shape[-1] == 4 (CRF built with context=Covariates(4)); got (4,)."),
        ([1.0], None, TypeError, "Expected context to be a tensor; got list."),
        (torch.zeros(2, 5, 4).double(), None, ValueError, "Expected context.dtype == torch.float32 (that of the parameters); got torch.float64."),
        (ints(2, 5, 4), None, ValueError, "Expected context.dtype == torch.float32 (that of the parameters); got torch.int64."),
        (torch.zeros(2, 5, 4, device="meta"), None, ValueError, "Expected context.device == cpu (that of the parameters); got meta."),
        (torch.zeros(2, 0, 4), None, ValueError, "Expected unary.shape == (*batch, N, V) with N, V >= 1; got (2, 0, 3)."),
        (torch.zeros(2, 5, 4) * torch.nan, None, ValueError, "Expected unary to be finite or -inf; got nan."),
        (torch.zeros(2, 5, 4), torch.tensor([6, 1]), ValueError, "Expected lengths between 0 and 5 (sites of the event); got 6."),
        (torch.zeros(2, 5, 4), torch.ones(2), TypeError, "Expected lengths to be a tensor of integers; got torch.float32."),
        (torch.zeros(2, 5, 4), ints(3), ValueError, "Expected batch shapes that broadcast; got unary (2,), lengths (3,)."),
    ],
)  # fmt: skip
def test_calls_of_a_learnable_crf(context, lengths, kind, text):
    model = gx.CRF(3, 4)
    fails(kind, text, model, context, lengths)
    fails(kind, text, model.condition, context, lengths)


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, context):
        return self.value


@pytest.mark.parametrize(
    ("emissions", "kind", "text"),
    [
        (torch.zeros(5, 2), ValueError, "Expected emissions (*batch, N, 3) (num_labels); got (5, 2)."),
        (torch.zeros(()), ValueError, "Expected emissions (*batch, N, 3) (num_labels); got ()."),
        (torch.zeros(3), ValueError, "Expected unary.shape == (*batch, N, V) with N, V >= 1; got (3,)."),
        ((torch.zeros(5, 3), 0), TypeError, "Expected emissions to be of class Tensor; got tuple."),
        (None, TypeError, "Expected emissions to be of class Tensor; got NoneType."),
        (dist.Normal(0.0, 1.0), TypeError, "Expected emissions to be of class Tensor; got Normal."),
        (ints(5, 3), TypeError, "Expected unary to be a floating-point tensor; got torch.int64."),
        (torch.zeros(5, 3).double(), ValueError, "Expected transition.dtype == torch.float64"),
    ],
)
def test_modules_of_a_learnable_crf(emissions, kind, text):
    fails(kind, text, gx.CRF(3, Returns(emissions)), torch.zeros(5, 4))
    fails(TypeError, "Expected emissions to be of class Tensor; got NoneType.", gx.CRF(3, nn.Identity()))


def test_constraints_that_allow_nothing():
    nothing = torch.zeros(3, dtype=torch.bool)
    for name, value in (("allowed", nothing.expand(3, 3)), ("allowed_initial", nothing), ("allowed_final", nothing)):
        d = gx.CRF(3, 4, **{name: value})(torch.zeros(2, 5, 4))
        fails(
            ValueError,
            "Expected potentials that allow a label sequence; got none for row (0,)",
            lambda d=d: d.log_partition,
        )
