"""Recipes of autoregressive flows: affine, spline and block autoregressive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.nn.functional import silu

from ..core.checks import check_widths
from ..heads.bijections import Affine
from ..heads.spline import RationalQuadraticSpline
from ..transforms.block_autoregressive import BlockAutoregressive
from .base import Flow
from .build import MakeConditioner, Options, Support, assemble, autoregressive_flow


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
    """Masked autoregressive flow: affine transforms of each feature given the earlier ones.

    Each transform maps data y to noise x by x_d = m_d + y_d exp(s_d), where a MADE predicts m_d and s_d from
    y_1 ... y_{d-1} and the context. The order of the features is reversed between transforms.

    Cost: ``log_prob`` takes one parallel network pass per transform. ``sample`` evaluates the networks feature by
    feature, which costs a small multiple of one pass.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        transforms: the number of transforms.
        hidden: widths of the hidden layers of each MADE.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the :class:`~pyro_genexact.Conditioner` to use in place
            of MADE, called once per transform. A conditioner of any length, such as ``Recurrent``, ``Markov`` or
            ``Transformer``, makes a flow over sequences and also accepts covariates, ``context=Covariates(C)``. Pad
            sequences of several lengths to D features and pass their ``lengths`` in the call, see :class:`Flow`.
        base: distribution over the flow's real vectors, or a module that returns one; standard normal by default.
        support: support of the data: a constraint, such as ``positive``, an interval or ``simplex``, or a list of one
            constraint per feature; the reals by default.
        standardize: data (N, D) from which the flow takes a fixed shift and scale of each feature, in unconstrained
            space.
        inverse: if True, ``sample`` is the parallel direction, see :func:`iaf`.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: if ``conditioner`` does not return a conditioner, or ``standardize`` is not a tensor.
        ValueError: if a size is not a positive integer, ``support`` is discrete, the support of ``base`` is not all
            real vectors, ``conditioner`` returns one with another context or number of parameters, or ``standardize`` has
            another width, is not inside the support, or is constant in a feature.

    Reference: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation", NeurIPS 2017.

    Example:
        >>> import torch
        >>> flow = maf(3, context=2, transforms=2, hidden=(16,))
        >>> flow(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])

        Use a recurrent network in place of MADE, for sequences of up to 3 sites:

        >>> from pyro_genexact import Autoregressive, conditioners, heads
        >>> net = lambda P, C: conditioners.Recurrent((), P, context=C, hidden=16)
        >>> flow = maf(3, conditioner=net)
        >>> flow(lengths=torch.tensor([3, 2, 0])).log_prob(torch.zeros(3, 3)).shape
        torch.Size([3])

        Use an autoregressive base of mixtures of five normals (MAF-MoG), or a base of
        Student's t distributions with learned degrees of freedom for heavy tails:

        >>> mixture = heads.Mixture(heads.Normal(), 5)
        >>> made = conditioners.MADE(3, mixture.num_params)
        >>> flow = maf(3, base=Autoregressive(made, mixture, (3,)))
        >>> free = conditioners.Independent(3, 3)
        >>> flow = maf(3, base=Autoregressive(free, heads.StudentT(), (3,)))
        >>> flow().rsample((2,)).shape
        torch.Size([2, 3])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return autoregressive_flow(Affine, features, context, options)


def iaf(
    features: int,
    context: int = 0,
    *,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = silu,
    conditioner: MakeConditioner | None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
) -> Flow:
    """Inverse autoregressive flow: :func:`maf` with ``inverse=True`` and a smooth activation.

    Each transform maps noise x to data y by y_d = m_d + x_d exp(s_d), where a MADE predicts m_d and s_d from x_1 ...
    x_{d-1} and the context. Use it for variational guides: sampling is fast, and the smooth activation makes the
    density smooth.

    Cost: ``sample``, and ``log_prob`` of a sample, take one parallel network pass per transform. ``log_prob`` of other
    values evaluates the networks feature by feature.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        transforms: the number of transforms.
        hidden: widths of the hidden layers of each MADE.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the network to use in place of MADE, see :func:`maf`.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016.

    Example:
        >>> import torch
        >>> q = iaf(8, context=32)(torch.zeros(5, 32))
        >>> q.rsample().shape
        torch.Size([5, 8])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, True)
    return autoregressive_flow(Affine, features, context, options)


def nsf(
    features: int,
    context: int = 0,
    *,
    bins: int = 8,
    bound: float = 5.0,
    transforms: int = 3,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Tensor], Tensor] = torch.relu,
    conditioner: MakeConditioner | None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Neural spline flow: monotone rational-quadratic splines of each feature given the earlier ones.

    Outside ±bound the splines are linear with slope 1. This is the recipe to try first.

    Cost: as :func:`maf` in both directions, because splines have a closed-form inverse.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        bins: the number of bins of each spline.
        bound: the splines are non-linear within ±bound; standardise the data so that most of them lie there.
        transforms: the number of transforms.
        hidden: widths of the hidden layers of each MADE.
        activation: elementwise activation of the hidden layers.
        conditioner: callable (num_params, context) that returns the network to use in place of MADE, see :func:`maf`.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.
        inverse: if True, ``sample`` is the parallel direction, see :func:`iaf`.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: as :func:`autoregressive`.
        ValueError: as :func:`maf`.

    Reference: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", NeurIPS 2019.

    Example:
        >>> import torch
        >>> nsf(3, bins=4, hidden=(16,))().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    options = Options(transforms, hidden, activation, conditioner, base, support, standardize, inverse)
    return autoregressive_flow(partial(RationalQuadraticSpline, bins, bound), features, context, options)


def bnaf(
    features: int,
    context: int = 0,
    *,
    residual: Literal["gated", "normal"] | None = "gated",
    transforms: int = 3,
    hidden: Sequence[int] = (8, 8),
    conditioner: None = None,
    base: Distribution | nn.Module | None = None,
    support: Support | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Block neural autoregressive flow: a masked network with positive diagonal blocks is itself the bijection.

    It has the fewest parameters of all recipes.

    Cost: ``log_prob`` takes one parallel network pass per transform. ``sample`` goes feature by feature and solves a
    one-dimensional equation numerically at each feature. ``inverse=True`` swaps the two costs.

    Args:
        features: D, the size of the vectors.
        context: C, the number of context features; 0 for none.
        residual: kind of residual connection, see :class:`~pyro_genexact.transforms.BlockAutoregressive`.
        transforms: the number of transforms.
        hidden: units per feature of each hidden layer.
        conditioner: must be None; all other recipes accept a conditioner.
        base: distribution over real vectors, or a module that returns one; standard normal by default.
        support: support of the data, one constraint or one per feature; the reals by default.
        standardize: data (N, D) whose mean and scale standardise each feature in unconstrained space.
        inverse: if True, ``sample`` is the parallel direction and ``log_prob`` solves the equations.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape (D,).

    Raises:
        TypeError: as :func:`autoregressive`.
        ValueError: if ``conditioner`` is not None, and as :func:`maf`.

    Reference: De Cao, Titov, Aziz, "Block Neural Autoregressive Flow", UAI 2019.

    Example:
        >>> import torch
        >>> bnaf(3, context=2)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    if conditioner is not None:
        raise ValueError(
            "Expected conditioner=None (the network of bnaf is itself the bijection, so no conditioner predicts its "
            f"parameters); got {type(conditioner).__name__}."
        )
    check_widths(1, hidden=hidden)

    def step(size: int) -> list[Transform | nn.Module]:
        module = BlockAutoregressive(size, hidden=hidden, context=context, residual=residual)
        return [module if inverse else module.inv]

    return assemble(step, features, transforms, base, support, standardize)
