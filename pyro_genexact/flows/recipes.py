"""Recipes of autoregressive flows, each a few lines of :func:`autoregressive` or :func:`assemble`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Unpack

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.nn.functional import silu

from ..core.checks import check_widths
from ..heads.bijections import Affine
from ..heads.networks import IntegratedPositive
from ..heads.polynomial import Bernstein, SumOfSquares
from ..heads.sigmoidal import DeepSigmoid
from ..heads.spline import RationalQuadraticSpline
from ..transforms.block_autoregressive import BlockAutoregressive
from .base import Flow
from .build import (
    MakeConditioner,
    NetworkOptions,
    RecipeOptions,
    Support,
    assemble,
    autoregressive,
    check_options,
)


def maf(
    features: int,
    context: int = 0,
    *,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Masked autoregressive flow: affine transforms of each feature given the earlier ones, in alternating orders.

    ``log_prob`` is one parallel pass a transform; ``sample`` goes feature by feature, incrementally (a small multiple).

    Args:
        features: D, the size of the vectors.
        context: C, features of the context; 0 for none.
        transforms: how many.
        hidden: widths of the hidden layers of each MADE.
        activation: of the hidden layers, elementwise.
        conditioner: another network in place of MADE: a callable (num_params, context) to a
            :class:`~pyro_genexact.Conditioner`, called once a transform. One of any length, such as ``Recurrent``, ``Markov`` or
            ``Transformer``, makes a flow over sequences, and also takes covariates, ``context=Covariates(C)``. Rows of several
            lengths are padded to D features, and the call is told their ``lengths``, see :class:`Flow`.
        base: a distribution or module over the flow's real vectors; by default standard normal.
        support: a constraint (positive, an interval, simplex), or a list of one a feature; by default the reals.
        standardize: rows (N, D) of data from which shift and scale a feature are taken, in unconstrained space.
        inverse: the other direction, see :func:`iaf`.

    Raises:
        ValueError: for sizes that are no positive integers, a discrete support, a base over less than the reals, a
            conditioner of another context, standardize rows of another width, on
            the support's boundary or constant in a feature.

    Reference: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation", NeurIPS 2017.

    Example:
        >>> import torch
        >>> flow = maf(3, context=2, transforms=2, hidden=(16,))
        >>> flow(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])

        A recurrent network in place of MADE:

        >>> from pyro_genexact import Autoregressive, conditioners
        >>> flow = maf(3, conditioner=lambda P, C: conditioners.Recurrent((), P, context=C, hidden=16))
        >>> flow(lengths=torch.tensor([3, 2, 0])).log_prob(torch.zeros(3, 3)).shape  # of sequences
        torch.Size([3])

        MAF-MoG: a base that is itself autoregressive, with mixtures of five normals. And Student's distribution with
        learned degrees of freedom, for heavy tails:

        >>> from pyro_genexact import heads
        >>> mixture = heads.Mixture(heads.Normal(), 5)
        >>> flow = maf(3, base=Autoregressive(conditioners.MADE(3, mixture.num_params), mixture, (3,)))
        >>> flow = maf(3, base=Autoregressive(conditioners.Independent(3, 3), heads.StudentT(), (3,)))
        >>> flow().rsample((2,)).shape
        torch.Size([2, 3])
    """
    return autoregressive(
        Affine,
        features,
        context,
        transforms=transforms,
        hidden=hidden,
        activation=activation,
        conditioner=conditioner,
        base=base,
        support=support,
        standardize=standardize,
        inverse=inverse,
    )


def iaf(features: int, context: int = 0, **options: Unpack[NetworkOptions]) -> Flow:
    """Inverse autoregressive flow: :func:`maf` with ``inverse=True``, and networks with a smooth activation.

    ``sample``, and the score of a sample, is one parallel pass a transform; ``log_prob`` of other values goes feature by
    feature. The choice for guides, whose densities should be as smooth as posteriors are.

    Args:
        features, context, options: those of :func:`maf`, but ``activation`` is ``silu`` by default.

    Reference: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016.

    Example:
        >>> import torch
        >>> q = iaf(8, context=32)(torch.zeros(5, 32))
        >>> q.rsample().shape
        torch.Size([5, 8])
    """
    return maf(features, context, inverse=True, **{"activation": silu, **options})  # type: ignore[arg-type]


def nsf(
    features: int, context: int = 0, *, bins: int = 8, bound: float = 5.0, **options: Unpack[NetworkOptions]
) -> Flow:
    """Neural spline flow: monotone rational-quadratic splines, the identity's slope beyond the bound.

    Cost: that of :func:`maf` in both directions, since a spline's inverse is a formula. The first choice.

    Args:
        features, context, options: those of :func:`maf`.
        bins: of each spline.
        bound: splines bend within ±bound; standardise, so that the data lie there.

    Reference: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", NeurIPS 2019.

    Example:
        >>> import torch
        >>> nsf(3, bins=4, hidden=(16,))().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    return autoregressive(partial(RationalQuadraticSpline, bins, bound), features, context, **options)


def naf(features: int, context: int = 0, *, units: int = 8, layers: int = 1, **options: Unpack[NetworkOptions]) -> Flow:
    """Neural autoregressive flow: each feature through a small monotone network of sigmoids, whose weights MADE predicts.

    Cost: ``log_prob`` is one parallel pass a transform; ``sample`` solves one number a feature, six evaluations of
    its little network near the identity, some twenty where its sigmoids are steep (with ``inverse=True`` the other way
    round).

    Args:
        features, context, options: those of :func:`maf`.
        units: of each layer of the monotone network.
        layers: of the monotone network; 1 is the deep sigmoidal flow, more the deep dense one.

    Reference: Huang, Krueger, Lacoste, Courville, "Neural Autoregressive Flows", ICML 2018.

    Example:
        >>> naf(3, units=4, hidden=(16,))().sample((5,)).shape
        torch.Size([5, 3])
    """
    return autoregressive(partial(DeepSigmoid, units, layers), features, context, **options)


def umnn(
    features: int,
    context: int = 0,
    *,
    signal: int = 16,
    network: Sequence[int] = (64, 64),
    **options: Unpack[NetworkOptions],
) -> Flow:
    """Unconstrained monotonic neural network: each feature through the integral of a positive network.

    Cost: ``log_prob`` integrates once a feature, by the network at some dozens of nodes, all at once; ``sample`` solves one
    number a feature, with about six integrals (with ``inverse=True`` the other way round).

    Args:
        features, context, options: those of :func:`maf`.
        signal: how many numbers MADE predicts for the positive network, beside the offset.
        network: widths of its hidden layers; its weights are shared by all features of a transform.

    Reference: Wehenkel, Louppe, "Unconstrained Monotonic Neural Networks", NeurIPS 2019.

    Example:
        >>> import torch
        >>> umnn(2, signal=4, network=(16,), hidden=(16,))().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """
    return autoregressive(partial(IntegratedPositive, signal, network), features, context, **options)


def sospf(
    features: int,
    context: int = 0,
    *,
    polynomials: int = 3,
    degree: int = 4,
    bound: float = 5.0,
    **options: Unpack[NetworkOptions],
) -> Flow:
    """Sum-of-squares polynomial flow: each feature through the integral of a sum of squared polynomials.

    Straight beyond the bound. Cost: as :func:`naf`, with fewer evaluations, each of them cheaper.

    Args:
        features, context, options: those of :func:`maf`.
        polynomials: that are squared and summed.
        degree: of each.
        bound: they bend within ±bound; standardise, so that the data lie there.

    Reference: Jaini, Selby, Yu, "Sum-of-Squares Polynomial Flow", ICML 2019.

    Example:
        >>> sospf(3, degree=2, hidden=(16,))().sample((5,)).shape
        torch.Size([5, 3])
    """
    return autoregressive(partial(SumOfSquares, polynomials, degree, bound), features, context, **options)


def bpf(
    features: int, context: int = 0, *, degree: int = 16, bound: float = 5.0, **options: Unpack[NetworkOptions]
) -> Flow:
    """Bernstein polynomial flow: each feature through an increasing Bernstein polynomial, straight beyond the bound.

    Cost: as :func:`naf`, with fewer evaluations, each of them cheaper.

    Args:
        features, context, options: those of :func:`maf`.
        degree: of the polynomials.
        bound: they bend within ±bound; standardise, so that the data lie there.

    References: Sick, Hothorn, Dürr, "Deep transformation models", ICPR 2020; Arpogaus et al., "Short-Term Density
    Forecasting of Low-Voltage Load using Bernstein-Polynomial Normalizing Flows", IEEE Transactions on Smart Grid 2023.

    Example:
        >>> bpf(3, degree=8, hidden=(16,))().sample((5,)).shape
        torch.Size([5, 3])
    """
    return autoregressive(partial(Bernstein, degree, bound), features, context, **options)


def bnaf(
    features: int,
    context: int = 0,
    *,
    hidden: Sequence[int] = (8, 8),
    residual: Literal["gated", "normal"] | None = "gated",
    conditioner: None = None,
    inverse: bool = False,
    **ends: Unpack[RecipeOptions],
) -> Flow:
    """Block neural autoregressive flow: a masked network that is itself the bijection, with positive diagonal blocks.

    Cost: ``log_prob`` is one parallel pass a transform; ``sample`` goes feature by feature and solves one number each (with
    ``inverse=True`` the other way round). The smallest in parameters.

    Args:
        features, context, inverse: as in :func:`maf`.
        hidden: units of each hidden layer for each feature.
        residual: as :class:`~pyro_genexact.transforms.BlockAutoregressive` takes it.
        conditioner: none.
        ends: ``transforms``, ``base``, ``support`` and ``standardize`` of :func:`maf`.

    Raises:
        ValueError: for a conditioner, and as :func:`maf`.

    Reference: De Cao, Titov, Aziz, "Block Neural Autoregressive Flow", UAI 2019.

    Example:
        >>> import torch
        >>> bnaf(3, context=2)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    if conditioner is not None:
        raise ValueError(
            "Expected no conditioner (the network of bnaf is itself the bijection, so that nothing predicts a head's "
            f"numbers); got {type(conditioner).__name__}."
        )

    check_options("bnaf", ends)
    check_widths(1, hidden=hidden)

    def step(size: int) -> list[Transform | nn.Module]:
        module = BlockAutoregressive(size, hidden=hidden, context=context, residual=residual)
        return [module if inverse else module.inv]

    return assemble(step, features, **ends)
