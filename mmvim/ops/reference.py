"""The ops as defined in the papers: loops over time, in the dtype of the input.

For reading, and for tests to compare with; float64 and autograd make them exact. They share no code
with the implementations, take the arguments of their namesakes in :mod:`mmvim.ops` unchecked, and
return the last state as well where there is one.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .discretization import TWO_TAP


def phi(k: int, z: Tensor) -> Tensor:
    """φ_k(z) = ∫₀¹ exp((1−s) z) s^(k−1)/(k−1)! ds, as a power series or in closed form."""
    near = z.abs() < 1.5
    x = torch.where(near, z, 0)
    series = sum(x**i * (1 / math.factorial(i + k)) for i in range(26))
    safe = torch.where(near, 1, z)
    closed = torch.exp(safe)
    for i in range(1, k + 1):
        closed = (closed - 1 / math.factorial(i - 1)) / safe
    return torch.where(near, series, closed)


def coefficients(method: str, delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """a, w0 and w1 of one step: rows of the table in :mod:`mmvim.ops.discretization`.

    Args:
        method: One of :data:`mmvim.ops.DISCRETIZATIONS`.
        delta: Step sizes (..., 1).
        A: (..., n).
    """
    z = delta * A
    if method == 'zoh':
        return torch.exp(z), delta, 0
    if method == 'zoh_exact':
        return torch.exp(z), delta * phi(1, z), 0
    if method == 'foh':
        return torch.exp(z), delta**2 * phi(2, z), 0
    if method == 'bilinear':
        return (1 + z / 2) / (1 - z / 2), delta / (1 - z / 2), 0
    if method == 'poly':
        return torch.exp(z), delta * phi(1, z) + delta**2 * phi(2, z) / 2, 0
    if method == 'highorder':
        w0 = delta * phi(1, z) + delta**2 * phi(2, z) + delta**3 * phi(3, z) / 2
        return torch.exp(z), w0, 0
    if method == 'rk4':
        return torch.exp(z), delta * (1 + z / 2 + z**2 / 6 + z**3 / 24), 0
    if method == 'foh_hold':
        return torch.exp(z), delta * phi(2, z), delta * (phi(1, z) - phi(2, z))
    if method == 'tustin':
        w = delta / 2 / (1 - z / 2)
        return (1 + z / 2) / (1 - z / 2), w, w
    raise ValueError(f'discretization has no reference: {method!r}')


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    discretization: str = 'zoh',
    reverse: bool = False,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of Gu and Dao (arXiv 2312.00752): the output (b, l, d) and the last state."""
    b, length, d = u.shape
    n = A.shape[1]
    B, C = (x.unsqueeze(2) if x.dim() == 3 else x for x in (B, C))
    B, C = (x.repeat_interleave(d // x.shape[2], 2) for x in (B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    h = v = u.new_zeros(b, d, n)
    if initial_state is not None:
        h = initial_state[..., :n]
        if initial_state.shape[-1] == 2 * n:
            v = initial_state[..., n:]
    y = [None] * length
    steps = list(reversed(range(length)) if reverse else range(length))
    for last, t in zip((steps[:1] + steps)[:length], steps, strict=True):
        if seq_idx is not None:
            same = (seq_idx[:, t] == seq_idx[:, last]).view(b, 1, 1)
            h, v = h * same, v * same
        a, w0, w1 = coefficients(discretization, delta[:, t, :, None], A)
        before, v = v, B[:, t] * u[:, t, :, None]
        h = a * h + w0 * v + w1 * before
        y[t] = (h * C[:, t]).sum(-1)
    y = torch.stack(y, 1) if length else u.new_zeros(u.shape) + 0 * u
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y, torch.cat((h, v), -1) if discretization in TWO_TAP else h


def bidirectional_scan(forward, backward, z=None, *, scale=1.0, **options) -> Tensor:
    """Section 3.3 of Zhu et al. (Vision Mamba, arXiv 2401.09417): both scans, added and gated.

    Args:
        forward, backward: u, delta, A, B, C, D and delta_bias of each direction.
        z: Gate (b, l, d), or None.
        scale: Factor of the sum.
        **options: delta_softplus, discretization and seq_idx.
    """
    y = 0
    for (*inputs, delta_bias), reverse in ((forward, False), (backward, True)):
        y = y + selective_scan(*inputs, None, delta_bias, reverse=reverse, **options)[0]
    return scale * y if z is None else scale * y * F.silu(z)


def cross_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_weight: Tensor | None = None,
    routes=('rows', 'columns', 'rows_reversed', 'columns_reversed'),
    **options,
) -> Tensor:
    """Section 4.2 of Liu et al. (VMamba, arXiv 2401.10166): unfold, scan and merge.

    Args:
        x: (b, h, w, d).
        delta, A, B, C, D, delta_bias, delta_weight, routes: As in :mod:`mmvim.ops`.
        **options: delta_softplus and discretization.
    """
    b, h, w, d = x.shape
    if delta_weight is not None:
        delta = torch.einsum('bhwkr,kdr->bhwkd', delta, delta_weight)
    positions = torch.arange(h * w).view(h, w)
    out = 0
    for k, route in enumerate(routes):
        order = (positions.t() if route.startswith('columns') else positions).flatten()
        if route.endswith('reversed'):
            order = order.flip(0)
        u, *inputs = (
            t.flatten(1, 2)[:, order] for t in (x, *(t[:, :, :, k] for t in (delta, B, C)))
        )
        skip, bias = (None if t is None else t[k] for t in (D, delta_bias))
        y, _ = selective_scan(u, inputs[0], A[k], *inputs[1:], skip, None, bias, **options)
        out = out + y[:, order.argsort()].view(b, h, w, d)
    return out


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    mode: str = 'causal',
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output (b, l, d) and the last state (b, d, w − 1), by torch's own convolution."""
    length, width = x.shape[1], weight.shape[1]
    if mode == 'reverse':
        seq_idx = None if seq_idx is None else seq_idx.flip(1)
        y, state = causal_conv1d(
            x.flip(1), weight, bias, initial_state, activation=activation, seq_idx=seq_idx
        )
        return y.flip(1), state
    if seq_idx is not None and length:
        return _one_by_one(x, weight, bias, initial_state, activation, mode, seq_idx)
    x = x.transpose(1, 2)
    if mode == 'same':
        left = (width - 1) // 2
        x = F.pad(x, (left, width - 1 - left))
    elif initial_state is None:
        x = F.pad(x, (width - 1, 0))
    else:
        x = torch.cat((initial_state, x), -1)
    y = F.conv1d(x, weight.unsqueeze(1), bias, groups=x.shape[1]) if length else x[..., :0]
    y = F.silu(y) if activation == 'silu' else y
    return y.transpose(1, 2), x[..., length:]


def _one_by_one(x, weight, bias, state, activation, mode, seq_idx) -> tuple[Tensor, Tensor]:
    """A convolution of each sequence of each row; only the first has a state before it."""
    rows = []
    for i, numbers in enumerate(seq_idx.tolist()):
        starts = [t for t, n in enumerate(numbers) if t == 0 or n != numbers[t - 1]]
        before, pieces = None if state is None else state[i : i + 1], []
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            piece = x[i : i + 1, start:stop]
            y, last = causal_conv1d(piece, weight, bias, before, activation=activation, mode=mode)
            pieces.append(y)
            before = None
        rows.append((torch.cat(pieces, 1), last))
    if not rows:
        return x * 1, x.new_zeros(0, x.shape[2], weight.shape[1] - 1)
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def bidirectional_conv1d(x, weight_f, bias_f, weight_b, bias_b, *, activation=None):
    """The outputs of a causal and of a reverse convolution of the same x."""
    return (
        causal_conv1d(x, weight_f, bias_f, activation=activation)[0],
        causal_conv1d(x, weight_b, bias_b, activation=activation, mode='reverse')[0],
    )


def add_rms_norm(x, weight, residual=None, *, eps=1e-5) -> tuple[Tensor, Tensor]:
    """Equation 4 of Zhang and Sennrich (arXiv 1910.07467) of x + residual, and that sum."""
    r = x if residual is None else x + residual
    return r / torch.sqrt(r.square().mean(-1, keepdim=True) + eps) * weight, r
