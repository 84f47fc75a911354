"""Laws of conditioners."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from ..base import Conditioner, Head
from ..contexts import PaddedSequence, kind_of
from ..transforms.autoregressive import ConditionedAutoregressive
from .helpers import broken, close, conditioner_inputs, gradients_of, noise_like, raises, redraw, tensors_of


def causality(
    conditioner: Conditioner,
    reads: Tensor | None = None,
    must_read: Tensor | None = None,
    sites: int = 5,
    seed: int = 0,
    padded: bool = False,
) -> None:
    """Checks that the parameters of a site depend on the earlier sites that it may read, and on no others, for any weights.

    Args:
        conditioner: the conditioner. It is checked as given, with random weights, copied, pickled, and through
            ``functional_call``.
        reads: a Boolean tensor (T, T), where ``reads[t, s]`` is whether site t may read site s; by default all earlier ones.
        must_read: a Boolean tensor (T, T) of the sites on which it must depend; by default ``reads``.
        sites: the number of sites T, if the conditioner does not fix it.
        seed: the seed of the inputs and the random weights.
        padded: whether a source has lengths, as in the other laws.

    Raises:
        AssertionError: if the law is broken.

    Example:
        >>> from pyro_genexact import conditioners
        >>> causality(redraw(conditioners.MADE(4, 2, hidden=(16,)).double()))
    """
    y, context = conditioner_inputs(conditioner, 16, sites, seed, padded)
    noisy = redraw(copy.deepcopy(conditioner), seed + 1)
    noise = {name: p.detach() for name, p in noisy.named_parameters()}
    variants: dict[str, Callable[..., Tensor]] = {
        "as given": conditioner,
        "noise for weights": noisy,
        "deepcopy": copy.deepcopy(conditioner),
        "pickle": pickle.loads(pickle.dumps(conditioner)),
        "functional_call": lambda *inputs: functional_call(conditioner, noise, inputs),
    }
    reads = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device="cpu").tril(-1) if reads is None else reads
    must_read = reads if must_read is None else must_read
    for case, net in variants.items():
        with torch.no_grad():
            phi = net(y, context)
            for s in range(y.shape[1]):
                change = (net(_with_other_site(conditioner, y, s), context) - phi).abs().amax((0, 2)).tolist()
                for t, by in enumerate(change):
                    found = f"changes the parameters of site {t} by {by:.3g}"
                    if by > 1e-12 and not reads[t, s]:
                        broken("causality", f"{case}, site {s}", f"{found}, which must be 0")
                    if not by > 1e-9 and must_read[t, s]:
                        broken("causality", f"{case}, site {s}", f"{found}, which must not be 0")


def chunks(conditioner: Conditioner, sites: int = 5, seed: int = 0, tol: float = 1e-9, padded: bool = False) -> None:
    """Checks that ``forward`` equals ``start`` followed by ``extend`` for any chunks, with the same gradients.

    Args:
        conditioner: the conditioner.
        sites: the number of sites T, if the conditioner does not fix it.
        seed: the seed of the inputs.
        tol: the tolerance, relative to 1 + |value|.
        padded: whether a source has lengths.
    """
    y, context = conditioner_inputs(conditioner, 6, sites, seed, padded)
    T = y.shape[1]
    leaves = [v.requires_grad_() for v in (y, *tensors_of(context)) if v.is_floating_point()]
    leaves += [p for p in conditioner.parameters() if p.requires_grad]
    expected = conditioner(y, context)
    cotangent = noise_like(expected, seed)
    grads = gradients_of((expected * cotangent).sum(), leaves)
    cuts = [
        c for c in ((T - 1,), (1,) * (T - 1), (1, T - 2), (T - 2, 1), (2, *(1,) * (T - 3))) if min(c, default=1) > 0
    ]
    for cut in dict.fromkeys(c for c in cuts if sum(c) == T - 1) or [()]:
        with torch.no_grad():
            close("chunks", f"cut {cut}, without grad", _by_chunks(conditioner, y, context, cut), expected, tol)
        phi = _by_chunks(conditioner, y, context, cut)
        close("chunks", f"cut {cut}, with grad", phi, expected, tol)
        for i, (got, grad) in enumerate(zip(gradients_of((phi * cotangent).sum(), leaves), grads, strict=True)):
            close("chunks", f"cut {cut}, gradient of input or parameter {i}", got, grad, tol)


def reorder(conditioner: Conditioner, sites: int = 5, seed: int = 0, tol: float = 1e-9, padded: bool = False) -> None:
    """Checks that ``reorder`` copies batch rows: branches and the original state can be extended independently.

    Arguments as in :func:`chunks`.
    """
    y, context = conditioner_inputs(conditioner, 6, sites, seed, padded)
    T = y.shape[1]
    index = torch.tensor([4, 0, 4, 2, 1, 1], device=y.device)  # as many rows as before, so that sharing shows
    other = _with_other_site(conditioner, y, T - 2) if T > 1 else y
    for read in range(T - 1):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                _, state = conditioner.start(context, len(y))
                if read:
                    _, state = conditioner.extend(y[:, :read], state)
                branches = [conditioner.reorder(state, index) for _ in range(2)]
                got = [
                    conditioner.extend(rest[:, read : T - 1], branch)[0]
                    for rest, branch in ((other[index], branches[0]), (y[index], branches[1]), (y, state))
                ]
                phis = [conditioner(v, context)[:, read + 1 :] for v in (other, y)]
            wanted = (phis[0][index], phis[1][index], phis[1])
            for name, phi, value in zip(("first branch", "second branch", "trunk"), got, wanted, strict=True):
                close("reorder", f"{name} after {read} sites, grad {grad}", phi, value, tol)


def consumption(conditioner: Conditioner, sites: int = 5, seed: int = 0, padded: bool = False) -> None:
    """Checks the errors of ``extend`` and ``reorder``.

    A state that was already extended raises a RuntimeError. Too many sites, and another number of rows than that of the state,
    raise a ValueError. Arguments as in :func:`chunks`.
    """
    y, context = conditioner_inputs(conditioner, 6, sites, seed, padded)
    T = y.shape[1]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, old = conditioner.start(context, len(y))
            if conditioner.num_sites or kind_of(conditioner.context).by_site:
                with raises("consumption", f"{T} of {T} sites, grad {grad}", ValueError):
                    conditioner.extend(y, old)
            if T > 1:
                for rows in (y[:1], y[:4], torch.cat([y, y[:1]])):
                    with raises("consumption", f"{len(rows)} rows after {len(y)}, grad {grad}", ValueError):
                        conditioner.extend(rows[:, :1], old)
                conditioner.extend(y[:, :1], old)
                with raises("consumption", f"extend again, grad {grad}", RuntimeError):
                    conditioner.extend(y[:, :1], old)
                with raises("consumption", f"reorder after extend, grad {grad}", RuntimeError):
                    conditioner.reorder(old, torch.arange(2, device=y.device))


def context_use(conditioner: Conditioner, sites: int = 5, seed: int = 0, padded: bool = False) -> None:
    """Checks that the parameters of each site, including the first, are a non-linear function of each context feature.

    With covariates (``context=Covariates(C)``), each site must depend on its own covariates. With a source (``Source(C)``), it
    must depend on all steps except the padding, which may contain NaN. Arguments as in :func:`chunks`.
    """
    y, context = conditioner_inputs(conditioner, 16, sites, seed, padded)
    if context is None:
        return
    lengths = context.lengths if isinstance(context, PaddedSequence) else None
    values = (context if lengths is None else context.values).nan_to_num()

    def phi_of(values: Tensor) -> Tensor:
        return conditioner(y, values if lengths is None else PaddedSequence(values, lengths))  # type: ignore[arg-type]

    with torch.no_grad():
        phi, zero = phi_of(values), phi_of(torch.zeros_like(values))
        close("context use", "padding", conditioner(y, context), phi, 0.0)
        for feature in range(values.shape[-1]):
            for s in range(values.shape[1]) if kind_of(conditioner.context).attended else [None]:
                step = torch.zeros_like(values)
                (step if s is None else step[:, s])[..., feature] = 1.5
                case = f"feature {feature}" + ("" if s is None else f" of step {s}")
                by = _own_change(conditioner, phi_of, values, step, phi)
                if not (by > 1e-9).all():
                    broken(
                        "context use", case, f"changes site {int(by.argmin())} by {by.min():.3g}, which must not be 0"
                    )
                if lengths is not None and s is not None:
                    beyond = lengths <= s
                    close("context use", f"{case}, padding", phi_of(values + step)[beyond], phi[beyond], 0.0)
        bend = (phi_of(-values) + phi - 2 * zero).abs().amax((0, 2))
    if not (bend > 1e-6).all():
        broken(
            "context use", "non-linearity", f"site {int(bend.argmin())} bends by {bend.min():.3g}, which must not be 0"
        )


def _own_change(
    conditioner: Conditioner, phi_of: Callable[[Tensor], Tensor], context: Tensor, step: Tensor, phi: Tensor
) -> Tensor:
    """Returns the largest change (T,) of the parameters of each site if the context, or the site's covariates, change."""
    if not kind_of(conditioner.context).by_site:
        return (phi_of(context + step) - phi).abs().amax((0, 2))
    sites = torch.eye(phi.shape[1], dtype=context.dtype, device=context.device).unsqueeze(-1)
    changes = [phi_of(context + own * step) - phi for own in sites]
    return torch.stack([change[:, t].abs().amax() for t, change in enumerate(changes)])


def sequential_gradient(conditioner: Conditioner, head: Head, seed: int = 0, sites: int = 5, tol: float = 1e-8) -> None:
    """Checks a conditioner's ``adjoint``, the reverse sweep that gives gradients of the sequential direction.

    Solving y_t = head(phi_t(x_<t))(x_t) for x must have the same gradients in y, the context and all parameters as autograd
    through ``start`` and ``extend``.

    Args:
        conditioner: the conditioner.
        head: a head of bijections.
        seed: the seed of the inputs.
        sites: the number of sites T, if the conditioner does not fix it.
        tol: the tolerance, relative to 1 + |value|.
    """
    y, context = conditioner_inputs(conditioner, 4, sites, seed)
    leaves = [v.requires_grad_() for v in (y, context) if v is not None]
    leaves += [p for p in (*conditioner.parameters(), *head.parameters()) if p.requires_grad]
    transform = ConditionedAutoregressive(conditioner, head, context)
    x = transform.inv(y)
    found = x, -transform.log_abs_det_jacobian(x, y)

    phi, state = conditioner.start(context, len(y))
    xs, ladj = [head(phi.unsqueeze(1), 0).inv(y[:, :1])], 0.0
    phis = [phi.unsqueeze(1)]
    for t in range(1, y.shape[1]):
        phi, state = conditioner.extend(xs[-1], state)
        phis.append(phi)
        xs.append(head(phi, t).inv(y[:, t : t + 1]))
    for t, (phi, x_t) in enumerate(zip(phis, xs, strict=True)):
        ladj = ladj - head(phi, t).log_abs_det_jacobian(x_t, y[:, t : t + 1]).sum(1)
    expected = torch.cat(xs, 1), ladj
    for name, got, value in zip(("x", "log|dx/dy|"), found, expected, strict=True):
        close("sequential gradient", name, got, value, tol)  # type: ignore[arg-type]
    weights = [noise_like(value, seed + i) for i, value in enumerate(found)]
    for case, keep in (("of x", (1, 0)), ("of log|dx/dy|", (0, 1)), ("of both", (1, 1))):
        sums = [sum(k * (v * w).sum() for k, v, w in zip(keep, out, weights, strict=True)) for out in (found, expected)]
        pairs = zip(*(gradients_of(total, leaves, keep_graph=True) for total in sums), strict=True)  # type: ignore[arg-type]
        for i, (got, value) in enumerate(pairs):
            close("sequential gradient", f"{case}, input or parameter {i}", got, value, tol)


def _with_other_site(conditioner: Conditioner, y: Tensor, s: int) -> Tensor:
    kind = conditioner.site[s] if isinstance(conditioner.site, list) else conditioner.site
    new = y.detach().clone()
    new[:, s] = (new[:, s] + 1) % kind if isinstance(kind, int) else new[:, s] + 1.7
    return new


def _by_chunks(conditioner: Conditioner, y: Tensor, context: Tensor | None, cut: Sequence[int]) -> Tensor:
    phi, state = conditioner.start(context, len(y))
    phis, first = [phi.unsqueeze(1)], 0
    for size in cut:
        chunk = y[:, first : first + size].clone()
        phi, state = conditioner.extend(chunk, state)
        if not torch.is_grad_enabled():
            chunk.zero_()  # the state must not share memory with its inputs
        phis.append(phi)
        first += size
    return torch.cat(phis, 1)
