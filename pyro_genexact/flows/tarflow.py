"""TarFlow: a flow of images whose blocks are Transformers over patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from ..base import Head
from ..conditioners.attention import Transformer
from ..contexts import Source, kind_of
from ..core.checks import check_sizes
from ..heads.bijections import Affine
from ..transforms.autoregressive import AutoregressiveTransform
from ..transforms.coupling import check_bijection
from ..transforms.linear import Reverse
from ..transforms.modules import Inverse
from ..transforms.patches import Patches
from .base import Flow
from .build import completed, new_head


def tarflow(
    image_shape: Sequence[int],
    patch: int,
    context: int | Source = 0,
    *,
    transforms: int = 4,
    width: int = 64,
    depth: int = 2,
    num_heads: int = 4,
    dropout: float = 0.0,
    head: Callable[[tuple[int, ...]], Head] | None = None,
    base: Distribution | nn.Module | None = None,
    support: constraints.Constraint | None = None,
    standardize: Tensor | None = None,
    inverse: bool = False,
) -> Flow:
    """Transformer autoregressive flow (TarFlow): affine transforms of each patch of an image given the earlier patches.

    Each block maps the patches y_1 ... y_T of an image to x_t = m_t + y_t exp(s_t), elementwise, where a Transformer
    over the grid of patches predicts m_t and s_t from y_1 ... y_{t-1} and the context. The order of the patches is
    reversed between blocks, and log p(y) = log p_base(x) + sum of all s_t. The base is a standard normal over images.
    The flow starts near the identity.

    Cost: ``log_prob`` takes one parallel pass of each Transformer, O(T^2) operations. ``sample`` evaluates each of them
    patch by patch with a cache of keys and values, which takes about the arithmetic of one pass but T steps.
    ``flow(solver="fixed_point").sample()`` takes parallel passes instead, at most T for each block.

    Train with a little Gaussian noise, by :class:`~pyro_genexact.Augmented`, and remove it from samples with
    :func:`~pyro_genexact.denoised`. :class:`~pyro_genexact.Guided` adds guidance to a flow with a context.

    Args:
        image_shape: (C, H, W) or (H, W).
        patch: p, the side of the patches in pixels. A block treats the d = C p^2 numbers of a patch as independent
            given the earlier patches; p = 1 models small images best and costs the most.
        context: C, the number of context features, such as a one-hot class; 0 for none; or ``Source(C)``.
        transforms: the number of blocks.
        width: width of the residual stream of the Transformers.
        depth: the number of layers of each Transformer.
        num_heads: the number of attention heads; 4 * num_heads divides ``width``.
        dropout: dropout rate of the Transformers in training mode.
        head: callable that returns a new bijection head, given the shape (d,) of a patch; by default
            ``heads.Affine``. For splines use ``lambda shape: heads.RationalQuadraticSpline(shape=shape)``.
        base: distribution over images, or a module that returns one; standard normal by default.
        support: support of all pixels, such as ``constraints.unit_interval``; the reals by default.
        standardize: images (N, *image_shape) whose mean and scale standardise each pixel in unconstrained space.
        inverse: if True, ``sample`` is the parallel direction and ``log_prob`` goes patch by patch.

    Returns:
        A flow whose distributions have batch shape (*batch) and event shape ``image_shape``.

    Raises:
        TypeError: if ``head`` does not return a bijection head, or ``standardize`` is not a tensor.
        ValueError: if a size is not a positive integer, ``patch`` does not divide H and W, 4 * num_heads does not
            divide ``width``, ``support`` is discrete, or heads, ``base`` or ``standardize`` are of another shape. In calls,
            for images and contexts of another shape.

    Reference: Zhai et al., "Normalizing Flows are Capable Generative Models", ICML 2025, arXiv 2412.06329.

    Example:
        >>> import torch
        >>> flow = tarflow((3, 8, 8), 4, context=10, transforms=2, width=16, depth=1)
        >>> classes = torch.eye(10)
        >>> flow(classes).log_prob(torch.zeros(10, 3, 8, 8)).shape
        torch.Size([10])
        >>> flow(classes[:2]).sample().shape
        torch.Size([2, 3, 8, 8])
    """
    check_sizes(1, transforms=transforms)
    kind_of(context, Source)  # covariates of patches would have another order in every other block
    cut = Patches(image_shape, patch)

    def block() -> nn.Module:
        it = new_head(Affine if head is None else head, cut.site_shape)
        check_bijection(it)
        if tuple(it.site_shape) != cut.site_shape:
            raise ValueError(f"Expected head to make heads of site_shape {cut.site_shape}; got {it.site_shape}.")
        net = Transformer(
            cut.site_shape,
            it.num_params,
            context=context,
            width=width,
            depth=depth,
            num_heads=num_heads,
            dropout=dropout,
            grid=cut.grid,
        )
        module = AutoregressiveTransform(net, it)
        return module if inverse else module.inv

    def blocks(shape: torch.Size) -> list[Transform | nn.Module]:
        chain: list[Transform | nn.Module] = [] if transforms % 2 else [Reverse(-2)]  # so that x has the order of y
        for _ in range(transforms - 1):
            chain += [block(), Reverse(-2)]
        return [cut, *chain, block(), Inverse(Patches(shape, patch))]

    return completed(blocks, cut.image_shape, base, support, standardize)
