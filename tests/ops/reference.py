"""Plain references: loops over time in whatever dtype they are given, gradients by autograd.

They follow the definitions, share no code with the package, and are meant for float64.
"""

import math

import torch
from torch.nn import functional as F

METHODS = (
    'zoh',
    'zoh_exact',
    'foh',
    'bilinear',
    'poly',
    'highorder',
    'rk4',
    'foh_hold',
    'tustin',
)
TWO_TAP = ('foh_hold', 'tustin')


def phi(k, z):
    """φ_k(z) = ∫₀¹ exp((1−s) z) s^(k−1)/(k−1)! ds, as a power series or in closed form."""
    near = z.abs() < 1.5
    x = torch.where(near, z, 0)
    series = sum(x**i * (1 / math.factorial(i + k)) for i in range(26))
    safe = torch.where(near, 1, z)
    closed = torch.exp(safe)
    for i in range(1, k + 1):
        closed = (closed - 1 / math.factorial(i - 1)) / safe
    return torch.where(near, series, closed)


def coefficients(method, delta, A):
    """(a, w0, w1) of one step; delta (..., 1), A (..., n)."""
    z = delta * A
    if method in ('bilinear', 'tustin'):
        a = (1 + z / 2) / (1 - z / 2)
        w = delta / (1 - z / 2)
        return (a, w, torch.zeros_like(z)) if method == 'bilinear' else (a, w / 2, w / 2)
    w0, w1 = {
        'zoh': lambda: (delta + 0 * z, 0),
        'zoh_exact': lambda: (delta * phi(1, z), 0),
        'foh': lambda: (delta**2 * phi(2, z), 0),
        'poly': lambda: (delta * phi(1, z) + delta**2 * phi(2, z) / 2, 0),
        'highorder': lambda: (
            delta * phi(1, z) + delta**2 * phi(2, z) + delta**3 * phi(3, z) / 2,
            0,
        ),
        'rk4': lambda: (delta * (1 + z / 2 + z**2 / 6 + z**3 / 24), 0),
        'foh_hold': lambda: (delta * phi(2, z), delta * (phi(1, z) - phi(2, z))),
    }[method]()
    return torch.exp(z), w0, torch.zeros_like(z) + w1


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    initial_state=None,
    *,
    delta_softplus=False,
    discretization='zoh',
    reverse=False,
):
    """Output (b, l, d) and last state (b, d, n or 2n), one step at a time."""
    b, length, d = u.shape
    n = A.shape[1]
    if B.dim() == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
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
    for t in reversed(range(length)) if reverse else range(length):
        a, w0, w1 = coefficients(discretization, delta[:, t, :, None], A)
        drive = B[:, t] * u[:, t, :, None]
        h = a * h + w0 * drive + w1 * v
        v = drive
        y[t] = (h * C[:, t]).sum(-1)
    y = torch.stack(y, 1) if length else u.new_zeros(u.shape) + 0 * u
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y, torch.cat((h, v), -1) if discretization in TWO_TAP else h


def causal_conv1d(x, weight, bias=None, initial_state=None, *, activation=None, mode='causal'):
    """Output (b, l, d) and last state (b, d, w-1), by torch's own convolution."""
    length, width = x.shape[1], weight.shape[1]
    if mode == 'reverse':
        y, state = causal_conv1d(x.flip(1), weight, bias, initial_state, activation=activation)
        return y.flip(1), state
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


def add_rms_norm(x, weight, residual=None, *, eps=1e-5):
    """Output and sum."""
    r = x if residual is None else x + residual
    return r / torch.sqrt(r.square().mean(-1, keepdim=True) + eps) * weight, r
