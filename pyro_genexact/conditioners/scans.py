"""Linear recurrences over many steps: products of matrices within chunks of steps, and a recurrence over the chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.precision import full_precision

# The largest numbers of steps per chunk. Larger ones mean more work within chunks, and fewer, larger operations.
_DIAGONAL, _SELECTIVE = 64, 32


@full_precision
def diagonal_scan(u: Tensor, state: Tensor, rate: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the recurrence s_t = exp(rate) s_{t-1} + u_t, y_t = Re(read . s_t) of each channel.

    Args:
        u: (B, S, W), the real inputs.
        state: (B, W, N), complex, the state before the first step.
        rate: (W, N), complex, with a negative real part.
        read: (W, N), complex.

    Returns:
        The outputs (B, S, W), and the state (B, W, N) after the last step.
    """
    if u.shape[1] == 1:
        state = torch.addcmul(u.transpose(1, 2).to(state.dtype), state, rate.exp())
        return (state * read).real.sum(2).unsqueeze(1), state
    size = _chunk_size(u.shape[1], _DIAGONAL)
    whole = u.shape[1] // size * size
    y, state = _diagonal_chunks(u[:, :whole].unflatten(1, (-1, size)), state, rate, read)
    if whole == u.shape[1]:
        return y, state
    rest, state = _diagonal_chunks(u[:, whole:].unsqueeze(1), state, rate, read)
    return torch.cat([y, rest], 1), state


def _diagonal_chunks(u: Tensor, state: Tensor, rate: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`diagonal_scan`, for K chunks of Q inputs (B, K, Q, W)."""
    rows, chunks, size, width = u.shape
    powers = _powers(rate, size + 1)  # (W, N, Q + 1), exp(rate q)
    kernel = (read.unsqueeze(2) * powers[..., :-1]).real.sum(1)
    inputs = u.permute(3, 0, 1, 2).reshape(width, rows * chunks, size)
    gathered = inputs @ _pairs(powers[..., :-1].flip(2).transpose(1, 2))  # what each chunk adds to the state
    added = torch.view_as_complex(gathered.unflatten(2, (-1, 2))).unflatten(1, (rows, chunks)).movedim(0, 2)
    before, decay = [state], powers[..., -1]
    for part in added.unbind(1):
        before.append(torch.addcmul(part, before[-1], decay))
    states = torch.stack(before[:-1], 1).permute(2, 0, 1, 3).flatten(1, 2)  # (W, B K, N)
    reads = _pairs((read.unsqueeze(2) * powers[..., 1:]).conj().resolve_conj().transpose(1, 2)).transpose(1, 2)
    y = torch.baddbmm(inputs @ _toeplitz(kernel), _pairs(states), reads)
    return y.reshape(width, rows, chunks * size).permute(1, 2, 0), before[-1]


def _toeplitz(kernel: Tensor) -> Tensor:
    """Returns the matrices (W, Q, Q) with kernel[j - i] at (i, j), and 0 for j < i."""
    size = kernel.shape[1]
    # each row of length 2 Q - 1, cut from repetitions of a row of length 2 Q, starts one place earlier than the last
    repeated = pad(kernel, (0, size)).unsqueeze(1).expand(-1, size, -1).flatten(1)
    return repeated[:, : size * (2 * size - 1)].unflatten(1, (size, -1))[..., :size].contiguous()


def _powers(rate: Tensor, count: int) -> Tensor:
    """Returns exp(rate q) for q = 0 ... count - 1, (W, N, count), from about 2 sqrt(count) exponentials each."""
    low = 1 << ((count - 1).bit_length() + 1) // 2
    steps = torch.arange(low, dtype=rate.real.dtype, device=rate.device)
    high = steps[: -(-count // low)] * low
    pairs = _exp(rate.unsqueeze(2) * high).unsqueeze(3) * _exp(rate.unsqueeze(2) * steps).unsqueeze(2)
    return pairs.flatten(2)[..., :count]


def _exp(z: Tensor) -> Tensor:
    return torch.polar(z.real.exp(), z.imag)  # several times as fast as torch.exp


def _pairs(z: Tensor) -> Tensor:
    """Returns complex numbers (..., N) as real ones (..., 2 N): real and imaginary parts in turn."""
    return torch.view_as_real(z).flatten(-2)


@full_precision
def selective_scan(u: Tensor, log_decay: Tensor, write: Tensor, read: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the recurrence s_t = exp(log_decay_t) s_{t-1} + u_t write_t', y_t = s_t read_t of each head.

    Args:
        u: (B, S, H, E), the inputs of H heads of E channels.
        log_decay: (B, S, H), at most 0.
        write: (B, S, N), by which the inputs are added to the states.
        read: (B, S, N), by which the states are read.
        state: (B, H, E, N), the state before the first step.

    Returns:
        The outputs (B, S, H, E), and the state (B, H, E, N) after the last step.

    Reference: Dao, Gu, "Transformers are SSMs", ICML 2024.
    """
    sites = u.shape[1]
    if sites == 1:
        state = state * log_decay.exp().transpose(1, 2).unsqueeze(3) + u.squeeze(1).unsqueeze(3) * write.unsqueeze(2)
        return (state @ read.unsqueeze(3)).squeeze(3).unsqueeze(1), state
    size = _chunk_size(sites, _SELECTIVE)
    beyond = -sites % size  # further steps without input or decay
    u, log_decay, write, read = (
        (pad(part, (0, 0) * (part.dim() - 2) + (0, beyond)) if beyond else part).unflatten(1, (-1, size))
        for part in (u, log_decay, write, read)
    )
    u, log_decay = u.transpose(2, 3), log_decay.transpose(2, 3)  # (B, K, H, Q, E) and (B, K, H, Q)
    between = _sums_between(log_decay).exp()  # (B, K, H, Q, Q)
    since = log_decay.cumsum(3).exp()  # the decay since the start of the chunk
    y = (between * (read @ write.transpose(2, 3)).unsqueeze(2)) @ u
    added = (u * between[..., -1, :].unsqueeze(4)).transpose(3, 4) @ write.unsqueeze(2)  # (B, K, H, E, N)
    before = [state]
    for part, decay in zip(added.unbind(1), since[..., -1:, None].unbind(1), strict=True):
        before.append(torch.addcmul(part, before[-1], decay))
    states = torch.stack(before[:-1], 1)
    y = y + (read.unsqueeze(2) @ states.transpose(3, 4)) * since.unsqueeze(4)
    return y.transpose(2, 3).flatten(1, 2)[:, :sites], before[-1]


def _sums_between(x: Tensor) -> Tensor:
    """Returns the sums of x_k (..., Q) over j < k <= i, (..., Q, Q) with index (i, j), and -inf for j > i.

    Sums are added up from each j, because differences of cumulated sums lose all digits after a large x_k.
    """
    size = x.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
    sums = torch.where(lower, x.unsqueeze(-1), 0.0).cumsum(-2)
    return sums.masked_fill(lower.t(), -torch.inf)


def _chunk_size(sites: int, most: int) -> int:
    """Returns the size of equal chunks, of at most ``most`` steps, that cover the steps."""
    return -(-sites // -(-sites // most))
